"""What the client takes and gives.

A completion and a chat answer are the same thing once they have arrived, text and why it ended, so they share
their types; only the requests differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Required, TypedDict, TypeVar

from shoal.clients.errors import ParseError, UnsendableError
from shoal.clients.formats import ResponseFormat, read_text
from shoal.clients.tools import Tool, ToolChoice

Parsed = TypeVar("Parsed")

Prompt = str | list[str] | list[int] | list[list[int]]
"""Text, token ids, or several of either."""


class Message(TypedDict, total=False):
    """One turn of a conversation; `role` is "system", "user", "assistant" or "tool".

    `Choice.message` makes those of the assistant, and `ToolCall.result` those of tools.
    """

    role: Required[str]
    content: str | list[dict[str, Any]] | None
    name: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    reasoning_content: str


class StructuredOutputs(TypedDict, total=False):
    """vLLM's way to ask for a text that keeps to a grammar: one of the first six fields."""

    json: dict[str, Any] | str
    json_object: bool
    regex: str
    choice: list[str]
    grammar: str
    structural_tag: dict[str, Any] | str

    whitespace_pattern: str
    disable_any_whitespace: bool


class SamplingOptions(TypedDict, total=False):
    """Optional fields of every generation request.  What is not given is left to the server.

    The second group are extensions of OpenAI's API, under the names that vLLM gave them.  The third group has the text
    keep to a grammar, in the words of vLLM and of llama.cpp; `response_format`, a parameter of its own, does it in
    OpenAI's.  The fourth group tells the scheduling policy who sends the request and how urgent it is; it changes when
    tokens come, and never which.
    `speculation` "off" turns drafted tokens off for the request; the text stays the same.  `end_after` is for load
    tests: the output has exactly that number of tokens.  `timing` and `receipt` have the answer tell how it was served,
    and how to have it again.
    """

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    seed: int
    stop: str | list[str]
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]

    top_k: int
    min_p: float
    top_n_sigma: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    min_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprob_token_ids: list[int]

    structured_outputs: StructuredOutputs
    grammar: str
    json_schema: dict[str, Any] | str

    user: str
    priority: int
    ttft_slo_ms: float
    tpot_slo_ms: float

    speculation: str

    end_after: int

    timing: bool
    receipt: bool


class CompletionOptions(SamplingOptions, total=False):
    """Optional fields of a completion request; `logprobs` is the number of alternatives to report for each token."""

    echo: bool
    logprobs: int


class ChatOptions(SamplingOptions, total=False):
    """Optional fields of a chat request; `top_logprobs` is the number of alternatives to report for each token.

    Tools are functions with type hints, whose docstrings say what they do, or objects as in OpenAI's API.
    """

    logprobs: bool
    top_logprobs: int

    tools: Sequence[Tool]
    tool_choice: ToolChoice
    parallel_tool_calls: bool

    reasoning_effort: str
    chat_template_kwargs: dict[str, Any]


class EmbeddingOptions(TypedDict, total=False):
    """Optional fields of a request for vectors; `dimensions` is how many numbers each of them has.

    With `truncate_prompt_tokens` only so many of an input's first tokens are read; -1 is as many as the context holds.
    """

    model: str
    dimensions: int
    truncate_prompt_tokens: int

    user: str
    priority: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used.

    Attributes:
        num_cached_tokens: of the prompt's, those found in the prefix cache.
        num_accepted_tokens, num_rejected_tokens: drafted tokens that verification kept, and not.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0


class Timing(TypedDict):
    """How one choice was served, in milliseconds from its arrival at the server to the end of its last step.

    The figures are described in docs/explain.md.
    """

    request_id: str
    total_ms: float
    queued_ms: float
    prefill_ms: float
    decode_ms: float
    preempted_ms: float
    other_ms: float
    num_cached_tokens: int
    num_output_tokens: int
    num_prefill_chunks: int
    prefill_chunks: list[dict[str, Any]]
    num_decode_steps: int
    median_decode_ms: float | None
    longest_decode_ms: float | None
    mean_batch: float
    max_batch: int
    num_companions: int
    companions: list[dict[str, Any]]
    num_preemptions: int
    preemptions: list[dict[str, Any]]
    num_drafted_tokens: int
    num_accepted_tokens: int


class Receipt(TypedDict):
    """What `shoal replay` needs to have an answer again, token for token."""

    version: int
    server: str
    endpoint: str
    model: dict[str, Any]
    request: dict[str, Any]
    sampling: dict[str, Any]
    prompts: list[list[int]]
    outputs: list[dict[str, Any]]
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token; None for the first token of an echoed prompt.

    Attributes:
        top: the most probable tokens in its place with their log-probabilities, best first.
    """

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to be called.

    Attributes:
        arguments_json: as the model wrote them.
    """

    id: str
    name: str
    arguments_json: str

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by their names.

        Raises:
            ParseError: they are no object, as when `max_tokens` cut them off.
        """
        try:
            arguments = json.loads(self.arguments_json or "{}")
        except ValueError as error:
            raise ParseError(f"the arguments of {self.name} are not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise ParseError(f"the arguments of {self.name} are no object: {self.arguments_json}")
        return arguments

    def result(self, value: object) -> Message:
        """The message with which a conversation goes on after the call: a text, or anything else as JSON.

        Raises:
            UnsendableError: the value cannot be written as JSON.
        """
        try:
            content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise UnsendableError(f"the result of {self.name} cannot be written as JSON: {error}") from error
        return Message(role="tool", tool_call_id=self.id, content=content)


@dataclass(frozen=True)
class Choice(Generic[Parsed]):
    """One generated text; with `n` or several prompts there are several.

    Attributes:
        tool_calls: what the model wants to be called; `text` is often empty then.
        reasoning: what the model thought before it answered, if the server tells it apart from the text.
        response_format: what the request asked for.
    """

    index: int
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    response_format: ResponseFormat | None = field(default=None, repr=False, compare=False)

    @cached_property
    def parsed(self) -> Parsed:
        """What the text stands for: an object of the class that `response_format` was, or decoded JSON, else None.

        Raises:
            ParseError: the text is not what was asked for, as when `max_tokens` cut it off.
        """
        parsed: Parsed = read_text(self.text, self.response_format)
        return parsed

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation that goes on."""
        message = Message(role="assistant", content=self.text)
        if self.tool_calls:
            message["content"] = self.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
                for call in self.tool_calls
            ]
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message


@dataclass(frozen=True, slots=True)
class Completion(Generic[Parsed]):
    """A whole answer.  What belongs to a choice is that of the first choice here.

    Attributes:
        created: seconds since the epoch.
        seed: what the server sampled with, if it tells; sent with the same request, it gives the same answer.
        timing: how each choice was served, if the request asked.
        receipt: how to have the answer again, if the request asked.
    """

    id: str
    created: int
    model: str
    choices: tuple[Choice[Parsed], ...]
    usage: Usage
    seed: int | None = None
    timing: tuple[Timing, ...] | None = None
    receipt: Receipt | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def parsed(self) -> Parsed:
        return self.choices[0].parsed

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def message(self) -> Message:
        return self.choices[0].message


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What one call of a tool gained: its id and name come first, then its arguments in pieces.

    Attributes:
        index: of the call among those of its choice.
        arguments_json: the next piece of them.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments_json: str = ""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice gained; `finish_reason` is set in its last delta."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a streamed answer; the last has the `usage` and no choices, and what `timing` and `receipt` ask for.

    What belongs to a choice is joined here; in a stream of several choices, look at each delta's `index` instead.
    """

    id: str
    created: int
    model: str
    choices: tuple[ChoiceDelta, ...]
    usage: Usage | None = None
    seed: int | None = None
    timing: tuple[Timing, ...] | None = None
    receipt: Receipt | None = None

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(delta.text for delta in self.choices)

    @property
    def reasoning(self) -> str:
        """The new part of what the model thinks before it answers."""
        return "".join(delta.reasoning for delta in self.choices)

    @property
    def tool_calls(self) -> tuple[ToolCallDelta, ...]:
        """The new parts of calls."""
        return tuple(call for delta in self.choices for call in delta.tool_calls)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server serves."""

    id: str
    created: int
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Token ids of a text or conversation, and the most that a request may have (`max_model_len`)."""

    token_ids: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of length 1, in the order of the inputs."""

    model: str
    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
