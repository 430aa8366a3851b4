"""How much an API key may ask: requests at once, and requests and tokens in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.engine.engine import Engine
from shoal.server.engine.messages import EngineRequest
from shoal.server.errors import RateLimitError
from shoal.server.scheduling import client_of
from shoal.server.settings import ServerConfig

MINUTE = 60.0


class Bucket:
    """A token bucket: what is taken from it comes back evenly, as much in a minute as it holds.

    Whoever wants more than it holds needs a full bucket.  It is then overdrawn, and so the average stays what it is.
    """

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self.size = size
        self._clock = clock
        self._full_at = clock()

    @property
    def reset(self) -> float:
        """Seconds until it is full."""
        return max(self._full_at - self._clock(), 0.0)

    @property
    def remaining(self) -> int:
        return max(int(self.size * (1 - self.reset / MINUTE) + 1e-6), 0)

    def wait(self, amount: int) -> float:
        """Seconds until so much can be taken."""
        return round(max(self.reset - MINUTE * (1 - min(amount / self.size, 1.0)), 0.0), 6)

    def take(self, amount: int) -> None:
        """Take so much out, or put it back if it is negative."""
        self._full_at = self._clock() + self.reset + MINUTE * amount / self.size


class Allowance:
    """What one API key may ask, and how much of that is left.

    Args:
        num_unfinished: returns how many of the key's requests are unfinished.
    """

    def __init__(
        self,
        config: ServerConfig,
        num_unfinished: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests = config.key_max_requests
        self._num_unfinished = num_unfinished
        per_minute = {"requests": config.key_requests_per_minute, "tokens": config.key_tokens_per_minute}
        self._buckets = {kind: Bucket(size, clock) for kind, size in per_minute.items() if size is not None}

    def check(self, num_requests: int, num_tokens: int, param: str = "n") -> None:
        """Refuse what is more than the key may ask now.

        Args:
            param: the field that says how many requests.

        Raises:
            InvalidRequestError: it will never be less.
            RateLimitError: with the time after which it may be asked.
        """
        most = self._max_requests
        if most is not None and num_requests > most:
            what = "choices" if param == "n" else "inputs"
            raise InvalidRequestError(
                f"the call asks for {num_requests} {what}, but an API key may have at most {most} unfinished "
                f"(key_max_requests)",
                param=param,
            )
        if most is not None and (num_unfinished := self._num_unfinished()) + num_requests > most:
            raise RateLimitError(
                f"the API key has {num_unfinished} unfinished requests and may have at most {most} (key_max_requests); "
                f"try again later",
                param="key_max_requests",
            )
        asked = {"requests": num_requests, "tokens": num_tokens}
        waits = {kind: bucket.wait(asked[kind]) for kind, bucket in self._buckets.items()}
        kind = max(waits, key=waits.__getitem__, default=None)
        if kind is not None and waits[kind]:
            bucket = self._buckets[kind]
            raise RateLimitError(
                f"the API key may ask for {bucket.size} {kind} a minute (key_{kind}_per_minute) and has "
                f"{bucket.remaining} left, but this call asks for {asked[kind]}; try again in {ceil(waits[kind])} s",
                param=f"key_{kind}_per_minute",
                retry_after=ceil(waits[kind]),
            )

    @contextmanager
    def taking(self, requests: Sequence[EngineRequest], param: str = "n") -> Iterator[Callable[[int], None]]:
        """Take what these requests may need, unless the block fails.

        Yields:
            What is told at their end how many tokens they used, and gives back what they did not.

        Raises: as `check` does.
        """
        num_tokens = sum(len(one.prompt_token_ids) + one.params.max_tokens for one in requests)
        self.check(len(requests), num_tokens, param)
        yield lambda num_used: self._take(0, num_used - num_tokens)
        self._take(len(requests), num_tokens)

    def _take(self, num_requests: int, num_tokens: int) -> None:
        taken = {"requests": num_requests, "tokens": num_tokens}
        for kind, bucket in self._buckets.items():
            bucket.take(taken[kind])

    def headers(self) -> dict[str, str]:
        """What is left, in OpenAI's headers."""
        found = {}
        for kind, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.size)
            found[f"x-ratelimit-remaining-{kind}"] = str(bucket.remaining)
            found[f"x-ratelimit-reset-{kind}"] = _duration(bucket.reset)
        return found


UNLIMITED = Allowance(ServerConfig(), lambda: 0)


def make_allowances(config: ServerConfig, api_keys: Collection[str], engine: Engine) -> Mapping[str | None, Allowance]:
    """The allowance of each key, or of all requests together (None) where there are no keys; none without a limit."""
    if not (config.key_max_requests or config.key_requests_per_minute or config.key_tokens_per_minute):
        return {}

    def of(key: str) -> Allowance:
        client = client_of(key)
        return Allowance(config, lambda: sum(one.request.scheduling.client == client for one in engine.journals()))

    return {key: of(key) for key in api_keys} or {None: Allowance(config, lambda: len(engine.journals()))}


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `1s`, `6m0s`."""
    minutes, rest = divmod(ceil(round(seconds, 6)), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
