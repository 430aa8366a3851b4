"""OpenAI's Responses API: the body of a request, the items of a conversation, and the answer.

An item stands in a request as people write it (`InputItem`), and everywhere else in one form (`Item`), with an id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random, SystemRandom
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from msgspec import Meta, Raw, Struct, defstruct, field
from msgspec.structs import fields

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.batches import Metadata, Page
from shoal.server.wire.body import Body, Refusal
from shoal.server.wire.conversations import MAX_ID_CHARS, MAX_MESSAGES, MAX_TOOLS, ToolMode, ToolName
from shoal.server.wire.requests import MAX_INT, REFUSED, ChatBody, NumLogprobs, SamplingBody
from shoal.server.wire.responses import Told

LOGPROBS = "message.output_text.logprobs"
# Of these only log-probabilities and what is never there are asked of a server without tools of its own.
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
ItemId = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
Role = Literal["user", "assistant", "system", "developer"]
Logprobs = Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {"type": "object"}})]  # as chats have them
NO_LOGPROBS = Raw(b"[]")
_NEEDED = {
    "message": "role and content",
    "function_call": "call_id and name",
    "function_call_output": "call_id and output",
    "item_reference": "id",
}


def new_item_id(prefix: Literal["msg", "rs", "fc"], ids: Random | None = None) -> str:
    return f"{prefix}_{(ids or SystemRandom()).randbytes(12).hex()}"


# -- items ---------------------------------------------------------------------------------------------------------


class InputText(Struct, tag_field="type", tag="input_text"):
    text: str


class OutputText(Struct, tag_field="type", tag="output_text"):
    text: str = ""
    annotations: list[Any] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=lambda: NO_LOGPROBS)


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    text: str = ""


class SummaryText(Struct, tag_field="type", tag="summary_text"):
    text: str


class MessageItem(Struct, kw_only=True, weakref=True, tag_field="type", tag="message"):
    """What the assistant says has parts of output, what others say parts of input."""

    id: str
    role: Role = "assistant"
    status: ItemStatus = "in_progress"
    content: list[InputText | OutputText] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ReasoningItem(Struct, kw_only=True, weakref=True, tag_field="type", tag="reasoning"):
    id: str
    status: ItemStatus = "in_progress"
    summary: list[SummaryText] = field(default_factory=list)
    content: list[ReasoningText] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or self.summary)


class CallItem(Struct, kw_only=True, weakref=True, tag_field="type", tag="function_call"):
    """Arguments are text: the JSON of an object, if nothing cut it off."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


class ResultItem(Struct, kw_only=True, weakref=True, tag_field="type", tag="function_call_output"):
    id: str
    call_id: str
    output: str
    status: ItemStatus = "completed"


OutputItem = MessageItem | ReasoningItem | CallItem
Item = OutputItem | ResultItem


# -- requests ------------------------------------------------------------------------------------------------------


class InputPart(Body, kw_only=True):
    """A part of a content, a result or a thought; a refusal is what the assistant said, too."""

    type: Literal["input_text", "output_text", "refusal", "reasoning_text", "summary_text"]
    text: str | None = None
    refusal: str | None = None

    # accepted and ignored
    annotations: Raw = field(default_factory=Raw)
    logprobs: Raw = field(default_factory=Raw)
    parsed: Raw = field(default_factory=Raw)  # what OpenAI's client has read of the text
    prompt_cache_breakpoint: Raw = field(default_factory=Raw)


class InputItem(Body, kw_only=True):
    """An item as a request has it.  What an answer had may be sent back as it came."""

    type: Literal["message", "reasoning", "function_call", "function_call_output", "item_reference"] = "message"
    id: ItemId | None = None
    role: Role | None = None
    content: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    call_id: ItemId | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None

    # accepted and ignored
    status: str | None = None
    phase: str | None = None
    encrypted_content: Raw = field(default_factory=Raw)
    parsed_arguments: Raw = field(default_factory=Raw)
    namespace: None = None
    caller: Raw = field(default_factory=Raw)
    is_async: Raw = field(default_factory=Raw, name="async")
    async_: Raw = field(default_factory=Raw)  # the name that it has in OpenAI's Python client
    created_by: Raw = field(default_factory=Raw)

    def item(self, path: str) -> Item:
        """The item in the form in which it is kept.

        Args:
            path: of the item in the request.

        Raises:
            InvalidRequestError: it lacks what its type needs.
        """
        match self.type:
            case "message" if self.role is not None and self.content is not None:
                kind = OutputText if self.role == "assistant" else InputText
                content: list[InputText | OutputText] = [kind(text) for text in _texts(self.content)]
                return MessageItem(id=self._id("msg"), role=self.role, status="completed", content=content)
            case "reasoning":
                summary = [SummaryText(text) for text in _texts(self.summary)]
                thoughts = [ReasoningText(text) for text in _texts(self.content)]
                return ReasoningItem(id=self._id("rs"), status="completed", summary=summary, content=thoughts)
            case "function_call" if self.call_id is not None and self.name is not None:
                return CallItem(
                    id=self._id("fc"),
                    call_id=self.call_id,
                    name=self.name,
                    arguments=self.arguments or "",
                    status="completed",
                )
            case "function_call_output" if self.call_id is not None and self.output is not None:
                return ResultItem(id=self._id("fc"), call_id=self.call_id, output="".join(_texts(self.output)))
        raise InvalidRequestError(f"{path}: an item of type {self.type!r} needs {_NEEDED[self.type]}", param="input")

    def _id(self, prefix: Literal["msg", "rs", "fc"]) -> str:
        return self.id or new_item_id(prefix)


def _texts(content: str | Sequence[InputPart] | None) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part.text or part.refusal or "" for part in content or ()]


class FunctionTool(Body, kw_only=True):
    """A function that the model may call; `check` refuses tools that a server would run itself."""

    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AllowedTool(Body, kw_only=True):
    type: Literal["function"]
    name: ToolName


class ChosenTool(Body, kw_only=True, omit_defaults=True):
    """One tool that the model has to call, or those that it may, or has to choose from."""

    type: Literal["function", "allowed_tools"]
    name: ToolName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None


class TextFormat(Body, kw_only=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Meta(max_length=64)] | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(Body, kw_only=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # nothing knows of it


class ReasoningConfig(Body, kw_only=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # a thought comes whole
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # its older name


class ObfuscationOptions(Body):
    include_obfuscation: bool | None = None  # accepted and ignored: no event is padded


# What chats know beside OpenAI's fields, under the same names.
EXTENSIONS = tuple(
    name
    for name in (
        *SamplingBody.__struct_fields__,
        *("parse_special", "chat_template_kwargs", "chat_template", "documents", "add_special_tokens"),
        *("priority", "ttft_slo_ms", "tpot_slo_ms", "timeout", "cache_salt", "request_id", "truncate_prompt_tokens"),
        *("speculation", "end_after", "timing", "receipt", "stream_interval"),
    )
    if name not in ("n", "max_tokens", "temperature", "top_p", "response_format")
)
_TYPES = {one.name: one.type for one in fields(ChatBody)}
Extensions: Any = defstruct(
    "Extensions", [(name, _TYPES[name] | None, None) for name in EXTENSIONS], bases=(Body,), kw_only=True
)


class ResponsesBody(Extensions, kw_only=True):  # type: ignore[misc, call-arg]
    """POST /v1/responses."""

    input: str | Annotated[list[InputItem], Meta(max_length=MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: ItemId | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolMode | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Includable] | None = None
    top_logprobs: NumLogprobs | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    stream: bool = False
    stream_options: ObfuscationOptions | None = None
    background: bool = False
    store: bool = True
    metadata: Metadata | None = None
    user: str | None = None

    # accepted and ignored: they cannot change the tokens
    max_tool_calls: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None  # of tools that the server runs
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Raw = field(default_factory=Raw)
    service_tier: str | None = None

    aliases: ClassVar[Mapping[str, str]] = {"repeat_penalty": "repetition_penalty"}
    refused: ClassVar[Mapping[str, Refusal]] = {
        **REFUSED,
        "prompt": Refusal("this server keeps no prompts"),
        "conversation": Refusal("this server keeps no conversations: use previous_response_id"),
        "context_management": Refusal("this server takes nothing out of conversations"),
        "moderation": Refusal("this server does not moderate"),
    }

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def is_whole(self) -> bool:
        """Whether it has all of its conversation, and refers to no response that is kept."""
        items = () if isinstance(self.input, str) else self.input
        return self.previous_response_id is None and all(item.type != "item_reference" for item in items)

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "is only allowed when stream is true")
        if self.logprob_token_ids is not None and not self.wants_logprobs:
            _refuse("logprob_token_ids", f"needs include to name {LOGPROBS!r}")
        if self.background and not self.store:
            _refuse("background", "needs store to be true, for the answer is found by its id later")
        for number, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                _refuse(
                    "tools", f"{tool.type[:64]!r} is not supported: the type must be 'function'", f"[{number}].type"
                )
            if tool.name is None:
                _refuse("tools", "is needed", f"[{number}].name")
        choice = self.tool_choice
        if isinstance(choice, ChosenTool) and choice.type == "function" and choice.name is None:
            _refuse("tool_choice", "is needed for this type", ".name")
        if isinstance(choice, ChosenTool) and choice.type == "allowed_tools" and not (choice.mode and choice.tools):
            _refuse("tool_choice", "needs mode and tools for this type")
        wanted = self.text and self.text.format
        if wanted and wanted.type == "json_schema" and (wanted.name is None or wanted.schema is None):
            _refuse("text", "needs name and schema for this type", ".format")


def _refuse(param: str, reason: str, place: str = "") -> NoReturn:
    raise InvalidRequestError(f"{param}{place}: {reason}", param=param)


class ResponseQuery(Body, kw_only=True):
    """GET /v1/responses/{response_id}."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    include_obfuscation: bool | None = None
    include: str | None = None
    includes: str | None = field(default=None, name="include[]")


class ItemsQuery(Body, kw_only=True):
    """GET /v1/responses/{response_id}/input_items."""

    after: ItemId | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    include: str | None = None
    includes: str | None = field(default=None, name="include[]")


# -- answers -------------------------------------------------------------------------------------------------------


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0  # nobody pays for them


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"]


class ResponseObject(Told, kw_only=True):
    """The answer, finished or not, with what was asked."""

    id: str
    object: str = "response"
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningConfig
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: ToolMode | ChosenTool
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]
    seed: int

    @property
    def is_ended(self) -> bool:
        return self.status not in ("queued", "in_progress")


class ItemPage(Page[Item]):
    """A part of a conversation."""


class InputTokens(Struct):
    """How many tokens a request would have."""

    input_tokens: int
    object: str = "response.input_tokens"


class DeletedResponse(Struct):
    id: str
    object: str = "response"
    deleted: bool = True
