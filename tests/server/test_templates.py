"""Chat templates that take too much, in the process that is made for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models

from shoal.model.text.chat_template import ChatTemplate
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import CheckpointError, InvalidRequestError
from shoal.server.rendering import Conversation
from shoal.server.templates import TemplateRenderer

PLAIN = "{% for message in messages %}{{ bos_token }}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}assistant:{% endif %}"
SAYS = [{"role": "user", "content": "größer 数 \n\0\u2028"}]


def rendering(template: str, scene: Callable[[TemplateRenderer], Awaitable[Any]]) -> Any:
    async def play() -> Any:
        tokenizer = HubTokenizer(models.BPE({"<s>": 0, "a": 1}, []))
        tokenizer.decoder = decoders.ByteLevel()
        special = {"bos_token": "<s>"}
        renderer = TemplateRenderer(Tokenizer(tokenizer, special_tokens=special, chat_templates={"default": template}))
        try:
            return await scene(renderer)
        finally:
            await renderer.close()

    return asyncio.run(play())


def processes() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [process for process in found if "shoal.server.rendering" in process.cmdline()]


def test_it_renders_as_the_template_does_in_process() -> None:
    template = ChatTemplate({"default": PLAIN + ASKS}, {"bos_token": "<s>"})

    async def scene(renderer: TemplateRenderer) -> None:
        for asks in (True, False):
            expected = template.render(SAYS, add_generation_prompt=asks)
            assert await renderer.render(Conversation(SAYS, asks)) == expected
        long = [{"role": "user", "content": "x" * 3_000_000}] * 2
        texts = await asyncio.gather(*(renderer.render(Conversation(long, True)) for _ in range(3)))
        assert texts == [template.render(long)] * 3
        assert len(processes()) == 1

    rendering(PLAIN + ASKS, scene)
    assert not processes()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{% macro again(n) %}{{ again(n + 1) }}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
        "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ messages[0].content * 10 ** 10 }}",
        "{{ 'a' * 10 ** 10 }}",
        pytest.param("{% set n = messages | length + 6 %}{{ (n ** (n ** 12)) % 7 }}", marks=pytest.mark.long),
        "{{ 'a'.center(10 ** 10) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ 'abcdefgh' * 2000000 }}",
    ],
    ids=["loops", "recursion", "doubling", "product", "constant", "power", "padding", "format", "length"],
)
def test_a_template_that_takes_too_much_is_ended_and_the_next_one_is_not(template: str) -> None:
    async def scene(renderer: TemplateRenderer) -> None:
        with pytest.raises(InvalidRequestError, match="the chat template") as caught:
            await renderer.render(Conversation([{"role": "user", "content": "a"}], True))
        assert caught.value.param == "messages"
        assert await renderer.render(Conversation([], True)) == "well"

    rendering(f"{{% if messages %}}{template}{{% else %}}well{{% endif %}}", scene)


def test_what_a_template_refuses_is_said() -> None:
    async def scene(renderer: TemplateRenderer) -> None:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="the chat template refuses the messages: no robots"):
                await renderer.render(Conversation(SAYS, True))
        assert len(processes()) == 1

    rendering("{{ raise_exception('no robots') }}", scene)


def test_a_process_that_was_killed_or_given_up_is_replaced() -> None:
    async def scene(renderer: TemplateRenderer) -> None:
        assert await renderer.render(Conversation([], False)) == ""
        processes()[0].kill()
        assert renderer._process is not None
        await renderer._process.wait()
        assert await renderer.render(Conversation([], False)) == ""
        waiting = asyncio.create_task(renderer.render(Conversation(SAYS, True)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await renderer.render(Conversation([], True)) == "assistant:"

    rendering(PLAIN + ASKS, scene)


def test_nothing_is_computed_when_a_template_is_loaded() -> None:
    ChatTemplate({"default": "{{ 'a' * 10 ** 10 }}{{ 7 ** (7 ** 12) }}"}, {})
    with pytest.raises(CheckpointError, match="not valid"):
        ChatTemplate({"default": "{{ " + "(" * 100_000 + ")" * 100_000 + " }}"}, {})
