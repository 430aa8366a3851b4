"""The fields by which a request constrains its text: of OpenAI, vLLM of two ages, llama.cpp and SGLang."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, NoReturn

from msgspec import Meta, Struct

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body

MAX_CHOICES, MAX_TAGS = 1024, 128
MAX_GRAMMAR_CHARS = 262_144

Text = Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Pattern = Annotated[str, Meta(max_length=256)]
Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_CHOICES)]
Schema = dict[str, Any] | bool | Text  # text is the JSON of a schema


class Constraint(NamedTuple):
    """What a text is to keep to.

    Attributes:
        field: that asks for it.
        kind: how `value` is to be read.
        whitespace: a regular expression of what may stand between the tokens of JSON; None for one space after a comma
            or colon.
    """

    field: str
    kind: Literal["tools", "json", "regex", "choice", "grammar", "structural_tag"]
    value: Any
    whitespace: str | None = None

    def refuse(self, reason: str) -> NoReturn:
        raise InvalidRequestError(f"{self.field}: {reason}", param=self.field.partition(".")[0])


class TaggedSchema(Struct):
    """A part of a text that begins with `begin`, keeps to a schema, and ends with `end`."""

    begin: Text
    schema: Schema
    end: str


class StructuralTags(Struct):
    """Free text, in which what begins with a trigger is one of the structures."""

    structures: Annotated[list[TaggedSchema], Meta(min_length=1, max_length=MAX_TAGS)]
    triggers: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_TAGS)]


class JsonSchema(Body, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None  # a text keeps to its schema in any case


class ResponseFormat(Body, kw_only=True):
    """OpenAI's; llama.cpp's has the schema beside the type, and vLLM's may have structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    schema: Schema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(Body, kw_only=True):
    """vLLM's."""

    json: Schema | None = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    structural_tag: Text | dict[str, Any] | None = None
    whitespace_pattern: Pattern | None = None
    disable_any_whitespace: bool | None = None
    # there is one engine, which refuses what it cannot do and adds nothing
    disable_fallback: bool | None = None
    disable_additional_properties: Literal[False] | None = None


class ConstrainedBody(Body, kw_only=True):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    guided_whitespace_pattern: Pattern | None = None
    guided_decoding_backend: str | None = None  # there is one
    grammar: Text | None = None
    json_schema: Schema | None = None
    regex: Text | None = None
    ebnf: Text | None = None

    def constraint(self) -> Constraint | None:
        """What the request asks for; None if its text may be any.

        Raises:
            InvalidRequestError: two fields ask, or a response format lacks what its type needs.
        """
        made, guided, white = self.structured_outputs or StructuredOutputs(), "guided_", self.guided_whitespace_pattern
        between = "" if made.disable_any_whitespace else made.whitespace_pattern
        found = [
            *self._of_response_format(),
            Constraint("structured_outputs.json", "json", made.json, between),
            Constraint("structured_outputs.json_object", "json", OBJECT if made.json_object else None, between),
            Constraint("structured_outputs.regex", "regex", made.regex),
            Constraint("structured_outputs.choice", "choice", made.choice),
            Constraint("structured_outputs.grammar", "grammar", made.grammar),
            Constraint("structured_outputs.structural_tag", "structural_tag", made.structural_tag),
            Constraint(guided + "json", "json", self.guided_json, white),
            Constraint(guided + "regex", "regex", self.guided_regex),
            Constraint(guided + "choice", "choice", self.guided_choice),
            Constraint(guided + "grammar", "grammar", self.guided_grammar),
            Constraint("grammar", "grammar", self.grammar),
            Constraint("json_schema", "json", self.json_schema),
            Constraint("regex", "regex", self.regex),
            Constraint("ebnf", "grammar", self.ebnf),
        ]
        asked = [one for one in found if one.value is not None]
        if len(asked) > 1:
            asked[1].refuse(f"contradicts {asked[0].field}: a text keeps to one grammar")
        return asked[0] if asked else None

    def _of_response_format(self) -> list[Constraint]:
        asked = self.response_format
        if asked is None:
            return []
        match asked.type:
            case "json_object":
                return [Constraint("response_format", "json", OBJECT if asked.schema is None else asked.schema)]
            case "json_schema":
                schema = asked.json_schema.schema if asked.json_schema else asked.schema
                if schema is None:
                    raise InvalidRequestError(
                        "response_format.json_schema.schema: is needed for this type", param="response_format"
                    )
                return [Constraint("response_format.json_schema", "json", schema)]
            case "structural_tag":
                tags = {"structures": asked.structures or [], "triggers": asked.triggers or []}
                return [Constraint("response_format", "structural_tag", tags)]
            case "text":
                return []


OBJECT = {"type": "object"}
TOOLS = Constraint("tools", "tools", None)  # the calls of tools, where no field asks for more
