"""The engine in process: its answers, its streams, and its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.scheduler.errors import CheckpointError, ConfigError, ContextLengthError, EngineError, InvalidRequestError
from shoal.server.errors import EngineUnavailableError
from shoal.server.llm import LLM, SamplingParams
from tests.e2e.checkpoints import cycle_checkpoint, cycle_text

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cycle_checkpoint(tmp_path_factory.mktemp("checkpoints") / "cycle")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), num_blocks=512, threads=1, max_num_seqs=2, max_num_waiting=1) as one:
        yield one


def test_prompts_are_completed_in_order(llm: LLM) -> None:
    """More of them than the queue takes at once; texts and token ids."""
    by_tokens = llm.generate("a", GREEDY)[0].token_ids[:1]
    outputs = llm.generate(["Z", by_tokens, "Z", "Z", "Z", "Z"], GREEDY)
    assert [output.text for output in outputs] == [cycle_text(12), outputs[1].text, *[cycle_text(12)] * 4]
    assert outputs[0].finish_reason == "length"
    assert len(outputs[0].token_ids) == 12


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    first, second = llm.generate(["Z", "Z"], [GREEDY, SamplingParams(temperature=0, max_tokens=99, stop="é")])
    assert first.text == cycle_text(12)
    assert (second.text, second.finish_reason) == (cycle_text(99).partition("é")[0], "stop")


def test_choices_and_their_seed(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, n=2, logprobs=1)
    outputs = llm.generate("Z", params)
    assert [output.index for output in outputs] == [0, 1]
    assert [len(output.scored) for output in outputs] == [len(output.token_ids) for output in outputs]
    again = llm.generate("Z", SamplingParams(max_tokens=8, n=2, seed=outputs[0].seed))
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs]


def test_a_chat(llm: LLM) -> None:
    (output,) = llm.chat([{"role": "user", "content": "Z"}], SamplingParams(max_tokens=3, temperature=0))
    assert output.prompt == "<user>Z\n<assistant>"
    assert len(output.token_ids) == 3


def test_texts_that_keep_to_a_grammar(llm: LLM) -> None:
    choice = SamplingParams(structured_outputs={"choice": ["yes", "no"]})  # type: ignore[arg-type]
    assert {output.text for output in llm.generate(["Z", "Z"], choice)} <= {"yes", "no"}
    schema = {"type": "array", "items": {"const": 7}, "minItems": 2, "maxItems": 2}
    asked: Any = {"type": "json_schema", "json_schema": {"schema": schema}}
    (answer,) = llm.chat([{"role": "user", "content": "Z"}], SamplingParams(response_format=asked, max_tokens=40))
    assert (answer.text, answer.finish_reason) == ("[7, 7]", "stop")
    assert "".join(delta.text for delta in llm.stream("Z", SamplingParams(grammar='start: "ab" "c"'))) == "abc"


def test_vectors_come_in_order_and_are_those_of_each_input_alone(llm: LLM) -> None:
    """More of them than the queue takes at once; texts and token ids."""
    texts = [f"{i} cats" for i in range(9)]
    found = llm.embed(texts)
    assert [llm.embed(text) for text in texts] == [[vector] for vector in found]
    assert llm.embed([llm._service.tokenizer.encode(text) for text in texts]) == found
    assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-6) for vector in found)
    assert [len(vector) for vector in llm.embed("Z", dimensions=2)] == [2]
    assert llm.embed([]) == []
    with pytest.raises(InvalidRequestError, match=r"input\[1\] is empty"):
        llm.embed(["Z", ""])


def test_a_stream_gives_the_text_piece_by_piece(llm: LLM) -> None:
    deltas = list(llm.stream("Z", GREEDY))
    assert "".join(delta.text for delta in deltas) == cycle_text(12)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == llm.generate("Z", GREEDY)[0].token_ids
    assert [delta.finish_reason for delta in deltas][-1] == "length"


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("Z", SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm._service.engine.journals()
    assert llm.generate("Z", GREEDY)[0].text == cycle_text(12)


def test_it_can_be_awaited(llm: LLM) -> None:
    async def scene() -> None:
        whole, streamed = await asyncio.gather(llm.agenerate(["Z", "Z"], GREEDY), collect())
        assert [output.text for output in whole] == [cycle_text(12)] * 2
        assert streamed == cycle_text(12)

    async def collect() -> str:
        return "".join([delta.text async for delta in llm.astream("Z", GREEDY)])

    asyncio.run(scene())


def test_many_threads_may_use_it(llm: LLM) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(llm.generate("Z", GREEDY)[0].text)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [cycle_text(12)] * 3


def test_what_is_wrong_is_named(llm: LLM, folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="temperature: ") as caught:
        SamplingParams(temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(TypeError, match="tempature"):
        SamplingParams(tempature=1)
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        llm.generate("")
    with pytest.raises(InvalidRequestError, match="2 prompts were given, but 1 params"):
        llm.generate(["Z", "Z"], [GREEDY])
    with pytest.raises(ContextLengthError, match="max_tokens"):
        llm.generate("Z", SamplingParams(max_tokens=100_000))
    with pytest.raises(ConfigError, match="max_num_seq: unknown setting"):
        LLM(str(folder), max_num_seq=1)
    with pytest.raises(ConfigError, match="num_blocks must be at least 1"):
        LLM(str(folder), num_blocks=0)
    with pytest.raises(CheckpointError, match="neither a checkpoint folder"):
        LLM("nowhere")


def test_after_its_end_it_refuses(folder: Path) -> None:
    llm = LLM(str(folder), num_blocks=64, threads=1)
    llm.close()
    llm.close()
    with pytest.raises(EngineUnavailableError):
        llm.generate("Z")
    assert not llm._thread.is_alive()


def test_an_engine_that_fails_ends_what_waits_for_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LLM(str(folder), num_blocks=64, threads=1) as llm:
        llm._engine.receive = lambda seconds: 1 / 0  # type: ignore[assignment, return-value, method-assign]
        with pytest.raises(EngineError, match="the engine failed: division by zero"):
            llm.generate("Z", GREEDY)
    assert "the engine failed" in caplog.text
