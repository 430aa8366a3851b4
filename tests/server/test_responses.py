"""OpenAI's Responses API: a service whose engine says what the test wants, with OpenAI's client as judge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import EngineError
from shoal.scheduler.output import FinishReason, RequestOutput, SchedulerStats, TokenLogprobs
from shoal.server.app import create_app
from shoal.server.engine.messages import News, Ready
from shoal.server.responses import store
from shoal.server.routes.responses import responses_router
from shoal.server.settings import resolve
from shoal.server.setup import build_service
from shoal.server.tools.formats import TOOL_FORMATS
from shoal.server.wire.items import ResponsesBody
from tests.examples import examples
from tests.server.test_tools_chat import HERMES, PLAIN, THINKS, checkpoint, request

Value = TypeVar("Value")
EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = TOOL_FORMATS["hermes"].write([("weather", {"city": "Rome"})])
ENDS = ("response.completed", "response.incomplete", "response.failed")
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


class Engine:
    """An API process whose engine is played by hand, on one event loop.

    Attributes:
        prompt: of the last request.
    """

    def __init__(self, folder: Path, **given: Any) -> None:
        self.service, self._client = build_service(resolve({"model": str(folder), "server": given}))
        limits = SchedulerConfig(max_model_len=8192, num_blocks=4096, max_num_seqs=64, max_num_batched_tokens=512)
        self._client.connect(Ready(limits, 1, 1, "by hand", None), lambda command: None)
        transport = httpx.ASGITransport(create_app(self.service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
        self.prompt = ""
        self.pace = asyncio.Event()
        self.pace.set()

    async def say(self, text: str, reason: FinishReason = STOP, *, step: int = 3, fails: bool = False) -> None:
        """Answer the next request, some tokens at a time, as long as the pace lets it."""
        while not (names := list(self._client._unfinished)):  # noqa: ASYNC110 (it is about turns)
            await asyncio.sleep(0)
        (name,) = names
        submission = self._client._unfinished[name]
        asked = submission.journals[name].request
        self.prompt = self.service.tokenizer.decode(asked.prompt_token_ids, skip_special_tokens=False)
        token_ids = self.service.tokenizer.encode(text, add_special_tokens=False) + [1] * (reason is STOP)
        for at in range(0, len(token_ids), step):
            await self.pace.wait()
            some = token_ids[at : at + step]
            is_last = at + step >= len(token_ids)
            scores = [TokenLogprobs(-1.5, 1, [at % 256], [-0.5]) for _ in some]
            logprobs = scores if asked.params.num_logprobs is not None else None
            if is_last and fails:
                submission.fail(EngineError("out of luck"))
                return
            ended = reason if is_last else None
            self._client.take(
                News([RequestOutput(name, some, ended, logprobs=logprobs)], SchedulerStats(0, 0, 0.0, 0, 0, 0))
            )
            while submission._backlog:  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def post(self, text: str, /, reason: FinishReason = STOP, *, step: int = 3, **body: Any) -> httpx.Response:
        """Ask for a response that says this."""
        playing = asyncio.create_task(self.say(text, reason, step=step))
        try:
            return await self.http.post("/v1/responses", json={"input": "hi"} | body)
        finally:
            playing.cancel()

    async def ask(self, text: str, /, reason: FinishReason = STOP, *, step: int = 3, **body: Any) -> Response:
        """The whole answer, which the stream is in pieces."""
        whole = await self.post(text, reason, step=step, **body)
        assert whole.status_code == 200, whole.text
        answer = Response.model_validate_json(whole.content, strict=True)
        streamed = await self.post(text, reason, step=step, stream=True, **body)
        assert comparable(put_together(events_of(streamed.text))) == comparable(answer)
        return answer

    async def close(self) -> None:
        await self.http.aclose()
        await self.service.templates.close()


def events_of(stream: str) -> list[Any]:
    """The events of a stream, each as its own type of OpenAI's; those of one that is held have ids."""
    events = []
    for number, lines in enumerate(stream.split("\n\n")[:-1]):
        *event_id, name, data = lines.split("\n")
        assert all(one.endswith(f":{number + 1}") for one in event_id)
        kind = EVENTS[name.removeprefix("event: ")]
        one = kind.model_validate_json(data.removeprefix("data: "), strict=True)
        assert one.sequence_number == number
        events.append(one)
    return events


def put_together(events: list[Any]) -> Response:
    """What OpenAI's client makes of a stream; the deltas are together what each end says, and what is in the answer."""
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    deltas: dict[tuple[str, str], str] = {}
    done: dict[tuple[str, str], str] = {}
    logprobs: dict[str, list[Any]] = {}
    items = []
    assert [one.type for one in events[:2]] == ["response.created", "response.in_progress"]
    for one in events:
        assert one is events[-1] or one.type not in ENDS
        state.handle_event(one)
        kind, _, part = one.type.rpartition(".")
        if part == "delta":
            key = one.item_id, kind
            deltas[key] = deltas.get(key, "") + one.delta
            logprobs.setdefault(one.item_id, []).extend(getattr(one, "logprobs", []))
        elif part == "done" and kind.endswith(("_text", "arguments")):
            done[one.item_id, kind] = one.arguments if kind.endswith("arguments") else one.text
            if kind.endswith("output_text"):
                assert [lp.token for lp in one.logprobs] == [lp.token for lp in logprobs.get(one.item_id, [])]
        elif one.type == "response.output_item.done":
            items.append(one.item)
    assert deltas == {key: text for key, text in done.items() if text}
    answer: Response = events[-1].response
    assert [item.to_dict() for item in items] == [item.to_dict() for item in answer.output]
    return answer


def comparable(response: Response) -> Any:
    """A response without what differs each time."""
    shown = response.to_dict()
    for name in ("id", "created_at", "completed_at", "seed"):
        shown.pop(name, None)
    for item in shown["output"]:
        del item["id"]
        item.pop("call_id", None)
    return shown


Scene = Callable[[Coroutine[Any, Any, Value]], Value]


@pytest.fixture(scope="module")
def play() -> Iterator[Scene[Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def engines(play: Scene[None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    folder = tmp_path_factory.mktemp("checkpoints")

    async def make() -> dict[str, Engine]:
        templates = {"calls": HERMES, "thinks": THINKS, "plain": PLAIN}
        return {name: Engine(checkpoint(folder / name, template)) for name, template in templates.items()}

    made = play(make())
    yield made
    for engine in made.values():
        play(engine.close())


def test_a_text_is_a_message(engines: dict[str, Engine], play: Scene[Response]) -> None:
    answer = play(engines["plain"].ask("Hello", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5))
    (message,) = answer.output
    assert message.type == "message" and message.status == "completed" and answer.output_text == "Hello"
    assert (answer.status, answer.id[:5], message.id[:4]) == ("completed", "resp_", "msg_")
    assert answer.usage is not None and answer.usage.output_tokens == 6
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert engines["plain"].prompt == "<system>Be brief.\n<user>hi\n"
    assert set(answer.model_extra or {}) == {"store", "seed"}


def test_an_answer_that_is_cut_is_incomplete(engines: dict[str, Engine], play: Scene[Response]) -> None:
    answer = play(engines["plain"].ask("Hello", LENGTH, max_output_tokens=5))
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.status == "incomplete" and answer.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_calls_are_items(engines: dict[str, Engine], play: Scene[Response]) -> None:
    answer = play(engines["calls"].ask(f"So: {CALL}{CALL}", tools=[WEATHER]))
    said, *calls = answer.output
    assert said.type == "message" and answer.output_text == "So:"
    for call in calls:
        assert call.type == "function_call" and call.status == "completed" and call.id is not None
        assert (call.name, json.loads(call.arguments), call.id[:3]) == ("weather", {"city": "Rome"}, "fc_")
    assert len(calls) == 2 == len({call.call_id for call in calls if call.type == "function_call"})


def test_a_thought_is_an_item(engines: dict[str, Engine], play: Scene[Response]) -> None:
    answer = play(engines["thinks"].ask("<think>Hm.</think>\n\nYes.", reasoning={"effort": "low", "summary": "auto"}))
    thought, _ = answer.output
    assert thought.type == "reasoning" and thought.content is not None and thought.content[0].text == "Hm."
    assert answer.output_text == "Yes." and answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == len("<think>Hm.</think>")
    assert engines["thinks"].prompt.endswith("low")
    cut = play(engines["thinks"].ask("<think>Hm.", LENGTH))
    assert [(item.type, item.status) for item in cut.output] == [("reasoning", "incomplete")]  # type: ignore[union-attr]
    silent = play(engines["thinks"].ask("<think>Hm.</think>"))
    assert [item.type for item in silent.output] == ["reasoning", "message"] and silent.output_text == ""


def test_log_probabilities_are_those_of_the_message(engines: dict[str, Engine], play: Scene[Response]) -> None:
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "tools": [WEATHER]}
    answer = play(engines["thinks"].ask(f"<think>Hm.</think>\nJa, für 1 €! {CALL}", **asked))
    part = answer.output[1].content[0]  # type: ignore[union-attr, index]
    assert bytes(byte for one in part.logprobs for byte in one.bytes).decode() == part.text == "Ja, für 1 €!"  # type: ignore[union-attr]
    assert all(one.logprob == -1.5 and one.top_logprobs[0].logprob == -0.5 for one in part.logprobs)  # type: ignore[union-attr]
    assert play(engines["plain"].ask("Hi")).output[0].content[0].logprobs == []  # type: ignore[union-attr, index]


PIECES = ["Hello", " ", "\n", "<think>", "</think>", CALL, CALL[:20], "<tool_call>", "{", "ü€", "."]


@settings(max_examples=examples(60), deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    how=st.fixed_dictionaries({"reason": st.sampled_from([STOP, LENGTH]), "step": st.integers(1, 7)}),
    name=st.sampled_from(["calls", "thinks", "plain"]),
)
def test_streamed_equals_whole(
    engines: dict[str, Engine], play: Scene[Response], text: str, how: dict[str, Any], name: str
) -> None:
    # Where marks are left out, tokens are found again by their text, which may be elsewhere too.
    include = {} if "<" in text else {"include": ["message.output_text.logprobs"]}
    play(engines[name].ask(text or ".", **how, tools=[WEATHER], **include))


def test_an_answer_goes_on_by_its_id_and_by_its_items(engines: dict[str, Engine], play: Scene[None]) -> None:
    engine = engines["calls"]

    async def scene() -> None:
        first = await engine.ask(CALL, tools=[WEATHER], instructions="Call.")
        call = first.output[0]
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        second = await engine.ask("Rain.", input=[result], previous_response_id=first.id, tools=[WEATHER])
        prompt = engine.prompt
        assert "Call." not in prompt and '<tool_call>weather={"city": "Rome"}' in prompt and "<tool>rain" in prompt
        asked = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
        for again in (
            call.model_dump(),
            call.model_dump(exclude_unset=True) | {"parsed_arguments": {"city": "Rome"}},
            {"type": "item_reference", "id": call.id},
        ):
            await engine.ask(
                "Rain.", input=[asked, again, result | {"output": [{"type": "input_text", "text": "rain"}]}]
            )
            assert engine.prompt == prompt.partition("\n")[2]  # without the tool
        third = await engine.ask("Yes.", input="Sure?", previous_response_id=second.id)
        assert engine.prompt.endswith("<tool>rain\n<assistant>Rain.\n<user>Sure?\n")
        items = (await engine.http.get(f"/v1/responses/{third.id}/input_items?order=asc")).content
        listed = ResponseItemList.model_validate_json(items, strict=True)
        assert [item.type for item in listed.data] == [
            "message",
            "function_call",
            "function_call_output",
            "message",
            "message",
        ]
        rest = (await engine.http.get(f"/v1/responses/{third.id}/input_items?limit=2&after={listed.data[3].id}")).json()
        assert [one["id"] for one in rest["data"]] == [listed.data[2].id, listed.data[1].id] and rest["has_more"]

    play(scene())


def test_a_response_is_found_and_deleted(engines: dict[str, Engine], play: Scene[None]) -> None:
    engine = engines["plain"]

    async def scene() -> None:
        first = (await engine.post("Hello")).json()
        assert (await engine.http.get(f"/v1/responses/{first['id']}")).json() == first
        refused = await engine.http.post(f"/v1/responses/{first['id']}/cancel")
        assert refused.status_code == 400 and "background" in refused.json()["error"]["message"]
        refused = await engine.http.get(f"/v1/responses/{first['id']}?stream=true")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream"
        gone = await engine.http.delete(f"/v1/responses/{first['id']}")
        assert gone.json() == {"id": first["id"], "object": "response", "deleted": True}
        for answer in (
            await engine.http.get(f"/v1/responses/{first['id']}"),
            await engine.http.delete(f"/v1/responses/{first['id']}"),
        ):
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
        refused = await engine.post("", previous_response_id=first["id"])
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "previous_response_id"
        unkept = (await engine.post("Hello", store=False)).json()
        assert (await engine.http.get(f"/v1/responses/{unkept['id']}")).status_code == 404

    play(scene())


def test_the_background(engines: dict[str, Engine], play: Scene[None]) -> None:
    """It goes on though nobody reads it, is read from any event on, and is cancelled."""
    engine = engines["plain"]

    async def scene() -> None:
        url = "/v1/responses"
        queued = (await engine.http.post(url, json={"input": "hi", "background": True})).json()
        assert (queued["status"], queued["background"], queued["output"]) == ("queued", True, [])
        engine.pace.clear()
        saying = asyncio.create_task(engine.say("Hello you"))
        refused = await engine.http.post(url, json={"input": "hi", "previous_response_id": queued["id"]})
        assert refused.status_code == 400 and "has not ended" in refused.json()["error"]["message"]
        engine.pace.set()
        await asyncio.sleep(0.01)
        await saying
        now = (await engine.http.get(f"{url}/{queued['id']}")).json()
        assert now["status"] == "completed" and now["output"][0]["content"][0]["text"] == "Hello you"
        stream = (await engine.http.get(f"{url}/{queued['id']}?stream=true")).text
        events = [json.loads(lines.partition("data: ")[2]) for lines in stream.split("\n\n")[:-1]]
        assert [one["type"] for one in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
        assert [one["sequence_number"] for one in events] == list(range(len(events))) and events[-1]["response"] == now
        for after in (0, 4, len(events) - 1):
            rest = (await engine.http.get(f"{url}/{queued['id']}?stream=true&starting_after={after}")).text
            assert rest == "".join(part + "\n\n" for part in stream.split("\n\n")[after + 1 : -1])
        refused = await engine.http.get(f"{url}/{queued['id']}?stream=true&starting_after={len(events)}")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "starting_after"

        queued = (await engine.http.post(url, json={"input": "hi", "background": True})).json()
        for _ in range(2):
            cancelled = (await engine.http.post(f"{url}/{queued['id']}/cancel")).json()
            Response.model_validate(cancelled)
            assert cancelled["status"] == "cancelled" and not engine._client._unfinished
        queued = (await engine.http.post(url, json={"input": "hi", "background": True})).json()
        await engine.http.delete(f"{url}/{queued['id']}")
        await asyncio.sleep(0.01)
        assert not engine._client._unfinished
        assert (await engine.http.get(f"{url}/{queued['id']}")).status_code == 404

    play(scene())


def test_an_idempotency_key_has_one_background(engines: dict[str, Engine], play: Scene[None]) -> None:
    engine = engines["plain"]

    async def scene() -> None:
        headers = {"idempotency-key": "one"}
        body = {"input": "hi", "background": True}
        first, second = [(await engine.http.post("/v1/responses", json=body, headers=headers)).json() for _ in range(2)]
        assert first == second
        await engine.say("Hello")
        streams = []
        saying = asyncio.create_task(engine.say("Hello"))
        for _ in range(2):
            answer = await engine.http.post(
                "/v1/responses", json=body | {"stream": True}, headers={"idempotency-key": "two"}
            )
            streams.append(answer.text)
        await saying
        assert streams[0] == streams[1] and "response.completed" in streams[0]

    play(scene())


def test_a_failure_is_an_event_and_the_state(engines: dict[str, Engine], play: Scene[None]) -> None:
    engine = engines["plain"]

    async def scene() -> None:
        whole, streamed = {"input": "hi"}, {"input": "hi", "stream": True}
        saying = asyncio.create_task(engine.say("Hello you", fails=True))
        answer = await engine.http.post("/v1/responses", json=whole)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_error"
        await saying
        saying = asyncio.create_task(engine.say("Hello you", fails=True))
        *_, error, failed = events_of((await engine.http.post("/v1/responses", json=streamed)).text)
        await saying
        assert (error.type, error.code, failed.type) == ("error", "engine_error", "response.failed")
        assert failed.response.status == "failed" and failed.response.error.code == "server_error"
        assert "out of luck" in failed.response.error.message
        assert failed.response.output[0].status == "incomplete"

    play(scene())


def test_who_leaves_before_the_first_token_leaves_nothing(engines: dict[str, Engine], play: Scene[None]) -> None:
    engine = engines["plain"]

    async def scene() -> None:
        (route,) = responses_router(engine.service).routes
        response = await route.endpoint(request({"input": "hi", "stream": True}))  # type: ignore[attr-defined]
        sent: asyncio.Queue[Any] = asyncio.Queue()
        leaving = asyncio.get_running_loop().create_future()
        answering = asyncio.create_task(response({"type": "http"}, lambda: leaving, sent.put))
        assert (await sent.get())["type"] == "http.response.start"
        assert b"response.created" in (await sent.get())["body"]
        assert engine._client._unfinished
        leaving.set_result({"type": "http.disconnect"})
        await answering
        assert not engine._client._unfinished

    play(scene())


def test_the_oldest_responses_give_way(
    engines: dict[str, Engine], play: Scene[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["plain"]

    async def scene() -> None:
        kept = engine.service.responses
        for limits in ({"MAX_RESPONSES": 3}, {"MAX_BYTES": 3 * 3800}):
            with monkeypatch.context() as patch:
                for name, most in limits.items():
                    patch.setattr(store, name, most)
                running = (await engine.http.post("/v1/responses", json={"input": "hi", "background": True})).json()
                await engine.http.post(f"/v1/responses/{running['id']}/cancel")
                made = [(await engine.post("Hello")).json()["id"] for _ in range(4)]
                assert made[-1] in kept._kept and made[0] not in kept._kept and running["id"] not in kept._kept
                assert kept._num_bytes == sum(one.size for one in kept._kept.values())

    play(scene())


def test_others_do_not_find_it(engines: dict[str, Engine], play: Scene[None]) -> None:
    engine = Engine(Path(engines["plain"].service.settings.model), api_keys=["one", "two"])

    async def scene() -> None:
        mine, others = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        saying = asyncio.create_task(engine.say("Hello"))
        first = (await engine.http.post("/v1/responses", json={"input": "hi"}, headers=mine)).json()
        await saying
        url = f"/v1/responses/{first['id']}"
        assert (await engine.http.get(url, headers=mine)).status_code == 200
        assert (await engine.http.get(url, headers=others)).status_code == 404
        assert (await engine.http.get(url)).status_code == 401
        reference = {"input": [{"type": "item_reference", "id": first["output"][0]["id"]}]}
        refused = await engine.http.post("/v1/responses", json=reference, headers=others)
        assert refused.status_code == 404 and refused.json()["error"]["param"] == "input"
        await engine.close()

    play(scene())


def test_the_beginning_is_dropped_where_truncation_is_auto(engines: dict[str, Engine], play: Scene[None]) -> None:
    engine = engines["plain"]

    async def scene() -> None:
        said = [
            one
            for number in range(9)
            for one in ({"role": "user", "content": f"{number}" * 999}, {"role": "assistant", "content": "Yes."})
        ]
        body = {"input": [*said, {"role": "user", "content": "Sure?"}], "instructions": "Be brief."}
        refused = await engine.post("", **body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        await engine.ask("Yes.", truncation="auto", **body)
        assert engine.prompt.startswith("<system>Be brief.\n<user>2") and engine.prompt.endswith("<user>Sure?\n")
        await engine.ask("Yes.", truncation="auto", max_output_tokens=5000, **body)
        assert engine.prompt.startswith("<system>Be brief.\n<user>6")
        counted = await engine.http.post("/v1/responses/input_tokens", json={"input": "hi"})
        assert counted.json() == {"input_tokens": len("<user>hi\n"), "object": "response.input_tokens"}

    play(scene())


def text_format(**fields: Any) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}} | fields}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search' is not supported"),
        ({"tools": [{"type": "custom", "name": "a"}]}, "tools", "'custom' is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "tools[1]"),
        ({"tools": [WEATHER | {"parameters": {"type": "array"}}]}, "tools", "tools[0].parameters"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice", "'b'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "tool_choice.name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "tool_choice.type"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "needs mode and tools"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "prompt"),
        ({"conversation": "conv_1"}, "conversation", "conversation"),
        ({"background": True, "store": False}, "background", "store"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream is true"),
        ({"include": ["everything"]}, "include", "include[0]"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs include to name 'message.output_text.logprobs'"),
        ({"max_output_tokens": 0}, "max_output_tokens", ">= 1"),
        ({"max_output_tokens": 9000}, "max_output_tokens", "max_output_tokens can be at most"),
        ({"input": []}, "input", "no message"),
        ({"input": [{"type": "message", "role": "user"}]}, "input", "input[0]"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input", "call_id and name"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": ""}]}, "input", "input[0].call_id"),
        ({"input": [{"type": "item_reference"}]}, "input", "needs id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "input[0].id"),
        ({"input": [{"type": "computer_call"}]}, "input", "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input[0].content[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "resp_1"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "text.format"),
        (text_format(schema={"type": "fish"}), "text", "text.format"),
        ({"reasoning": {"effort": "vast"}}, "reasoning", "reasoning.effort"),
        ({"seed": "x"}, "seed", "seed"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "metadata"),
    ],
    ids=str,
)
def test_what_is_refused(
    engines: dict[str, Engine], play: Scene[httpx.Response], body: dict[str, Any], param: str, words: str
) -> None:
    refused = play(engines["calls"].http.post("/v1/responses", json={"input": "hi"} | body))
    error = refused.json()["error"]
    assert refused.status_code in (400, 404) and error["param"] == param and words in error["message"]
    assert len(error["message"]) <= 300 and "response_format" not in error["message"]


def test_null_is_unset(engines: dict[str, Engine], play: Scene[Response]) -> None:
    nulls = set(ResponsesBody.__struct_fields__) - {"input", "stream"}
    answer = play(engines["plain"].ask("Hello", **dict.fromkeys(nulls)))
    assert answer.output_text == "Hello"
