"""Requests of Anthropic's Messages API, and the chats that they ask for.

Each becomes a `ChatBody`, so that what holds for chats holds for it.  Fields that cannot change the answer
(`cache_control`, `service_tier`, ...) are accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from msgspec import Meta, Raw, field

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body, Refusal
from shoal.server.wire.constraints import JsonSchema, ResponseFormat
from shoal.server.wire.conversations import (
    MAX_MESSAGES,
    MAX_TOOLS,
    CalledFunction,
    CalledTool,
    CallId,
    ChosenTools,
    FunctionDefinition,
    Message,
    NamedFunction,
    Tool,
    ToolMode,
    ToolName,
    Variables,
)
from shoal.server.wire.requests import (
    MAX_PRIORITY,
    MAX_STOP_STRINGS,
    ChatBody,
    Count,
    Interval,
    RepetitionPenalty,
    Seconds,
    Share,
    StopString,
)

# What Claude Code puts before its system prompt: it differs in each request, so that no prefix would be found again.
BILLING_HEADER = "x-anthropic-billing-header"
TYPE_CHARS = 64  # of a type that is refused
_AS_IN_CHATS = (
    *("max_tokens", "stream", "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty"),
    *("priority", "timeout", "timing", "receipt", "stream_interval"),
)
KEEPS_ALL = "this server takes nothing out of conversations"

Value = TypeVar("Value")


class Part(Body, kw_only=True):
    """A block of text, in a system prompt or in the result of a tool; no other type is taken."""

    type: str
    text: str | None = None
    cache_control: Raw = field(default_factory=Raw)  # ignored, for the prefix cache needs no marks
    citations: Raw = field(default_factory=Raw)
    source: Raw = field(default_factory=Raw)  # of an image or a document


class Block(Part, kw_only=True):
    """A block of a message; which fields it needs depends on its type."""

    id: CallId | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: CallId | None = None
    content: str | list[Part] | None = None
    is_error: bool | None = None
    thinking: str | None = None

    # accepted and ignored, as they stand in answers
    signature: Raw = field(default_factory=Raw)
    data: Raw = field(default_factory=Raw)
    caller: Raw = field(default_factory=Raw)
    toolset_name: Raw = field(default_factory=Raw)
    parsed_output: Raw = field(default_factory=Raw)


class Turn(Body, kw_only=True):
    """A message; one of the role `system` belongs to the system prompt, wherever it stands."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CustomTool(Body, kw_only=True):
    """A tool that the client runs; those of Anthropic have other types."""

    name: ToolName
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None

    # accepted and ignored
    cache_control: Raw = field(default_factory=Raw)
    allowed_callers: Raw = field(default_factory=Raw)
    defer_loading: Raw = field(default_factory=Raw)
    eager_input_streaming: Raw = field(default_factory=Raw)
    input_examples: Raw = field(default_factory=Raw)


class Choice(Body, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body, kw_only=True):
    """Whether the model thinks before it answers; for how long it does so is its own affair."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None
    display: str | None = None


class OutputFormat(Body, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Body, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None
    task_budget: Raw = field(default_factory=Raw)


class ContextManagement(Body, kw_only=True):
    edits: list[dict[str, Any]] | None = None

    def refuse(self) -> None:
        """Refuse what would take anything out of the conversation; to keep all thoughts is no edit."""
        for number, edit in enumerate(self.edits or []):
            if not (str(edit.get("type")).startswith("clear_thinking") and edit.get("keep") == "all"):
                raise InvalidRequestError(
                    f"context_management.edits[{number}]: {KEEPS_ALL}", param="context_management"
                )


class Metadata(Body, kw_only=True):
    user_id: str | None = None


class CountBody(Body, kw_only=True):
    """POST /v1/messages/count_tokens: all that the prompt is made of."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[Part] | None = None
    tools: Annotated[list[CustomTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its older name
    context_management: ContextManagement | None = None
    chat_template_kwargs: Variables | None = None  # an extension

    # accepted and ignored
    cache_control: Raw = field(default_factory=Raw)
    diagnostics: Raw = field(default_factory=Raw)
    speed: Raw = field(default_factory=Raw)

    refused: ClassVar[Mapping[str, Refusal]] = {
        "compaction": Refusal(KEEPS_ALL),
        "container": Refusal("this server runs no code"),
        "mcp_servers": Refusal("this server asks no other servers"),
        "thread": Refusal("this server keeps no conversations: send all messages"),
    }

    def chat(self) -> ChatBody:
        """The chat that has this prompt.

        Raises:
            InvalidRequestError: it asks for what this server does not do, or contradicts itself.
        """
        chat = self._asked()
        chat.check()
        return chat

    def _asked(self) -> ChatBody:
        chat = ChatBody(model=self.model, messages=_conversation(self.system, self.messages))
        if chat.messages[-1].role == "assistant":
            chat.continue_final_message, chat.add_generation_prompt = True, False
        if self.context_management is not None:
            self.context_management.refuse()
        chat.tools = [_tool(f"tools[{number}]", tool) for number, tool in enumerate(self.tools or [])]
        if self.tool_choice is not None:
            chat.tool_choice = _chosen(self.tool_choice)
            if self.tool_choice.disable_parallel_tool_use is not None:
                chat.parallel_tool_calls = not self.tool_choice.disable_parallel_tool_use
        chat.chat_template_kwargs = {**self._thinking(), **(self.chat_template_kwargs or {})}
        config = self.output_config or OutputConfig()
        chat.reasoning_effort = "xhigh" if config.effort == "max" else config.effort
        output_format = config.format or self.output_format
        if output_format is not None:
            schema = JsonSchema(name="answer", schema=output_format.schema)
            chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
        return chat

    def _thinking(self) -> dict[str, bool]:
        """Variables of the chat template, which knows one of two names."""
        if self.thinking is None:
            return {}
        return dict.fromkeys(("enable_thinking", "thinking"), self.thinking.type != "disabled")


class MessagesBody(CountBody, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Count
    stream: bool = False
    temperature: Share | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    metadata: Metadata | None = None

    # extensions, as in chats
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    timeout: Seconds | None = None
    timing: bool = False
    receipt: bool = False
    stream_interval: Interval = 1

    # accepted and ignored
    service_tier: str | None = None
    inference_geo: str | None = None
    user_profile_id: str | None = None

    def _asked(self) -> ChatBody:
        chat = super()._asked()
        for name in _AS_IN_CHATS:
            setattr(chat, name, getattr(self, name))
        chat.stop = self.stop_sequences
        chat.user = self.metadata.user_id if self.metadata else None
        return chat


# -- messages ----------------------------------------------------------------------------------------------------------


def _conversation(system: str | Sequence[Part] | None, turns: Sequence[Turn]) -> list[Message]:
    """Messages of a chat: the system prompt, then turns whose roles alternate, but for results of tools."""
    told = [text for text in _texts(system, "system") if not text.startswith(BILLING_HEADER)]
    said: list[Message] = []
    for number, turn in enumerate(turns):
        place = f"messages[{number}].content"
        match turn.role:
            case "system":
                told += _texts(turn.content, place)
            case "user":
                for message in _of_user(turn.content, place):
                    _add(said, message)
            case "assistant":
                _add(said, _of_assistant(turn.content, place))
    if not said:
        raise InvalidRequestError("messages: there is none of the user or the assistant", param="messages")
    return [Message(role="system", content="\n".join(told)), *said] if told else said


def _add(said: list[Message], message: Message) -> None:
    """Add a message; what one says in two turns, or in two blocks, is one turn."""
    last = said[-1] if said else None
    if last is None or last.role != message.role or message.role == "tool":
        said.append(message)
    elif message.role == "user":
        last.content = f"{last.text}\n{message.text}"
    else:
        last.content = last.text + message.text
        last.tool_calls = [*(last.tool_calls or []), *(message.tool_calls or [])]
        last.reasoning_content = (last.reasoning_content or "") + (message.reasoning_content or "")


def _of_user(content: str | Sequence[Block], place: str) -> Iterator[Message]:
    """What the user says, and results of tools, in order."""
    if isinstance(content, str):
        yield Message(role="user", content=content)
        return
    for number, block in enumerate(content):
        at = f"{place}[{number}]"
        match block.type:
            case "text":
                yield Message(role="user", content=_needed(block.text, f"{at}.text"))
            case "tool_result":
                text = "\n".join(_texts(block.content, f"{at}.content"))
                call_id = _needed(block.tool_use_id, f"{at}.tool_use_id")
                yield Message(role="tool", tool_call_id=call_id, content=f"Error: {text}" if block.is_error else text)
            case _:
                raise _unfit(block, at, "'text' or 'tool_result'")


def _of_assistant(content: str | Sequence[Block], place: str) -> Message:
    """What the model said; blocks of text are one text that calls or citations have parted."""
    if isinstance(content, str):
        return Message(role="assistant", content=content)
    texts, thoughts, calls = list[str](), list[str](), list[CalledTool]()
    for number, block in enumerate(content):
        at = f"{place}[{number}]"
        match block.type:
            case "text":
                texts.append(_needed(block.text, f"{at}.text"))
            case "thinking":
                thoughts.append(_needed(block.thinking, f"{at}.thinking"))
            case "redacted_thinking":
                pass  # nobody here can read it
            case "tool_use":
                name, arguments = _needed(block.name, f"{at}.name"), _needed(block.input, f"{at}.input")
                calls.append(CalledTool(id=block.id, function=CalledFunction(name=name, arguments=arguments)))
            case _:
                raise _unfit(block, at, "'text', 'thinking', 'redacted_thinking' or 'tool_use'")
    text, thought = "".join(texts), "".join(thoughts)
    return Message(role="assistant", content=text, tool_calls=calls or None, reasoning_content=thought or None)


def _texts(content: str | Sequence[Part] | None, place: str) -> list[str]:
    """The texts of blocks that are nothing else."""
    if content is None or isinstance(content, str):
        return [content] if content else []
    texts = []
    for number, part in enumerate(content):
        if part.type != "text":
            raise _unfit(part, f"{place}[{number}]", "'text'")
        texts.append(_needed(part.text, f"{place}[{number}].text"))
    return texts


def _unfit(part: Part, place: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{place}.type: {part.type[:TYPE_CHARS]!r} is not supported here: expected {expected}", param=_field(place)
    )


def _needed(value: Value | None, place: str) -> Value:
    if value is None:
        raise InvalidRequestError(f"missing required field: {place}", param=_field(place))
    return value


def _field(place: str) -> str:
    return place.partition("[")[0]


# -- tools -------------------------------------------------------------------------------------------------------------


def _tool(place: str, tool: CustomTool) -> Tool:
    if tool.type not in (None, "custom"):
        raise InvalidRequestError(
            f"{place}.type: {str(tool.type)[:TYPE_CHARS]!r} is not supported: this server takes tools of the type "
            f"'custom', which the client runs",
            param="tools",
        )
    schema = _needed(tool.input_schema, f"{place}.input_schema")
    definition = FunctionDefinition(name=tool.name, description=tool.description, parameters=schema, strict=tool.strict)
    return Tool(function=definition)


def _chosen(choice: Choice) -> ToolMode | ChosenTools:
    match choice.type:
        case "auto" | "none":
            return choice.type
        case "any":
            return "required"
        case "tool":
            return ChosenTools(function=NamedFunction(name=_needed(choice.name, "tool_choice.name")))
