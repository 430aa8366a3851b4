"""The process that renders chat templates: `python -m shoal.server.rendering`; `server/templates.py` starts it.

A template comes with the weights.  The sandbox keeps it from touching anything, but not from looping for ever, or from
making a text of a gigabyte, maybe in a single operation that no thread can interrupt.  So it runs here, and the system
ends this process where a template takes too much.

Standard input has a line of JSON for the templates, and one for each conversation, whose answer is a line on standard
output.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from typing import Any

import msgspec

from shoal.model.text.chat_template import ChatTemplate, texts_in
from shoal.scheduler.errors import CheckpointError, InvalidRequestError

SECONDS, MAX_BYTES, MAX_CHARS = 2.0, 512 * 1024 * 1024, 8 * 1024 * 1024

MAX_REFUSAL_CHARS = 1000


class Templates(msgspec.Struct):
    """The first line: the arguments of `ChatTemplate`."""

    sources: dict[str, str]
    variables: dict[str, str]


class Conversation(msgspec.Struct):
    """What to render: arguments of `ChatTemplate.render`.

    Attributes:
        template: in the place of the checkpoint's.
        continues: whether the last message is not at its end.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}
    template: str | None = None
    continues: bool = False

    @property
    def num_chars(self) -> int:
        """Length of what every template shows."""
        return sum(map(len, texts_in([[message["content"] for message in self.messages], self.tools])))


class Rendered(msgspec.Struct):
    """The text, or why the template refuses the messages."""

    text: str = ""
    refusal: str | None = None


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are the server's; this ends with it
        signal.signal(number, signal.SIG_IGN)
    lines = sys.stdin.buffer
    templates = msgspec.json.decode(lines.readline(), type=Templates)
    template = ChatTemplate(templates.sources, templates.variables)
    with contextlib.suppress(ValueError, OSError):  # not every system limits memory
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    for line in lines:
        asked = msgspec.json.decode(line, type=Conversation)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing; then a signal that nobody handles ends this
        try:
            chosen = (
                template if asked.template is None else ChatTemplate({"default": asked.template}, template.variables)
            )
            rendered = Rendered(
                chosen.render(
                    asked.messages,
                    add_generation_prompt=asked.add_generation_prompt,
                    continue_final_message=asked.continues,
                    tools=asked.tools,
                    **asked.variables,
                )
            )
        except (CheckpointError, InvalidRequestError) as error:
            rendered = Rendered(refusal=error.message[:MAX_REFUSAL_CHARS])
        signal.setitimer(signal.ITIMER_PROF, 0)
        if len(rendered.text) > MAX_CHARS:
            sys.exit(1)
        sys.stdout.buffer.write(msgspec.json.encode(rendered) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
