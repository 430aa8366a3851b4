"""Messages and tools, as OpenAI's API defines them.

Whatever an answer of this API has, a client may send back in the next turn: nulls, empty lists, and fields that other
servers fill.  What cannot change the prompt is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, field

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOOL_NAME_CHARS = 64
MAX_ID_CHARS = 256
MAX_VARIABLES = 64  # of a template
MAX_DEPTH = 64  # of lists and objects in each other, in schemas and variables
# What a conversation gives its template by fields of their own.
_RESERVED = ("messages", "tools", "add_generation_prompt")

ToolName = Annotated[str, Meta(pattern=rf"^[a-zA-Z0-9_-]{{1,{MAX_TOOL_NAME_CHARS}}}(?!\n)$")]
CallId = Annotated[str, Meta(max_length=MAX_ID_CHARS)]
Variables = Annotated[dict[str, Any], Meta(max_length=MAX_VARIABLES)]


class TextPart(Body, kw_only=True):
    type: Literal["text"]
    text: str
    cache_control: Raw = field(default_factory=Raw)  # Anthropic's: ignored, for the prefix cache needs no marks
    annotations: Raw = field(default_factory=Raw)


class CalledFunction(Body, kw_only=True):
    name: str
    arguments: str | dict[str, Any] = ""
    parsed_arguments: Raw = field(default_factory=Raw)  # what OpenAI's client has read of them


class CalledTool(Body, kw_only=True):
    """A call in a message of the assistant."""

    function: CalledFunction
    id: CallId | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # of streamed calls, which some clients put together as they came
    provider_specific_fields: Raw = field(default_factory=Raw)

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: the arguments are an object, if they are the JSON of one."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                arguments = self.function.arguments
        check_depth(arguments, "messages")
        function = {"name": self.function.name, "arguments": arguments}
        return {"type": "function", "function": function} | ({"id": self.id} if self.id is not None else {})


class Message(Body, kw_only=True):
    """One message of a chat; a content of several text parts is their concatenation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name of the same
    function_call: CalledFunction | None = None  # as it was before there were tools

    # accepted and ignored: they stand in answers, and some servers fill them
    refusal: str | None = None
    annotations: Raw = field(default_factory=Raw)
    parsed: Raw = field(default_factory=Raw)  # what OpenAI's client has read of the content
    audio: None = None
    reasoning_details: Raw = field(default_factory=Raw)
    thinking_blocks: Raw = field(default_factory=Raw)
    provider_specific_fields: Raw = field(default_factory=Raw)
    cache_control: Raw = field(default_factory=Raw)

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self.text}
        calls = [CalledTool(function=self.function_call)] if self.function_call else self.tool_calls
        if calls:
            message["tool_calls"] = [call.for_template() for call in calls]
        told = {"name": self.name, "tool_call_id": self.tool_call_id}
        told["reasoning_content"] = self.reasoning_content or self.reasoning
        return message | {name: value for name, value in told.items() if value}


class FunctionDefinition(Body, kw_only=True):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body, kw_only=True):
    """A function that the model may call."""

    function: FunctionDefinition
    type: Literal["function"] = "function"
    cache_control: Raw = field(default_factory=Raw)

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it, in the order of OpenAI's documentation."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": "function", "function": function | {"parameters": self.schema}}

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments: of an object, without properties if nothing is said."""
        return {"type": "object"} | (self.function.parameters or {"properties": {}})


class NamedFunction(Body, kw_only=True):
    name: ToolName


class NamedTool(Body, kw_only=True):
    function: NamedFunction
    type: Literal["function"] = "function"


class AllowedTools(Body, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class ChosenTools(Body, kw_only=True):
    """Some of the tools: one that the model has to call, or those that it may, or has to choose from."""

    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None
    type: Literal["function", "allowed_tools"] = "function"

    @property
    def mode(self) -> Literal["auto", "required"]:
        return self.allowed_tools.mode if self.allowed_tools else "required"

    @property
    def names(self) -> set[str]:
        named = [tool.function for tool in self.allowed_tools.tools] if self.allowed_tools else [self.function]
        return {function.name for function in named if function is not None}


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolMode = Literal["none", "auto", "required"]
ToolChoice = ToolMode | ChosenTools


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Refuse tools that contradict each other, or the choice.

    Raises:
        InvalidRequestError: a field is at fault.
    """
    names: set[str] = set()
    for number, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidRequestError(
                f"tools[{number}]: the name {tool.function.name!r} stands before another tool already", param="tools"
            )
        names.add(tool.function.name)
        if tool.schema["type"] != "object":
            raise InvalidRequestError(
                f"tools[{number}].function.parameters: expected a schema of type 'object'", param="tools"
            )
        check_depth(tool.schema, "tools")
    if isinstance(choice, ChosenTools):
        if (choice.function is None) == (choice.allowed_tools is None) or getattr(choice, choice.type) is None:
            raise InvalidRequestError(
                f"tool_choice: this type needs {choice.type!r}, and no other", param="tool_choice"
            )
        for name in choice.names - names:
            raise InvalidRequestError(f"tool_choice: there is no tool {name!r}", param="tool_choice")
    if choice == "required" and not names:
        raise InvalidRequestError("tool_choice: 'required' needs tools", param="tool_choice")


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse variables of a template that it gets otherwise.

    Raises:
        InvalidRequestError: a name is reserved, or a value too deep.
    """
    for name in _RESERVED:
        if name in variables:
            raise InvalidRequestError(
                f"chat_template_kwargs: {name!r} is no variable that a request may set", param="chat_template_kwargs"
            )
    check_depth(variables, "chat_template_kwargs")


def check_depth(value: Any, param: str, most: int = MAX_DEPTH) -> None:
    """Refuse lists and objects that are too deep in each other.

    Raises:
        InvalidRequestError: they are.
    """
    if not isinstance(value, list | dict):
        return
    if not most:
        raise InvalidRequestError(f"{param}: lists and objects are more than {MAX_DEPTH} deep", param=param)
    for inner in value.values() if isinstance(value, dict) else value:
        check_depth(inner, param, most - 1)
