"""Injected faults, as programs meet them: over plain HTTP, and with the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import API_KEYS, StartServer
from tests.e2e.harness import PATIENCE, Server, joined

COMPLETIONS, RESTARTS = "/v1/completions", "shoal:engine_restarts_total"
GREEDY: dict[str, Any] = {"prompt": "Z", "temperature": 0, "ignore_eos": True, "max_tokens": 20}
TEXT = cycle_text(20)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, cycle_folder: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder, "--model", str(cycle_folder), "--num-blocks", "2048", "--fault-header")
    yield server.wait_ready()
    server.close()


@pytest.fixture
def headers(request: pytest.FixtureRequest) -> Callable[[str], dict[str, str]]:
    """The headers of a request with a script; each test counts for itself."""
    return lambda script: {"x-shoal-fault": script, "x-shoal-fault-scope": request.node.nodeid}


@pytest.fixture
def client(faulty: Server) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{faulty.url}/v1", api_key="unused", timeout=PATIENCE, http_client=http) as made:
        yield made


def stream_bytes(server: Server, headers: dict[str, str], **body: Any) -> tuple[list[bytes], type[Exception] | None]:
    """The events of a stream as they come, and the error that ended it."""
    data = b""
    try:
        with server.http.stream(
            "POST", COMPLETIONS, json=GREEDY | body | {"stream": True}, headers=headers
        ) as response:
            assert response.status_code == 200
            for part in response.iter_raw():
                data += part
    except httpx.HTTPError as error:
        return data.split(b"\n\n")[:-1], type(error)
    return data.split(b"\n\n")[:-1], None


def data_of(event: bytes) -> Any:
    return json.loads(event.partition(b"data: ")[2])


def text_of(events: list[bytes]) -> str:
    return joined([data_of(event) for event in events if not event.endswith(b"[DONE]")])


def test_two_fail_and_then_they_succeed(faulty: Server, headers: Callable[[str], dict[str, str]]) -> None:
    met = [faulty.http.post(COMPLETIONS, json=GREEDY, headers=headers("429, 503 retry_after=9, ok")) for _ in range(4)]
    assert [answer.status_code for answer in met] == [429, 503, 200, 200]
    assert [answer.headers.get("retry-after") for answer in met] == ["1", "9", None, None]
    assert [answer.headers.get("x-shoal-fault") for answer in met] == ["429", "503", None, None]
    assert met[0].json()["error"]["code"] == "queue_full"
    assert met[2].json()["choices"][0]["text"] == TEXT
    other = headers("429, 503 retry_after=9, ok") | {"x-shoal-fault-scope": "another"}
    assert faulty.http.post(COMPLETIONS, json=GREEDY, headers=other).status_code == 429


def test_a_header_that_is_no_script_is_refused(faulty: Server, tiny: Server) -> None:
    unknown = {"x-shoal-fault": "teapot"}
    answer = faulty.http.post(COMPLETIONS, json=GREEDY, headers=unknown)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "x-shoal-fault")
    assert error["message"].startswith("x-shoal-fault: unknown fault 'teapot'")
    assert faulty.http.get("/v1/models", headers=unknown).status_code == 200
    assert faulty.http.post("/tokenize", json={"prompt": "Z"}, headers=unknown).status_code == 200
    assert tiny.http.post(COMPLETIONS, json=GREEDY, headers=unknown).status_code == 200, "it is off by default"


@pytest.mark.parametrize("script", ["slow seconds=0.4", "stall after=3 seconds=0.4"])
def test_a_pause(faulty: Server, headers: Callable[[str], dict[str, str]], script: str) -> None:
    arrivals, texts = [time.monotonic()], []
    with faulty.http.stream("POST", COMPLETIONS, json=GREEDY | {"stream": True}, headers=headers(script)) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.monotonic())
                texts.append(joined([json.loads(line.removeprefix("data: "))]))
    after = 3 if script.startswith("stall") else 0
    assert arrivals[after + 1] - arrivals[after] > 0.3
    assert "".join(texts) == TEXT


def test_errors_in_the_middle_of_a_stream(faulty: Server, headers: Callable[[str], dict[str, str]]) -> None:
    whole, _ = stream_bytes(faulty, headers("ok"))
    for script, code in (("error after=4", "internal_error"), ("engine_error after=0", "engine_error")):
        events, error = stream_bytes(faulty, headers(script))
        *before, told, done = events
        assert error is None and done == b"data: [DONE]"
        assert TEXT.startswith(text_of(before)) and len(before) == int(script[-1])
        assert data_of(told)["error"]["code"] == code
    events, _ = stream_bytes(faulty, headers("malformed after=2"))
    assert events[-1].endswith(b"data: [DONE]") and len(events) > 4
    with pytest.raises(json.JSONDecodeError):
        data_of(events[2])
    assert TEXT.startswith(text_of(events[:2])) and text_of(events[3:]) == text_of(whole)[-len(text_of(events[3:])) :]
    faulty.wait_idle()


def test_cut_connections(faulty: Server, headers: Callable[[str], dict[str, str]]) -> None:
    events, error = stream_bytes(faulty, headers("cut after=3"))
    assert len(events) == 3 and TEXT.startswith(text_of(events)) and error is httpx.RemoteProtocolError
    for script in ("cut", "cut after=1"):
        with pytest.raises(httpx.RemoteProtocolError):
            faulty.http.post(COMPLETIONS, json=GREEDY, headers=headers(script))
    faulty.wait_idle()
    assert "Traceback" not in faulty.log and " ERROR " not in faulty.log


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_dies_and_the_text_is_whole(
    faulty: Server, headers: Callable[[str], dict[str, str]], stream: bool
) -> None:
    before, engine = faulty.metric(RESTARTS), faulty.engine_pid()
    asked = {"max_tokens": 60, "n": 2}
    if stream:
        events, error = stream_bytes(faulty, headers("kill after=7"), **asked)
        chunks = [data_of(event) for event in events[:-1]]
        assert error is None
        texts = [joined(chunks, index) for index in range(2)]
    else:
        answer = faulty.http.post(COMPLETIONS, json=GREEDY | asked, headers=headers("kill after=7"))
        assert answer.headers["x-shoal-fault"] == "kill"
        texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts == [cycle_text(60)] * 2
    assert faulty.metric(RESTARTS) == before + 1
    assert faulty.engine_pid() != engine
    assert "exit code -9" in faulty.log


def test_each_key_meets_the_faults_of_the_settings_by_itself(start: StartServer) -> None:
    server = start("--fault-script", "429, ok, 500 at=3", f"--api-keys={','.join(API_KEYS[:2])}").wait_ready()

    def statuses(key: str, num_requests: int) -> list[int]:
        sent = {"authorization": f"Bearer {key}", "x-shoal-fault": "503"}
        return [server.http.post(COMPLETIONS, json=GREEDY, headers=sent).status_code for _ in range(num_requests)]

    assert statuses(API_KEYS[0], 2) == [429, 200]
    assert statuses("unknown", 5) == [401] * 5
    assert statuses(API_KEYS[1], 4) == [429, 200, 500, 200]
    assert statuses(API_KEYS[0], 2) == [500, 200]
    assert "faults are injected" in server.log


# -- the official client -----------------------------------------------------------------------------------------------


def test_the_official_client_tries_again(client: openai.OpenAI, headers: Callable[[str], dict[str, str]]) -> None:
    asked: dict[str, Any] = {"model": "cycle", "prompt": "Z", "temperature": 0, "max_tokens": 4}
    for script in ("429*2, ok", "503, 500, ok", "cut, ok", "cut after=1, ok"):
        answer = client.completions.create(**asked, extra_headers=headers(script))
        assert answer.choices[0].text == cycle_text(4), script


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("429", openai.RateLimitError),
        ("500", openai.InternalServerError),
        ("503", openai.InternalServerError),
        ("engine_error", openai.InternalServerError),
        ("cut", openai.APIConnectionError),
        ("cut after=1", openai.APIConnectionError),
        ("slow seconds=60", openai.APITimeoutError),
        ("malformed", json.JSONDecodeError),
    ],
)
def test_what_the_official_client_raises(
    client: openai.OpenAI, headers: Callable[[str], dict[str, str]], script: str, error: type[Exception]
) -> None:
    hasty = client.with_options(max_retries=0, timeout=1 if "slow" in script else PATIENCE)
    with pytest.raises(error):
        hasty.completions.create(model="cycle", prompt="Z", max_tokens=4, extra_headers=headers(script))


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("error after=2", openai.APIError),
        ("engine_error after=2", openai.APIError),
        ("cut after=2", (openai.APIConnectionError, httpx.RemoteProtocolError)),  # as the client is new or old
        ("malformed after=2", json.JSONDecodeError),
    ],
)
def test_what_the_official_client_raises_in_a_stream(
    client: openai.OpenAI, headers: Callable[[str], dict[str, str]], script: str, error: Any
) -> None:
    stream = client.completions.create(
        model="cycle", prompt="Z", temperature=0, max_tokens=12, stream=True, extra_headers=headers(script)
    )
    received: list[str] = []
    with pytest.raises(error):
        received.extend(chunk.choices[0].text for chunk in stream)
    assert len(received) == 2 and cycle_text(12).startswith("".join(received))


def test_the_official_client_gives_up_a_stream_that_stalls(
    client: openai.OpenAI, headers: Callable[[str], dict[str, str]]
) -> None:
    hasty = client.with_options(max_retries=0, timeout=1)
    num_received = 0
    with pytest.raises((openai.APITimeoutError, httpx.ReadTimeout)):
        for _ in hasty.completions.create(
            model="cycle", prompt="Z", stream=True, extra_headers=headers("stall after=2 seconds=60")
        ):
            num_received += 1
    assert num_received <= 2
