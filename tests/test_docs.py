"""The reference pages are true: links lead somewhere, nothing that exists is left out, and the example runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import get_args

import pytest
from click.testing import CliRunner

from shoal.cli import main
from shoal.model.architecture import bytes_per_block
from shoal.model.checkpoint.config import load_config
from shoal.model.checkpoint.families import FAMILIES
from shoal.model.checkpoint.families.refused import REFUSED
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.speculation.config import MOST_SPEC_TOKENS
from shoal.scheduler import policies
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.policies import POLICIES, describe_policies, discover_policies
from shoal.server.errors import http_error
from shoal.server.faults import CONDITIONS, FAULTS, RANGES, Script
from shoal.server.metrics import Metrics
from shoal.server.openapi import operations
from shoal.server.openapi.fields import FIELDS
from shoal.server.responses import store
from shoal.server.sampling import COMPLETION_MAX_TOKENS
from shoal.server.settings import DEFAULT_MODEL, Declared, declared, describe
from shoal.server.sources import load_settings
from shoal.server.tools.formats import TOOL_FORMATS
from shoal.server.tools.grammar import MAX_CALLS
from shoal.server.tools.prompt import with_tools_prompt
from shoal.server.wire import conversations, embeddings, items, messages, requests
from shoal.server.wire.batches import MAX_FILE_BYTES, MAX_LINES, BatchBody
from tests.fakes import Harness

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
API, OPERATIONS, ADD_A_POLICY, FAULTS_PAGE, MODELS = (
    (ROOT / "docs" / name).read_text("utf-8")
    for name in ("api.md", "operations.md", "policies.md", "faults.md", "models.md")
)


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# -- models.md ---------------------------------------------------------------------------------------------------------


def test_every_family_is_in_the_tables() -> None:
    served, refused = (
        {name for row in re.findall(r"^\| (`.+?) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
        for part in MODELS.split("## What is refused")
    )
    assert served - {"model_type"} == FAMILIES.keys()
    assert refused - {"model_type"} == REFUSED.keys()


def test_the_examples_of_a_family_are_in_the_table() -> None:
    table = (ROOT / "model/checkpoint/families/dense.py").read_text("utf-8")
    cases = (ROOT / "tests/model/families.py").read_text("utf-8")
    for example, source in zip(re.findall(r"```python\n(.*?)```", MODELS, re.DOTALL), (table, cases), strict=True):
        assert indent(example, "    ") in source


# -- operations.md -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", declared())
def test_every_setting_is_described(section: str) -> None:
    """In the table under the heading with `[section]`: one row for each, and no other row."""
    settings = declared()[section]
    (table,) = re.findall(rf"^### .*`\[{section}\]`\n((?:(?!#).*\n)*)", OPERATIONS, re.MULTILINE)
    assert [row for row in map(row_of, settings.values()) if row not in table] == []
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(settings)


def row_of(one: Declared) -> str:
    """The first three cells of a setting's row; its meaning is free."""
    names = ("at_least", "above", "at_most", "pattern")
    limits = [(name.replace("_", " "), one.field.metadata[name]) for name in names]
    kind = ", ".join([describe(one.type), *(f"{name} {limit}" for name, limit in limits if limit is not None)])
    kind = kind.replace("|", r"\|")
    return f"| `{one.field.name}` | {kind} | {shown(one.field.default)} |"


def shown(default: object) -> str:
    match default:
        case None:
            return "not set"
        case ():
            return "none"
        case bool():
            return str(default).lower()
    return str(default)


def test_every_metric_is_described() -> None:
    families = list(Metrics("fish").registry.collect())
    rows = [f"| `{one.name}{'_total' if one.type == 'counter' else ''}` | {one.type} |" for one in families]
    described = re.findall(r"^\| `(?:vllm:|shoal:|http_|process_)\w+` \| \w+ \|", OPERATIONS, re.MULTILINE)
    assert sorted(described) == sorted(rows)


def test_the_example_of_sizing_is_the_bundled_model() -> None:
    config = load_config(resolve_checkpoint(DEFAULT_MODEL))
    block = bytes_per_block(config, "float32", 16)
    num_blocks = 64 * config.max_position_embeddings // 16
    assert re.search(rf"= +{block // 16:,} bytes a token\n.*= +{block:,} bytes a block\n", OPERATIONS)
    assert f"{num_blocks:,} blocks = {num_blocks * block // 2**20} MiB" in OPERATIONS


def test_every_limit_is_named() -> None:
    for row in (
        f"| `n` | {requests.MAX_CHOICES} |",
        f"| stop strings, characters of each | {requests.MAX_STOP_STRINGS}, {requests.MAX_STOP_STRING_CHARS} |",
        f"| `logprobs`, `top_logprobs`, `logprob_token_ids` | {requests.MAX_LOGPROBS} |",
        f"| tools of a request, characters of a tool's name | {conversations.MAX_TOOLS}, "
        f"{conversations.MAX_TOOL_NAME_CHARS} |",
        f"in `chat_template_kwargs` | {conversations.MAX_DEPTH} |",
        f"| calls of an answer whose calls are demanded | {MAX_CALLS} |",
        f"| variables in `chat_template_kwargs` | {conversations.MAX_VARIABLES} |",
        f"| {store.MAX_RESPONSES:,}, {store.MAX_BYTES // 2**20} MiB, each counted as {store.RESPONSE_BYTES // 1024} "
        f"KiB, its JSON and {store.ITEM_BYTES} bytes an item |",
        f"| items of an `input` | {conversations.MAX_MESSAGES:,} |",
        f"| `priority` | -{requests.MAX_PRIORITY} to {requests.MAX_PRIORITY} |",
        f"| `ttft_slo_ms`, `tpot_slo_ms` | {requests.MAX_SLO_MS:,} |",
        f"| drafted tokens of a request in a step | {MOST_SPEC_TOKENS} |",
        f"| bytes of an uploaded file | {MAX_FILE_BYTES:,} |",
        f"| lines of a batch, bytes of each | {MAX_LINES:,}, `max_body_bytes` |",
        f"| inputs of `/v1/embeddings` | {embeddings.MAX_INPUTS:,} |",
    ):
        assert row in OPERATIONS


# -- api.md ------------------------------------------------------------------------------------------------------------


def test_every_endpoint_is_described() -> None:
    assert [endpoint for endpoint in operations.OPERATIONS if f"`{endpoint}`" not in API] == []


def test_every_meaning_of_a_field_is_that_of_the_page() -> None:
    """But for links, which a document of OpenAPI cannot have."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", API), re.MULTILINE)
    for name, meaning in FIELDS.items():
        field, words = f"`{name.rpartition('.')[2]}`", meaning.replace("|", r"\|")
        assert any(field in fields.split(", ") and words in row for fields, row in rows), name


@pytest.mark.parametrize(
    "body",
    [
        requests.CompletionBody,
        requests.ChatBody,
        conversations.Message,
        conversations.Tool,
        conversations.FunctionDefinition,
        messages.MessagesBody,
        messages.CustomTool,
        requests.TokenizeBody,
        requests.DetokenizeBody,
        embeddings.EmbeddingsBody,
        BatchBody,
        items.FunctionTool,
    ],
)
def test_every_field_of_a_request_is_described(body: type[requests.CompletionBody]) -> None:
    described = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|([^|]*)\|", API, re.MULTILINE))))
    assert set(body.__struct_fields__) - described == set()


def test_every_field_of_a_response_is_described() -> None:
    (section,) = re.findall(r"^## Responses\n(.*?)^## ", API, re.MULTILINE | re.DOTALL)
    assert set(items.ResponsesBody.__struct_fields__) - set(re.findall(r"`(\w+)`", section)) == set()
    assert set(get_args(items.Includable)) >= {items.LOGPROBS} and items.LOGPROBS in section


def test_every_limit_of_a_request_is_named() -> None:
    for row in (
        f"| `n` | integer, 1 to {requests.MAX_CHOICES} |",
        f"| `stop` | string, or a list of at most {requests.MAX_STOP_STRINGS}, "
        f"of at most {requests.MAX_STOP_STRING_CHARS} characters each,",
        f"| `logprobs` | integer, 0 to {requests.MAX_LOGPROBS},",
        f"| `top_logprobs` | integer, 0 to {requests.MAX_LOGPROBS},",
        f"| `priority` | integer, -{requests.MAX_PRIORITY} to {requests.MAX_PRIORITY} |",
        f"| `ttft_slo_ms` | number, above 0, at most {requests.MAX_SLO_MS:,},",
        f"| `tpot_slo_ms` | number, above 0, at most {requests.MAX_SLO_MS:,},",
        f"- `/v1/completions`: {COMPLETION_MAX_TOKENS}, as in OpenAI's API",
    ):
        assert row in API


def test_every_format_of_calls_is_described() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \| [^|`]+ \| `[^|]*(?:NAME|name)", API, re.MULTILINE)) == sorted(
        TOOL_FORMATS
    )


def test_the_default_prompt_of_tools_is_the_one_on_the_page() -> None:
    ((shown, tool),) = re.findall(r"```\n(You can call tools.*?\n(\{.*?\})\n.*?)\n```", API, re.DOTALL)
    (message,) = with_tools_prompt([], [{"function": json.loads(tool)}], TOOL_FORMATS["hermes"])
    assert message == {"role": "system", "content": shown}


def kinds(root: type[ShoalError]) -> Iterator[type[ShoalError]]:
    """The tree of errors."""
    yield root
    for kind in root.__subclasses__():
        yield from kinds(kind)


@pytest.mark.parametrize("kind", list(kinds(ShoalError)))
def test_every_error_is_described(kind: type[ShoalError]) -> None:
    error = http_error(kind(""))
    (row,) = re.findall(rf"^\| {error.status} \| `{error.type}` \| `{error.code}` \|.*", API, re.MULTILINE)
    assert (f"`retry-after: {error.retry_after}`" in row) == (error.retry_after is not None)


# -- faults.md ---------------------------------------------------------------------------------------------------------


def test_every_fault_is_described() -> None:
    for name, parameters in FAULTS.items():
        listed = ", ".join(f"`{key}`" for key in parameters)
        assert f"| `{name}` | {listed}{' ' if listed else ''}|" in FAULTS_PAGE
    for key, (least, most) in RANGES.items():
        kind = "integer" if isinstance(least, int) else "number"
        bounds = f"{least:g} to {int(most):,}" if most > 9999 else f"{least:g} to {most:g}"
        spelt = {"*": "*N", "rate": "rate=R"}.get(key, f"{key}=N" if key in CONDITIONS else key)
        assert f"| `{spelt}` | {kind}, {bounds} |" in FAULTS_PAGE


def test_every_script_on_the_page_is_one() -> None:
    scripts = re.findall(r'^\| `([^`]*)` \| [^|]* \|$|--fault-script "([^"]*)"', FAULTS_PAGE, re.MULTILINE)
    found = [one or other for one, other in scripts if any(name in FAULTS for name in re.split(r"[ *,]", one or other))]
    assert len(found) >= 7
    for script in found:
        Script(script)


# -- planner.md --------------------------------------------------------------------------------------------------------


def test_the_plan_on_the_page_is_the_one_that_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/planner.md").read_text("utf-8")
    ((config, shown),) = re.findall(
        r"```json\n(.*?)```\n\n```console\n\$ shoal plan config.json --machine h100\n(.*?)```", page, re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(config)
    printed = CliRunner().invoke(main, ["plan", "config.json", "--machine", "h100"]).stdout
    assert [line.rstrip() for line in printed.strip().splitlines()] == shown.splitlines()


# -- policies.md -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The policy of the page, in a file of the name that the page gives it, is found among the others."""
    ((module, source),) = re.findall(r"`scheduler/policies/(\w+)\.py`:\n\n```python\n(.*?)```", ADD_A_POLICY, re.DOTALL)
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)  # there is no shoal.toml
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    for name, kind in discover_policies().items():
        monkeypatch.setitem(POLICIES, name, kind)
    declared.cache_clear()
    yield
    declared.cache_clear()
    del sys.modules[f"{policies.__name__}.{module}"]


@pytest.mark.usefixtures("_example")
def test_the_example_is_a_policy_with_a_setting_of_its_own() -> None:
    assert describe_policies()["short-prompts"] == "The shortest prompt goes first; waiting makes up for length."
    assert declared()["scheduler"]["prompt_rate"].field.default == 100.0
    for rate, expected in ((2.0, ["long", "short"]), (0.5, ["short", "long"])):
        settings = load_settings(["--policy", "short-prompts", "--prompt-rate", str(rate)])
        policy = settings.scheduler.policy
        harness = Harness(max_num_seqs=1, policy=policy, knobs=settings.knobs[policy])
        harness.add("long", [1, 2, 3], max_tokens=1)
        harness.now = 2.0
        harness.add("short", [1], max_tokens=1)
        harness.drain()
        assert list(harness.finish_reasons) == expected


# -- reading.md --------------------------------------------------------------------------------------------------------


def test_the_walks_are_as_long_as_they_say() -> None:
    """A change of a few lines need not change the page."""
    listed = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", (ROOT / "docs/reading.md").read_text("utf-8"), re.MULTILINE)
    lengths = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name, _ in listed}
    assert len(listed) > 20
    assert {name: int(count) for name, count in listed} == pytest.approx(lengths, abs=20)
    assert sum(lengths.values()) <= 3600
