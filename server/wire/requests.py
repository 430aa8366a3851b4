"""Request bodies, as OpenAI's API defines them, with the extensions that vLLM's users know.

What is not listed is refused by name: a misspelt parameter would otherwise be ignored in silence.  Parameters of
OpenAI's API that cannot change the tokens (`metadata`, `store`, ...) are accepted and ignored; those that would ask
for what this server does not do are refused unless they ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from shoal.scheduler.errors import InvalidRequestError

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGPROBS = 20
MAX_PRIORITY = 1000
MAX_SLO_MS = 3_600_000

# Lists are read up to their first fault: a long one could have millions, and describing them takes seconds.
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Prompts = Annotated[list[Tokens], Field(fail_fast=True)]
TopK = Annotated[int, Field(ge=-1), AfterValidator(lambda k: max(k, 0))]  # vLLM's users write -1 for all
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_CHARS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class SamplingBody(_Body):
    """How tokens are chosen, and where a text ends."""

    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: StopString | list[StopString] | None = None

    # extensions
    top_k: TopK | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: Tokens = []
    ignore_eos: bool = False

    @field_validator("stop")
    @classmethod
    def _few_stop_strings(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"{len(stop)} stop strings were given, but at most {MAX_STOP_STRINGS} are allowed")
        return stop

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
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    ttft_slo_ms: float | None = Field(None, gt=0, le=MAX_SLO_MS)
    tpot_slo_ms: float | None = Field(None, gt=0, le=MAX_SLO_MS)

    # for those who compare: it changes how fast tokens come, and not which
    speculation: Literal["off", "draft", "ngram", "self"] | None = None

    # for load tests: the model ends the text with exactly this output token, and nothing that schedules is told
    end_after: int | None = Field(None, ge=1)

    # accepted and ignored: they cannot change the tokens
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_for_streams(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("is only allowed when stream is true")
        return options


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | Texts | Tokens | Prompts
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_prompts(self) -> int:
        is_list = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), 0), int)
        return len(self.prompt) if is_list else 1


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a chat; a content of several text parts is their concatenation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it."""
        parts = self.content if isinstance(self.content, list) else []
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise ValueError("tool calls are not supported: leave the list empty")
        return tools


class TokenizeBody(_Body):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens


Body = TypeVar("Body", bound=_Body)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Read a request body.

    Raises:
        InvalidRequestError: it is not JSON, or a field is missing, unknown, of the wrong type or out of range.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise request_error(error) from error


def request_error(error: ValidationError) -> InvalidRequestError:
    """What is wrong with a body, in one sentence that names the field."""
    faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    path = [str(part) for part in first["loc"]]
    field = path[0] if path else None
    match first["type"]:
        case "json_invalid":
            return InvalidRequestError(f"the request body is not valid JSON: {first['ctx']['error']}")
        case "extra_forbidden":
            return InvalidRequestError(f"unrecognized request argument: {'.'.join(path)}", param=field)
        case "missing":
            return InvalidRequestError(f"missing required field: {'.'.join(path)}", param=field)
    # A field of several types has a fault for each of them.
    messages = dict.fromkeys(_message(fault) for fault in faults if fault["loc"][:1] == first["loc"][:1])
    return InvalidRequestError(f"{field or 'request body'}: {' or '.join(messages)}", param=field)


def _message(fault: ErrorDetails) -> str:
    """What is wrong, and where inside the field if it is an item of it."""
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    indices = [i for i, part in enumerate(fault["loc"]) if isinstance(part, int)]
    return f"item {fault['loc'][indices[0]]}: {message}" if indices else message
