"""Texts that keep to grammars: what every field takes, and that nothing else changes them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import SamplingParams as EngineParams
from shoal.scheduler.request import Request
from shoal.server import constraints
from shoal.server.constraints import make_grammar
from shoal.server.engine.build import build_engine
from shoal.server.llm import LLM, Output, SamplingParams
from shoal.server.settings import resolve
from shoal.server.wire.parsing import read_body
from shoal.server.wire.requests import CompletionBody
from tests.e2e.checkpoints import cycle_checkpoint
from tests.examples import examples
from tests.schemas import random_schema

NUM_SCHEMAS = examples(300)
FOLDER = object()  # stands for the checkpoint in parameters
HOW: dict[str, Any] = {"num_blocks": 512, "threads": 1, "max_num_waiting": 1024}
PROMPTS = ["Z", "the cat", "def add(a, b): return", "数é👍"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cycle_checkpoint(tmp_path_factory.mktemp("checkpoints") / "cycle")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **HOW, max_num_seqs=32, method="off") as one:
        yield one


def params(seed: int, **fields: Any) -> SamplingParams:
    """Options in turns, so that each meets grammars of every kind."""
    options: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "frequency_penalty": 0.5, "top_k": 40},
        {"temperature": 0.8, "logprobs": 2, "min_tokens": 5},
        {"temperature": 2.0, "repetition_penalty": 1.3, "logit_bias": {"70": 3.0}},
    ]
    return SamplingParams(max_tokens=300, seed=seed, **options[seed % len(options)], **fields)


def whole(output: Output) -> tuple[Any, ...]:
    """All but the log-probabilities' rounding, which is part of it: they are the same bits."""
    return output.text, output.token_ids, output.finish_reason, output.scored


@pytest.fixture(scope="module")
def texts(llm: LLM) -> list[Output]:
    """What many schemas gave, 32 at once, without drafts."""
    return llm.generate(*asked(range(NUM_SCHEMAS)))


def asked(seeds: range) -> tuple[list[Any], list[SamplingParams]]:
    prompts: list[Any] = [PROMPTS[seed % len(PROMPTS)] for seed in seeds]
    return prompts, [params(seed, structured_outputs={"json": random_schema(seed)}) for seed in seeds]


def test_texts_are_what_their_schemas_allow(texts: list[Output]) -> None:
    for seed, output in enumerate(texts):
        if output.finish_reason == "length":  # a list whose rest is a list
            continue
        jsonschema.Draft202012Validator(random_schema(seed)).validate(json.loads(output.text))
    assert sum(output.finish_reason == "stop" for output in texts) > 0.97 * NUM_SCHEMAS
    assert len({output.text for output in texts}) > NUM_SCHEMAS / 2


@pytest.mark.parametrize(
    "how",
    [
        {"method": "suffix", "max_num_seqs": 32},
        {"method": "self", "num_spec_tokens": 3, "max_num_seqs": 8},
        {"method": "draft", "draft_model": FOLDER, "num_spec_tokens": 4, "max_num_seqs": 1},
        {"method": "off", "max_num_seqs": 16, "num_blocks": 40, "max_model_len": 512, "max_num_batched_tokens": 48},
    ],
    ids=["suffix", "self", "draft", "preempted"],
)
def test_texts_do_not_depend_on_drafts_batch_or_preemption(
    how: dict[str, Any], folder: Path, texts: list[Output]
) -> None:
    how = {name: str(folder) if value is FOLDER else value for name, value in how.items()}
    num_schemas = NUM_SCHEMAS // 3 if how["max_num_seqs"] == 1 else NUM_SCHEMAS
    with LLM(str(folder), **HOW | how) as other:
        found = other.generate(*asked(range(num_schemas)))
    for seed, (output, expected) in enumerate(zip(found, texts[:num_schemas], strict=True)):
        assert whole(output) == whole(expected), f"seed {seed}"


def test_texts_of_the_torch_backend_do_not_depend_on_drafts_or_batch(folder: Path) -> None:
    found: list[list[Output]] = []
    for how in ({"method": "off", "max_num_seqs": 32}, {"method": "suffix", "max_num_seqs": 3}):
        with LLM(str(folder), **HOW, backend="torch", **how) as other:
            found.append(other.generate(*asked(range(NUM_SCHEMAS // 3))))
    for seed, (output, expected) in enumerate(zip(*found, strict=True)):
        assert whole(output) == whole(expected), f"seed {seed}"
        if output.finish_reason == "stop":
            jsonschema.Draft202012Validator(random_schema(seed)).validate(json.loads(output.text))


def test_a_text_alone_is_that_of_a_batch(llm: LLM, texts: list[Output]) -> None:
    for seed in range(0, NUM_SCHEMAS, 25):
        prompts, chosen = asked(range(seed, seed + 1))
        assert whole(llm.generate(prompts[0], chosen[0])[0]) == whole(texts[seed])


def test_a_stream_is_the_whole_text(llm: LLM, texts: list[Output]) -> None:
    for seed in range(0, NUM_SCHEMAS, 30):
        prompts, chosen = asked(range(seed, seed + 1))
        assert "".join(delta.text for delta in llm.stream(prompts[0], chosen[0])) == texts[seed].text


def test_a_text_goes_on_in_another_engine(folder: Path) -> None:
    """An engine that gets a request with some of its tokens chooses the others as the first one did."""
    engine = build_engine(resolve({"model": str(folder), "engine": {"threads": 1}, "cache": {"num_blocks": 128}}))
    prompt = [90, 5, 6]

    def generate(seed: int, known: list[int]) -> list[int]:
        grammar = make_grammar("json", json.dumps(random_schema(seed)))
        chosen = EngineParams(
            max_tokens=200, seed=seed, grammar=grammar, stop_token_ids=frozenset([1]), frequency_penalty=0.3
        )
        request = Request("a", prompt, chosen, 0.0, known)
        engine.core.scheduler.add(request)
        while engine.core.scheduler.num_unfinished:
            engine.core.step()
        return request.token_ids[len(prompt) :]

    for seed in range(0, NUM_SCHEMAS, 23):
        expected = generate(seed, [])
        for num_known in {1, len(expected) // 2, len(expected) - 1}:
            assert generate(seed, expected[:num_known]) == expected


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
CITIES = r'\{"city": "(Oslo|Rome)"\}'


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "text"}}, r"[\s\S]*"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}}, CITIES),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": CITY, "strict": True}}}, CITIES),
        ({"response_format": {"type": "json_object", "schema": CITY}}, CITIES),
        ({"structured_outputs": {"json": json.dumps(CITY)}}, CITIES),
        ({"structured_outputs": {"json": CITY, "whitespace_pattern": ""}}, r'\{"city":"(Oslo|Rome)"\}'),
        ({"structured_outputs": {"json": CITY, "disable_any_whitespace": True}}, r'\{"city":"(Oslo|Rome)"\}'),
        (
            {"structured_outputs": {"json": CITY, "whitespace_pattern": "[ ]{2}"}},
            r'\{(  )?"city"(  )?:(  )?"(Oslo|Rome)"(  )?\}',
        ),
        ({"structured_outputs": {"regex": "[0-9]{2,3}é?"}}, "[0-9]{2,3}é?"),
        ({"structured_outputs": {"choice": ["yes", 'a "quoted" one', "größer\n"]}}, 'yes|a "quoted" one|größer\n'),
        ({"structured_outputs": {"grammar": 'start: "x" /[ab]{2}/ "y"'}}, "x[ab]{2}y"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9] ("y" | "z")'}}, "x[0-9][yz]"),
        ({"guided_json": CITY}, CITIES),
        ({"guided_regex": "a+b{2}c", "max_tokens": 400}, "a+b{2}c"),
        ({"guided_choice": ["one", "two"], "guided_decoding_backend": "xgrammar"}, "one|two"),
        ({"guided_grammar": 'start: "q"'}, "q"),
        ({"grammar": 'root ::= item item\nitem ::= "<" [a-c] ">"'}, "(<[a-c]>){2}"),
        ({"json_schema": CITY}, CITIES),
    ],
    ids=str,
)
def test_every_way_to_ask(llm: LLM, fields: dict[str, Any], pattern: str) -> None:
    fields = {"max_tokens": 100} | fields
    for seed in range(4):
        (output,) = llm.generate("Z", SamplingParams(seed=seed, **fields))
        assert re.fullmatch(pattern, output.text), output.text


def test_free_text_with_structural_tags(llm: LLM) -> None:
    structures = [{"begin": "<f>", "schema": CITY, "end": "</f>"}]
    tags = {"type": "structural_tag", "structures": structures, "triggers": ["<f"]}
    for fields in ({"response_format": tags}, {"structured_outputs": {"structural_tag": json.dumps(tags)}}):
        bias = {str(ord("<") + 2): 12.0, "1": -3.0}
        for seed in range(8):
            (output,) = llm.generate("Z", SamplingParams(seed=seed, max_tokens=150, logit_bias=bias, **fields))
            for found in re.findall(r"<f(.*?)(?:</f>|$)", output.text, re.DOTALL):
                assert re.fullmatch(rf">({CITIES})?|>?.*", found), output.text


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs.regex: "),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs", "structured_outputs.grammar: "),
        ({"grammar": "root ::= ("}, "grammar", "grammar: "),
        ({"grammar": 'start[max_tokens=3]: "a"'}, "grammar", "max_tokens cannot stand in a grammar"),
        ({"grammar": "start: <|nothing|>"}, "grammar", 'unknown special token: "<|nothing|>"'),
        ({"json_schema": {"type": "nonsense"}}, "json_schema", "json_schema: "),
        ({"json_schema": {"$ref": "http://other/place"}}, "json_schema", "json_schema: "),
        ({"json_schema": "{"}, "json_schema", "json_schema: "),
        ({"json_schema": False}, "json_schema", "json_schema: "),
        ({"response_format": {"type": "json_schema"}}, "response_format", "response_format.json_schema.schema"),
        ({"response_format": {"type": "yaml"}}, "response_format", "expected 'json_object' or "),
        ({"json_schema": CITY, "guided_json": CITY}, "json_schema", "json_schema: contradicts guided_json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
        (
            {"response_format": {"type": "structural_tag", "structures": [], "triggers": ["a"]}},
            "response_format",
            "response_format: ",
        ),
        (
            {"structured_outputs": {"structural_tag": {"structures": [{"begin": "b", "schema": {}, "end": ""}]}}},
            "structured_outputs",
            "structured_outputs.structural_tag: ",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_a_grammar_is_refused_by_name(
    llm: LLM, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate("Z", SamplingParams(**fields))
    assert caught.value.param == param
    assert message in caught.value.message
    assert len(caught.value.message) <= 300
    assert llm.generate("Z", SamplingParams(guided_choice=["still here"], max_tokens=50))[0].text == "still here"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"anyOf": [{"type": "array", "items": schema}, {"type": "integer"}]}
    return schema


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "(((((a{1,99}){1,99}){1,99}){1,99}){1,99})"}},
        {"structured_outputs": {"regex": "(a|aa|aaa)*" * 200 + "b"}},
        {"structured_outputs": {"regex": "(.*.*.*.*a){50}"}},
        {"json_schema": nested(100)},
        {"json_schema": {"type": "array", "minItems": 2**31, "items": {}}},
        {"json_schema": {"type": "string", "pattern": "^(x+x+)+y{1,1000}$"}},
        {"json_schema": {"enum": [f"{i}" * 20 for i in range(20_000)]}},
        {"json_schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
        {"grammar": "start: start start | start"},
        {"grammar": 'start: a\na: a "x" | b\nb: a b | "y"'},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_a_bomb_harms_nobody(llm: LLM, fields: dict[str, Any]) -> None:
    """It is refused, or its text goes on to its length, or ends with a typed error; others are answered."""
    began = time.monotonic()
    try:
        outputs = llm.generate("Z", SamplingParams(max_tokens=20, seed=1, **fields))
        assert outputs[0].finish_reason in ("length", "stop")
    except InvalidRequestError as error:
        assert len(error.message) <= 300
    assert time.monotonic() - began < 100, "a second as a rule; this machine may be busy"
    assert llm.generate("Z", SamplingParams(guided_choice=["still here"], max_tokens=50))[0].text == "still here"


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('start: "ab" x\nx: "c" x', "(ab?)?"),  # no text of any length is enough
        ("start: /[a-z]{3}/ X\nX: /[a-z]+/ & /[0-9]+/", "[a-z]{3}"),
    ],
)
def test_a_dead_end_is_a_fault_of_the_request(llm: LLM, grammar: str, text: str) -> None:
    asked = SamplingParams(guided_grammar=grammar, max_tokens=9, seed=1)
    with pytest.raises(InvalidRequestError, match="guided_grammar: no token may follow the text so far") as caught:
        llm.generate("Z", asked)
    assert caught.value.param == "guided_grammar"
    said: list[str] = []
    with pytest.raises(InvalidRequestError):
        said.extend(delta.text for delta in llm.stream("Z", asked))
    assert re.fullmatch(text, "".join(said))


def test_too_few_tokens_end_with_length(llm: LLM) -> None:
    (output,) = llm.generate("Z", SamplingParams(json_schema=CITY, max_tokens=4))
    assert output.finish_reason == "length"
    assert '{"city": "Oslo"} {"city": "Rome"}'.find(output.text) >= 0
    (output,) = llm.generate("Z", SamplingParams(guided_choice=["a"], max_tokens=50, min_tokens=20, ignore_eos=True))
    assert (output.text, output.finish_reason) == ("a", "stop")


def test_an_end_at_a_given_length_contradicts_a_grammar(llm: LLM) -> None:
    body = {"prompt": "Z", "end_after": 3, "grammar": 'start: "a"', "max_tokens": 5}
    with pytest.raises(InvalidRequestError, match="end_after and a grammar contradict"):
        llm._wait(llm._complete(read_body(CompletionBody, body)))


def test_what_grammars_need_is_made_when_nothing_is_to_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it holds up every stream, and the first token after a start."""
    monkeypatch.setattr(constraints, "IDLE_SECONDS", 0.0)
    happened: list[str] = []
    compiler = SimpleNamespace(prepare=lambda: happened.append("prepared"))
    idle = iter([False, False, True])

    def is_idle() -> bool:
        happened.append("asked")
        return next(idle)

    asyncio.run(constraints.Constraints(compiler).prepare(is_idle))  # type: ignore[arg-type]  # all that it asks of one
    assert happened == ["asked", "asked", "asked", "prepared"]
