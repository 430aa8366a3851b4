from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import CheckpointError, InvalidRequestError

CHATML = """{{ bos_token }}{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message.content | trim }}{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
TOOLS = """{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}
{% endfor %}{% set ns = namespace(n=0) %}{% for message in messages %}
{% if message.role == 'skip' %}{% continue %}{% endif %}
{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{% set ns.n = ns.n + 1 %}{{ ns.n }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if mood is defined %}{{ mood }}{% endif %}"""

CONVERSATION = [
    {"role": "user", "content": "  Wie heißt <b>du</b>? 数 "},
    {"role": "assistant", "content": 'I\'m "Shoal" & co.'},
    {"role": "user", "content": ""},
]
WEATHER = [{"type": "function", "function": {"name": "weather", "description": "<b>wo?</b> ü", "parameters": {}}}]


def hub_tokenizer() -> HubTokenizer:
    tokenizer = HubTokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(folder: Path, template: Any) -> Path:
    hub_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("template", [CHATML, TOOLS], ids=["chatml", "tools"])
@pytest.mark.parametrize("tools", [None, WEATHER], ids=["plain", "with-tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers(
    template: str, tools: list[dict[str, Any]] | None, add_generation_prompt: bool, tmp_path: Path
) -> None:
    ours = Tokenizer.load(write(tmp_path, template))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=hub_tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    for messages in (CONVERSATION, CONVERSATION[:1], [*CONVERSATION, {"role": "assistant", "content": "a\n\nb"}]):
        for extra in ({}, {"mood": "calm"}):
            options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt, **extra}
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert ours.apply_chat_template(messages, **options) == expected


def test_named_templates_and_the_file(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = Tokenizer.load(write(tmp_path, named))
    assert tokenizer.apply_chat_template([]) == "plain"
    assert tokenizer.apply_chat_template([], tools=WEATHER) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("from the file {{ strftime_now('%Y') | length }}")
    assert Tokenizer.load(tmp_path).apply_chat_template([], tools=WEATHER) == "from the file 4"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10000000000) %}{% endfor %}",
    ],
)
def test_what_a_template_raises_is_about_the_messages(template: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, template))
    with pytest.raises(InvalidRequestError, match="the chat template refuses the messages") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    assert caught.value.param == "messages"


def test_without_a_template_the_request_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.load(write(tmp_path, None)).apply_chat_template([])


def test_a_template_that_is_not_jinja_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the chat template is not valid"):
        Tokenizer.load(write(tmp_path, "{% if %}"))
