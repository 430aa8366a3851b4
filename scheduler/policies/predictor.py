"""Predictors of the length of a request's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import exp, log, sqrt
from zlib import crc32

from shoal.scheduler.request import Request


class Predictor:
    """Predicts lengths of outputs, and may learn from the requests that end; by itself it does not."""

    def predict(self, request: Request) -> float:
        """Output tokens that the request will have in all, from 1 to `max_tokens`.  Asked when the request arrives."""
        raise NotImplementedError

    def learn(self, request: Request) -> None:
        """Learn from a request that has ended, and from its output."""


class MaxTokens(Predictor):
    """Predicts `max_tokens`, which is an upper bound."""

    def predict(self, request: Request) -> float:
        return max(request.params.max_tokens, 1)


class Oracle(Predictor):
    """Knows the lengths: the best that a predictor could do, for experiments.

    Args:
        num_output_tokens: length of each output, by request id.
    """

    def __init__(self, num_output_tokens: Mapping[str, int]) -> None:
        self._num_output_tokens = num_output_tokens

    def predict(self, request: Request) -> float:
        return max(self._num_output_tokens[request.request_id], 1)


_PRIOR_TOKENS = 128.0  # the prediction before anything is learned
_NUM_SLOTS = 2**14
_SLOWEST_RATE = 0.05  # the rate of learning does not fall below this
_NUM_WORDS = 32  # tokens at either end of a prompt that are features one by one


class LearnedLengths(Predictor):
    """Learns from the requests that end: an online linear regression of the logarithm of the length.

    The features of a request are its client, the magnitudes of its prompt and of `max_tokens`, how its prompt begins
    and ends (1, 2, 4 and 8 tokens), and which tokens occur near the ends.  They are hashed into a table of fixed size
    (Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning").  An observation corrects the
    prediction by the normalized LMS rule (Widrow and Hoff 1960), in which each group of features takes an equal part
    of the error.  A feature's weight moves most when the feature is first seen, and then less and less: by the square
    root of the number of times that it was seen, as in AdaGrad.  The rate has a lower bound, so that old observations
    are slowly forgotten.

    A feature that was never seen has no weight, so that without any data all predictions are alike.  The exponential
    of a mean logarithm is the typical length, which a few very long outputs change little.
    """

    def __init__(self) -> None:
        self._base = log(_PRIOR_TOKENS)
        self._num_learned = 0
        self._weights = [0.0] * _NUM_SLOTS
        self._num_seen = [0] * _NUM_SLOTS

    def predict(self, request: Request) -> float:
        most = log(max(request.params.max_tokens, 1))
        return exp(min(max(self._expected(_features(request)), 0.0), most))

    def learn(self, request: Request) -> None:
        if not request.num_output_tokens:
            return
        features = list(_features(request))
        error = log(request.num_output_tokens) - self._expected(features)
        part = error / (1 + sum(value * value for _, value in features))
        self._num_learned += 1
        self._base += part * _rate(self._num_learned)
        for slot, value in features:
            self._num_seen[slot] += 1
            self._weights[slot] += part * _rate(self._num_seen[slot]) * value

    def _expected(self, features: Iterable[tuple[int, float]]) -> float:
        """The logarithm of the length."""
        return self._base + sum(self._weights[slot] * value for slot, value in features)


def _rate(num_seen: int) -> float:
    return max(1 / sqrt(num_seen), _SLOWEST_RATE)


def _features(request: Request) -> Iterator[tuple[int, float]]:
    """Slots of the table and their values; the squares of the values of each group of features sum to 1."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    groups = (
        [f"client {request.scheduling.client}"],
        [f"prompt {len(prompt).bit_length()}"],
        [f"limit {request.params.max_tokens.bit_length()}"],
        [f"begins {prompt[:count]}" for count in (1, 2, 4, 8)],
        [f"ends {prompt[-count:]}" for count in (1, 2, 4, 8)],
        [f"word {token_id}" for token_id in prompt[:_NUM_WORDS] + prompt[-_NUM_WORDS:]],
    )
    for group in groups:
        features = dict.fromkeys(group)
        value = 1 / sqrt(len(features))
        for feature in features:
            yield crc32(feature.encode()) % _NUM_SLOTS, value


PREDICTORS: dict[str, Callable[[], Predictor]] = {"max_tokens": MaxTokens, "learned": LearnedLengths}
"""By the name that a configuration gives them."""
