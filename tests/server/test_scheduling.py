"""The scheduling parameters of a request, and the client that it belongs to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request

from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import SchedulingParams
from shoal.server.keys import known_key
from shoal.server.scheduling import resolve_scheduling
from shoal.server.wire.parsing import parse_body
from shoal.server.wire.requests import ChatBody, CompletionBody

BODIES: list[tuple[Any, dict[str, Any]]] = [
    (CompletionBody, {"prompt": "a"}),
    (ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
]


@pytest.fixture(params=BODIES, ids=["completion", "chat"])
def parse(request: pytest.FixtureRequest) -> Any:
    kind, required = request.param
    return lambda **fields: parse_body(kind, json.dumps(required | fields).encode())


def test_what_is_not_said_is_left_to_the_policy(parse: Any) -> None:
    assert resolve_scheduling(parse(), None) == SchedulingParams()
    unset = parse(ttft_slo_ms=None, tpot_slo_ms=None, user=None, priority=None)
    assert resolve_scheduling(unset, None) == SchedulingParams()


def test_what_is_said_is_handed_on(parse: Any) -> None:
    params = resolve_scheduling(parse(priority=-7, ttft_slo_ms=250, tpot_slo_ms=12.5), None)
    assert (params.priority, params.ttft_slo_ms, params.tpot_slo_ms) == (-7, 250.0, 12.5)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("priority", 1001, "<= 1000"),
        ("priority", -1001, ">= -1000"),
        ("priority", 0.5, "integer"),
        ("priority", "high", "integer"),
        ("priority", True, "integer"),
        ("ttft_slo_ms", 0, "> 0"),
        ("ttft_slo_ms", -1, "> 0"),
        ("ttft_slo_ms", 3_600_001, "<= 3600000"),
        ("tpot_slo_ms", 0, "> 0"),
        ("tpot_slo_ms", 1e300, "<= 3600000"),
        ("tpot_slo_ms", "fast", "number"),
        ("user", 5, "text"),
    ],
)
def test_a_bad_value_is_refused_with_field_and_limit(parse: Any, field: str, value: Any, limit: str) -> None:
    with pytest.raises(InvalidRequestError, match=limit) as caught:
        parse(**{field: value})
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")


def test_the_client_is_the_key_and_else_the_user(parse: Any) -> None:
    def client(user: str | None, key: str | None) -> str:
        return resolve_scheduling(parse(user=user), key).client

    assert client(None, None) == client("", None) == ""
    assert client("me", None) == client("me", None)
    names = [client(None, None), client("me", None), client("you", None), client("me", "a key"), client("me", "b key")]
    assert len(set(names)) == len(names)
    assert client("me", "a key") == client("you", "a key") == client(None, "a key"), (
        "requests without a name have one client"
    )
    assert client("a key", None) != client(None, "a key"), "a name never stands for a key"


def test_names_of_clients_are_short_and_do_not_show_the_key(parse: Any) -> None:
    for params in (resolve_scheduling(parse(user="u" * 10_000), None), resolve_scheduling(parse(), "Schlüssel")):
        assert len(params.client) == 16
        assert "Schlüssel" not in repr(params)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Bearer first", "first"),
        ("bearer first", "first"),
        ("Bearer dritter-Schlüssel", "dritter-Schlüssel"),
        ("Bearer firs", None),
        ("Bearer firstt", None),
        ("Basic first", None),
        ("Bearer", None),
        ("", None),
    ],
)
def test_the_key_that_a_request_carries(header: str, expected: str | None) -> None:
    request = Request({"type": "http", "headers": [(b"authorization", header.encode())]})
    assert known_key(request, ("first", "dritter-Schlüssel")) == expected
    assert known_key(request, ()) is None


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-api-key": "first"}, "first"),
        ({"x-api-key": "dritter-Schlüssel"}, "dritter-Schlüssel"),
        ({"x-api-key": "first", "authorization": "Bearer none"}, "first"),
        ({"x-api-key": "none", "authorization": "Bearer first"}, "first"),
        ({"x-api-key": "Bearer first"}, None),
        ({"x-api-key": ""}, None),
    ],
)
def test_a_key_may_come_as_anthropics_clients_send_it(headers: dict[str, str], expected: str | None) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert known_key(Request({"type": "http", "headers": raw}), ("first", "dritter-Schlüssel")) == expected


def test_prefixes_are_shared_within_a_key_and_a_salt(parse: Any) -> None:
    def salt(key: str | None, salt: str | None = None, *, shares: bool = False) -> str:
        return resolve_scheduling(parse(cache_salt=salt), key, shares_prefixes=shares).cache_salt

    assert salt(None) == salt("a", shares=True) == ""
    assert salt("a") == salt("a") != salt("b")
    apart = {salt(key, given) for key in (None, "a", "b", "s") for given in (None, "s", "a", "a s")}
    assert len(apart) == 16
    assert salt("a", "s", shares=True) == salt("b", "s", shares=True) == salt(None, "s") != ""
    assert max(map(len, apart)) == 16
