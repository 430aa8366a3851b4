"""Predictors of the length of a request's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
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
_NUM_SLOTS = 2**14  # for words, and as many for all else
_MOST_SEEN = 400  # the rate of learning falls no more after so many times
_RATES = [1 / sqrt(max(num_seen, 1)) for num_seen in range(_MOST_SEEN + 1)]
_NUM_WORDS = 32  # tokens at either end of a prompt that are features one by one
_RUNS = (4, 8, 16, 32)  # bytes of 1, 2, 4 and 8 tokens


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
        self._weights = [0.0] * 2 * _NUM_SLOTS
        self._num_seen = [0] * 2 * _NUM_SLOTS

    def predict(self, request: Request) -> float:
        most = log(max(request.params.max_tokens, 1))
        return exp(min(max(self._expected(_features(request)), 0.0), most))

    def learn(self, request: Request) -> None:
        if not request.num_output_tokens:
            return
        groups = _features(request)
        error = log(request.num_output_tokens) - self._expected(groups)
        part = error / (1 + len(groups))
        self._num_learned = min(self._num_learned + 1, _MOST_SEEN)
        self._base += part * _RATES[self._num_learned]
        for slots in groups:
            change = part / sqrt(len(slots))
            for slot in slots:
                if (seen := self._num_seen[slot]) < _MOST_SEEN:
                    self._num_seen[slot] = seen = seen + 1
                self._weights[slot] += change * _RATES[seen]

    def _expected(self, groups: Iterable[Collection[int]]) -> float:
        """The logarithm of the length.  The squares of the values of each group of features sum to 1."""
        weight = self._weights.__getitem__
        return self._base + sum([sum(map(weight, slots)) / sqrt(len(slots)) for slots in groups])


def _features(request: Request) -> list[Collection[int]]:
    """Groups of features, as slots of the table: words in its first half, hashes counted from its end in the other."""
    size = request.num_prompt_tokens
    begin = request.token_ids[: min(size, _NUM_WORDS)]
    end = request.token_ids[max(size - _NUM_WORDS, 0) : size]
    first, last = begin[:8].tobytes(), end[-8:].tobytes()
    return [
        [crc32(request.scheduling.client.encode()) % _NUM_SLOTS - _NUM_SLOTS],
        [crc32(b"prompt", size.bit_length()) % _NUM_SLOTS - _NUM_SLOTS],
        [crc32(b"limit", request.params.max_tokens.bit_length()) % _NUM_SLOTS - _NUM_SLOTS],
        {crc32(first[:length], 1) % _NUM_SLOTS - _NUM_SLOTS for length in _RUNS},
        {crc32(last[-length:], 2) % _NUM_SLOTS - _NUM_SLOTS for length in _RUNS},
        [token_id % _NUM_SLOTS for token_id in set(begin + end)],
    ]


PREDICTORS: dict[str, Callable[[], Predictor]] = {"max_tokens": MaxTokens, "learned": LearnedLengths}
"""By the name that a configuration gives them."""
