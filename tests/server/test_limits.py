"""What an API key may ask, on a clock that is set by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from shoal.scheduler.errors import InvalidRequestError, QueueFullError
from shoal.scheduler.output import SamplingParams
from shoal.server.engine.messages import EngineRequest
from shoal.server.errors import RateLimitError, http_error
from shoal.server.headers import AnswerHeaders
from shoal.server.limits import Allowance, Bucket
from shoal.server.settings import ServerConfig


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    size=st.integers(1, 100_000),
    events=st.lists(st.tuples(st.integers(0, 3600), st.floats(0, 3)), min_size=1, max_size=30),
)
def test_a_bucket_is_that_of_the_textbook(size: int, events: list[tuple[int, float]]) -> None:
    """Amounts are shares of the size; the oracle counts in fractions."""
    clock = Clock()
    bucket = Bucket(size, clock)
    level = Fraction(size)
    for pause, share in events:
        clock.now += pause
        level = min(level + Fraction(pause * size, 60), Fraction(size))
        amount = int(share * size)
        assert bucket.remaining == pytest.approx(max(level, 0), abs=1)
        assert bucket.reset == pytest.approx(float((size - level) * 60 / size), abs=1e-6)
        lack = max(min(amount, size) - level, Fraction(0))
        assert bucket.wait(amount) == pytest.approx(float(lack * 60 / size), abs=1e-5)
        bucket.take(amount)
        level -= amount


@given(size=st.integers(1, 10_000), amounts=st.lists(st.integers(1, 20_000), min_size=1, max_size=30))
def test_who_comes_back_when_told_is_taken_and_not_before(size: int, amounts: list[int]) -> None:
    clock = Clock()
    key = Allowance(ServerConfig(key_tokens_per_minute=size), lambda: 0, clock)
    used = 0
    for amount in amounts:
        try:
            key.check(1, amount)
        except RateLimitError as error:
            assert error.retry_after is not None and error.retry_after >= 1
            clock.now += error.retry_after - 1
            with pytest.raises(RateLimitError):
                key.check(1, amount)
            clock.now += 1
            key.check(1, amount)
        key._take(1, amount)
        used += amount
        assert used - amount <= size * (1 + clock.now / 60) + 1e-3, "no more than the minutes allow"


def test_what_is_refused_takes_nothing_and_what_was_not_needed_comes_back() -> None:
    clock = Clock()
    key = Allowance(ServerConfig(key_requests_per_minute=10, key_tokens_per_minute=600), lambda: 0, clock)
    key.check(4, 500)
    key._take(4, 500)
    for _ in range(3):
        with pytest.raises(RateLimitError, match=r"600 tokens a minute \(key_tokens_per_minute\) and has 100 left"):
            key.check(1, 150)
    with pytest.raises(RateLimitError, match=r"10 requests a minute .* and has 6 left, but this call asks for 8"):
        key.check(8, 1)
    assert key.headers() == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "6",
        "x-ratelimit-reset-requests": "24s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "50s",
    }
    key._take(0, -480)
    key.check(1, 150)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "580"
    assert key.headers()["x-ratelimit-reset-tokens"] == "2s"


def test_more_than_a_minute_allows_needs_all_of_it_and_is_paid_for() -> None:
    clock = Clock()
    key = Allowance(ServerConfig(key_tokens_per_minute=100), lambda: 0, clock)
    key.check(1, 600)
    key._take(1, 600)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert key.headers()["x-ratelimit-reset-tokens"] == "6m0s"
    with pytest.raises(RateLimitError, match="try again in 301 s") as caught:
        key.check(1, 1)
    assert http_error(caught.value).retry_after == 301


def test_only_so_many_at_once() -> None:
    unfinished = 0
    key = Allowance(ServerConfig(key_max_requests=3), lambda: unfinished)
    key.check(3, 10**9)
    unfinished = 2
    key.check(1, 0)
    with pytest.raises(
        RateLimitError, match=r"2 unfinished requests and may have at most 3 \(key_max_requests\)"
    ) as caught:
        key.check(2, 0)
    assert http_error(caught.value).retry_after == 1
    with pytest.raises(InvalidRequestError, match="4 choices, but an API key may have at most 3 unfinished"):
        key.check(4, 0)
    assert key.headers() == {}


def test_headers_are_added_to_every_answer_of_what_is_limited() -> None:
    key = Allowance(ServerConfig(key_requests_per_minute=60), lambda: 0, Clock())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/limited":
            scope["state"]["allowance"] = key
            key._take(1, 1)
        await Response("", 418)(scope, receive, send)

    client = TestClient(AnswerHeaders(app))
    limited = client.get("/limited")
    assert limited.status_code == 418
    assert limited.headers["x-ratelimit-remaining-requests"] == "59"
    assert limited.headers["x-ratelimit-reset-requests"] == "1s"
    assert not [name for name in client.get("/free").headers if name.startswith("x-ratelimit")]


def test_calls_take_what_they_may_need_and_give_back_the_rest() -> None:
    key = Allowance(ServerConfig(key_requests_per_minute=9, key_tokens_per_minute=600), lambda: 0, Clock())
    requests = [EngineRequest(name, [1] * 10, SamplingParams(max_tokens=90, seed=0)) for name in "abc"]

    def left() -> list[str]:
        return [key.headers()[f"x-ratelimit-remaining-{kind}"] for kind in ("requests", "tokens")]

    with pytest.raises(QueueFullError), key.taking(requests):
        raise QueueFullError("full")
    assert left() == ["9", "600"]
    with key.taking(requests) as settle:
        pass
    assert left() == ["6", "300"]
    with pytest.raises(RateLimitError), key.taking([*requests, *requests]):
        raise AssertionError
    settle(50)
    assert left() == ["6", "550"]
