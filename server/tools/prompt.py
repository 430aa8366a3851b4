"""Tools for chat templates that know none: the model is told of them in the system message, and calls are text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.server.tools.formats import ToolFormat

TOOLS_PROMPT = """\
You can call tools. Each line is one, with a JSON schema of its arguments:
{tools}
To call a tool, write nothing but this:
{example}"""
RESULT = "<tool_response>\n{content}\n</tool_response>"


def calls_as_text(messages: Sequence[Mapping[str, Any]], tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Messages without calls and results: a call is text of the assistant, and results are a message of the user."""
    told: list[dict[str, Any]] = []
    is_result = False  # whether the last message is one
    for message in messages:
        text = dict(message)
        if calls := text.pop("tool_calls", None):
            functions = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            text["content"] = "\n".join(filter(None, [text["content"], tool_format.write(functions)]))
        was_result, is_result = is_result, message["role"] == "tool"
        if is_result:
            text = {"role": "user", "content": RESULT.format(content=message["content"])}
        if is_result and was_result:
            told[-1]["content"] += f"\n{text['content']}"
        else:
            told.append(text)
    return told


def with_tools_prompt(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """The messages with what the model is told of tools, behind the system message or as one if there is none."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    example = tool_format.write([("NAME", "ARGUMENTS")])
    prompt = TOOLS_PROMPT.format(tools="\n".join(lines), example=example)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *messages]
    content = "\n\n".join(filter(None, [messages[0]["content"], prompt]))
    return [{**messages[0], "content": content}, *messages[1:]]
