"""What the client takes and gives.

A completion and a chat answer are the same thing once they have arrived, text and why it ended, so they share
their types; only the requests differ.  Responses and messages are in `conversations.py`, files and batches in
`batches.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    content: str | Sequence[Mapping[str, Any]] | None
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


class CallOptions(TypedDict, total=False):
    """Optional fields of every request that the engine serves.  What is not given is left to the server.

    The second group tells the scheduling policy who sends the request and how urgent it is; it changes when tokens
    come, and never which.  `timeout` is the seconds in which the server must have finished.  Prefixes are found in its
    cache by requests with the same `cache_salt` only.
    """

    model: str

    user: str
    priority: int
    ttft_slo_ms: float
    tpot_slo_ms: float

    timeout: float
    cache_salt: str


class EmbeddingOptions(CallOptions, total=False):
    """Optional fields of a request for vectors; `dimensions` is how many numbers each of them has.

    With `truncate_prompt_tokens` only so many of an input's first tokens are read; -1 is as many as the context holds.
    """

    dimensions: int
    truncate_prompt_tokens: int


class TokenOptions(CallOptions, total=False):
    """Optional fields that say which tokens are generated, and where a text ends.

    The second group are extensions of OpenAI's API, under the names that vLLM gave them; `logprob_token_ids` are tokens
    that are reported wherever log-probabilities are.  The third group says what the text shows, and what the prompt is
    made of; of a prompt that is too long `truncate_prompt_tokens` are kept, the last.  The fourth group has the text
    keep to a grammar, in the words of vLLM and of llama.cpp; `response_format`, a parameter of its own, does it in
    OpenAI's.

    `request_id` stands in the answer.  `speculation` "off" turns drafted tokens off for the request; the text stays the
    same.  `end_after` is for load tests: the output has exactly that number of tokens.  `timing` and `receipt` have the
    answer tell how it was served, and how to have it again.
    """

    temperature: float
    top_p: float
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
    allowed_token_ids: list[int]
    bad_words: list[str]
    logprob_token_ids: list[int]

    skip_special_tokens: bool
    include_stop_str_in_output: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int

    structured_outputs: StructuredOutputs
    grammar: str
    json_schema: dict[str, Any] | str

    request_id: str
    speculation: str
    end_after: int
    timing: bool
    receipt: bool
    stream_interval: int


class TemplateOptions(TypedDict, total=False):
    """What a conversation is rendered with; with `parse_special` messages may spell special tokens."""

    chat_template: str
    chat_template_kwargs: dict[str, Any]
    documents: list[dict[str, Any]]
    parse_special: bool


class SamplingOptions(TokenOptions, total=False):
    """Optional fields of both kinds of completion.

    `prompt_logprobs` is the number of alternatives to report for each token of the prompt.  `return_token_ids` has
    choices tell the tokens beside the text, and `return_tokens_as_token_ids` names them by their ids in
    log-probabilities.
    """

    max_tokens: int
    n: int

    prompt_logprobs: int
    return_token_ids: bool
    return_tokens_as_token_ids: bool


class CompletionOptions(SamplingOptions, total=False):
    """Optional fields of a completion request; `logprobs` is the number of alternatives to report for each token.

    `suffix` is what follows the text, where the model can fill in the middle.
    """

    echo: bool
    logprobs: int
    suffix: str


class ChatOptions(SamplingOptions, TemplateOptions, total=False):
    """Optional fields of a chat request; `top_logprobs` is the number of alternatives to report for each token.

    Tools are functions with type hints, whose docstrings say what they do, or objects as in OpenAI's API.  With
    `continue_final_message`, and `add_generation_prompt` false, the answer goes on with the last message, which `echo`
    has it begin with.  `include_reasoning` false leaves thoughts out.
    """

    logprobs: bool
    top_logprobs: int

    tools: Sequence[Tool]
    tool_choice: ToolChoice
    parallel_tool_calls: bool

    reasoning_effort: str
    include_reasoning: bool
    add_generation_prompt: bool
    continue_final_message: bool
    echo: bool


class TokenizationOptions(TypedDict, total=False):
    """Optional fields of a request for tokens; `return_token_strs` has them told as the vocabulary writes them, too."""

    model: str
    tools: Sequence[Tool]
    chat_template: str
    chat_template_kwargs: dict[str, Any]
    parse_special: bool
    add_special_tokens: bool
    add_generation_prompt: bool
    continue_final_message: bool
    return_token_strs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the headers of an answer tell.

    Attributes:
        request_id: by which the server's log knows the request.
        ignored_fields: of the request, which the server does not know.
    """

    request_id: str | None = None
    ignored_fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained(Answer):
    """What an answer tells at its end.

    Attributes:
        timing: how each choice was served, if the request asked.
        receipt: how to have the answer again, if the request asked.
    """

    timing: tuple[Timing, ...] | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used.

    Attributes:
        num_cached_tokens: of the prompt's, those found in the prefix cache.
        num_accepted_tokens, num_rejected_tokens: drafted tokens that verification kept, and not.
        num_reasoning_tokens: of the output's, those of thoughts.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    num_reasoning_tokens: int = 0


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


class PromptLogprob(TypedDict):
    """Natural log-probability of a token in a place of the prompt; the most probable one has `rank` 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = tuple[dict[int, PromptLogprob] | None, ...]
"""For each token of the prompt, by token id; None for the first."""


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
        return Message(role="tool", tool_call_id=self.id, content=self._written(value))

    def result_item(self, value: object) -> dict[str, Any]:
        """`result` as an item of the input of `respond`."""
        return {"type": "function_call_output", "call_id": self.id, "output": self._written(value)}

    def result_block(self, value: object) -> dict[str, Any]:
        """`result` as a block of a message of the user, for `message`."""
        return {"type": "tool_result", "tool_use_id": self.id, "content": self._written(value)}

    def _written(self, value: object) -> str:
        try:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise UnsendableError(f"the result of {self.name} cannot be written as JSON: {error}") from error


@dataclass(frozen=True)
class Choice(Generic[Parsed]):
    """One generated text; with `n` or several prompts there are several.

    Attributes:
        tool_calls: what the model wants to be called; `text` is often empty then.
        reasoning: what the model thought before it answered, if the server tells it apart from the text.
        token_ids, prompt_token_ids, prompt_logprobs: if the request asked for them.
        response_format: what the request asked for.
    """

    index: int
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: PromptLogprobs | None = None
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
class Completion(Explained, Generic[Parsed]):
    """A whole answer.  What belongs to a choice is that of the first choice here.

    Attributes:
        created: seconds since the epoch.
        seed: what the server sampled with, if it tells; sent with the same request, it gives the same answer.
        system_fingerprint: of the model that answered, if the server tells.
    """

    id: str
    created: int
    model: str
    choices: tuple[Choice[Parsed], ...]
    usage: Usage
    seed: int | None = None
    system_fingerprint: str | None = None

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

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        return self.choices[0].token_ids

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        return self.choices[0].prompt_token_ids

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        return self.choices[0].prompt_logprobs


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
    """What one choice gained; `finish_reason` is set in its last delta.

    Attributes:
        prompt_token_ids: in its first delta, if the request asked; in a chat in that of the first choice alone.
    """

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning: str = ""
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chunk(Explained):
    """One event of a streamed answer; the last has the `usage` and no choices, and what `timing` and `receipt` ask for.

    What belongs to a choice is joined here; in a stream of several choices, look at each delta's `index` instead.
    """

    id: str
    created: int
    model: str
    choices: tuple[ChoiceDelta, ...]
    usage: Usage | None = None
    seed: int | None = None
    system_fingerprint: str | None = None

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
class Capabilities:
    """What a model can be asked for; `fill_in_middle` is `suffix` of a completion."""

    chat: bool
    tools: bool
    reasoning: bool
    fill_in_middle: bool
    embeddings: bool
    completions: bool
    structured_output: bool


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server serves; other servers than Shoal may not tell its `capabilities`."""

    id: str
    created: int
    max_model_len: int | None = None
    capabilities: Capabilities | None = None


@dataclass(frozen=True, slots=True)
class Tokenization(Answer):
    """Token ids of a text or conversation, and the most that a request may have (`max_model_len`)."""

    token_ids: tuple[int, ...]
    max_model_len: int
    token_strs: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Embeddings(Answer):
    """Vectors of length 1, in the order of the inputs."""

    model: str
    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server computes with (docs/api.md).

    Attributes:
        limits: what its scheduler keeps to, such as `max_num_seqs`.
        settings: by section, as in `shoal.toml`.
        engines: of each its name in metrics, whether it is ready, its process and the number of its requests.
        cluster: the engines and API processes of a cluster.
    """

    version: str
    model: str
    num_parameters: int
    backend: str
    warning: str | None
    kv_cache_bytes: int
    limits: dict[str, Any]
    settings: dict[str, Any]
    engines: list[dict[str, Any]] = field(default_factory=list)
    cluster: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The tokenizer, with the names that `tokenizer_config.json` has.

    Attributes:
        added_tokens_decoder: special tokens by id, which is written as a text.
        chat_templates: by name; `chat_template` is the usual one.
    """

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    is_byte_level: bool
    special_tokens: dict[str, Any]
    added_tokens_decoder: dict[str, dict[str, Any]]
    chat_template: str | None
    chat_templates: dict[str, str]
