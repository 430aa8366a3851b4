"""Request bodies, as OpenAI's API defines them, with the extensions that vLLM's users know.

What is not listed is refused by name: a misspelt parameter would otherwise be ignored in silence.  Parameters of
OpenAI's API that cannot change the tokens (`metadata`, `store`, ...) are accepted and ignored; those that would ask
for what this server does not do are refused unless they ask for nothing.

Reading stops at the first fault, so that a body of a million faults costs no more than one.  Every number has a range
that the engine's types can hold.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, field

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body
from shoal.server.wire.constraints import ConstrainedBody
from shoal.server.wire.conversations import (
    ChosenTools,
    Messages,
    Tool,
    ToolChoice,
    ToolMode,
    Tools,
    Variables,
    check_tools,
    check_variables,
)

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGPROBS = 20
MAX_SALT_CHARS = 256
MAX_TOKENIZED_CHARS = 2_097_152
MAX_PRIORITY = 1000
MAX_SLO_MS = 3_600_000
MAX_TIMEOUT_SECONDS = 86_400
MAX_ENTRIES = 1024  # of `logit_bias` and `stop_token_ids`
MAX_INT = 2**31 - 1  # the engine's integers have 32 bits
MAX_SEED = 2**64 - 1
# How often a body may have a byte, its texts included, for it would take long to read: lists of more tokens than any
# context holds, more lists or more fields than any request has.
MAX_BYTES = {b",": 400_000, b"[": 50_000, b":": 50_000}

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_INT)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Milliseconds = Annotated[float, Meta(gt=0, le=MAX_SLO_MS)]
Seconds = Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_SECONDS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # accepted and ignored: no event is padded


class SamplingBody(ConstrainedBody):
    """How tokens are chosen, and where a text ends."""

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_ENTRIES)] | None = (
        None
    )
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None

    # extensions
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None  # vLLM's users write -1 for all
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    min_tokens: Count = 0
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ENTRIES)] = field(default_factory=list)
    ignore_eos: bool = False

    def check(self) -> None:
        if self.seed is not None and self.seed > MAX_SEED:
            raise InvalidRequestError(f"seed: expected an integer <= {MAX_SEED}", param="seed")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class GenerationBody(SamplingBody):
    """What both kinds of completion have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    # for the scheduling policy: they change when tokens come, and not which
    user: str | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    ttft_slo_ms: Milliseconds | None = None
    tpot_slo_ms: Milliseconds | None = None

    # a request that cannot be finished in this time is refused, and one that is not ends with an error
    timeout: Seconds | None = None

    # prefixes are found in the cache by requests with the same salt only
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None

    # for those who compare: it changes how fast tokens come, and not which
    speculation: Literal["off", "draft", "ngram", "self"] | None = None

    # for load tests: the model ends the text with exactly this output token, and nothing that schedules is told
    end_after: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None

    # accepted and ignored: they cannot change the tokens
    metadata: Raw = field(default_factory=Raw)
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: is only allowed when stream is true", param="stream_options")


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool = False
    logprobs: NumLogprobs | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_prompts(self) -> int:
        is_list = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), 0), int)
        return len(self.prompt) if is_list else 1


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    parse_special: bool = False  # as llama.cpp has it: special tokens that messages spell become themselves
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: Variables | None = None
    modalities: list[Literal["text"]] | None = None

    def check(self) -> None:
        super().check()
        check_tools(self.tools or [], self.tool_choice)
        check_variables(self.chat_template_kwargs or {})

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of: none if it may not call any."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def callable_tools(self) -> list[Tool]:
        """Those of them that it may call."""
        if isinstance(self.tool_choice, ChosenTools):
            return [tool for tool in self.offered_tools if tool.function.name in self.tool_choice.names]
        return self.offered_tools

    @property
    def tool_mode(self) -> ToolMode:
        return self.tool_choice.mode if isinstance(self.tool_choice, ChosenTools) else self.tool_choice or "auto"

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the request tells the chat template; templates know one of two names for no reasoning at all."""
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            variables = {"reasoning_effort": self.reasoning_effort}
        if self.reasoning_effort == "none":
            variables["enable_thinking"] = False
        return variables | (self.chat_template_kwargs or {})


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or the messages of a chat with its tools."""

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZED_CHARS)] | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: Variables | None = None
    parse_special: bool = False
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    def check(self) -> None:
        check_tools(self.tools or [], None)
        check_variables(self.chat_template_kwargs or {})


class DetokenizeBody(Body, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


Kind = TypeVar("Kind", bound=Body)
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "object": "an object",
    "str": "text",
}


@cache
def _decoder(kind: type[Kind]) -> msgspec.json.Decoder[Kind]:
    return msgspec.json.Decoder(kind)


def parse_body(kind: type[Kind], raw: bytes) -> Kind:
    """Read a request body.

    Raises:
        InvalidRequestError: it is not JSON, or a field is missing, unknown, of the wrong type or out of range.
    """
    for byte, most in MAX_BYTES.items():
        if raw.count(byte) > most:
            raise InvalidRequestError(f"the request body has more than {most} times {byte.decode()!r}")
    try:
        body = _decode(kind, raw)
    except msgspec.ValidationError as error:
        raise _request_error(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(f"the request body is not valid JSON: {error}") from error
    body.check()
    return body


def _decode(kind: type[Kind], raw: bytes) -> Kind:
    """A body in which a field that is null, whatever its type, is as if it was left out, unless it is needed."""
    decoder: msgspec.json.Decoder[Kind] = _decoder(kind)
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError:
        if b"null" not in raw:
            raise
        fields = msgspec.json.decode(raw, type=dict[str, Raw])
        needed = {field.name for field in msgspec.structs.fields(kind) if field.required}
        given = {name: value for name, value in fields.items() if name in needed or bytes(value) != b"null"}
        return decoder.decode(msgspec.json.encode(given))


def read_body(kind: type[Kind], values: dict[str, Any], *, strict: bool = True) -> Kind:
    """Make a body of Python values, which may be text if not `strict`; raises as `parse_body` does."""
    try:
        body: Kind = msgspec.convert(values, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _request_error(str(error), kind) from error
    body.check()
    return body


def _request_error(fault: str, kind: type[Body]) -> InvalidRequestError:
    """What msgspec says of a fault, in a sentence that begins with the field."""
    message, _, place = fault.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    if named := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", message, re.DOTALL):
        name = f"{path}.{named[2]}".lstrip(".")
        what = "unrecognized request argument" if "unknown" in named[1] else "missing required field"
        return InvalidRequestError(f"{what}: {name}", param=name.partition(".")[0].partition("[")[0])
    names = [name.partition("[")[0] for name in path.split(".")]
    if allowed := _allowed(msgspec.inspect.type_info(kind), names) if message.startswith("Invalid enum value") else ():
        message = f"expected {' or '.join(map(repr, allowed))}"
    message = re.sub(
        r"`([\w| ]+)`", lambda words: " or ".join(_WORDS.get(w, w) for w in words[1].split(" | ")), message
    )
    return InvalidRequestError(f"{path or 'request body'}: {message[:1].lower()}{message[1:]}", param=names[0] or None)


def _allowed(info: Any, path: list[str]) -> tuple[Any, ...]:
    """The values of the literal type at a path."""
    match info:
        case msgspec.inspect.LiteralType() if not path:
            return tuple(info.values)
        case msgspec.inspect.UnionType():
            return tuple(value for each in info.types for value in _allowed(each, path))
        case msgspec.inspect.ListType():
            return _allowed(info.item_type, path)
        case msgspec.inspect.StructType() if path:
            return tuple(
                value
                for field in info.fields
                if field.encode_name == path[0]
                for value in _allowed(field.type, path[1:])
            )
    return ()
