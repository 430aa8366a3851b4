"""Speculation on the whole server: it can be switched off, it is counted, and no text or log-probability shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from shoal.model.backends.native_library import supported_isas
from shoal.model.checkpoint.find import resolve_checkpoint
from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import API_KEYS, StartServer
from tests.e2e.harness import Server, run_shoal
from tests.e2e.test_determinism import FEW_BLOCKS, make_requests, send_at_once

COMPLETIONS = "/v1/completions"
Answers = list[list[dict[str, Any]]]  # the choices, by request
METHODS = ("draft", "self", "suffix")


@pytest.fixture(scope="module")
def without(main: Server) -> Callable[[int], Answers]:
    """The answers to the first requests, as many as are asked for, without speculation."""
    return cache(lambda num_requests: send_at_once(main, make_requests(num_requests), range(num_requests)))


@pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("method", "k", "num_requests"),
    [
        *(("draft", None, 30), ("suffix", 4, 30), ("self", 4, 30)),
        *(pytest.param(*case, 300, marks=pytest.mark.long) for case in product(METHODS, (None, 4))),
        *(pytest.param(*case, 100, marks=pytest.mark.long) for case in product(METHODS, (1, 2, 3, 5, 6, 7, 8))),
    ],
)
def test_answers_are_those_without_speculation(
    method: str, k: int | None, num_requests: int, without: Callable[[int], Answers], tmp_path: Path
) -> None:
    """Under preemption; every tenth request asks for no speculation."""
    length = () if k is None else ("--num-spec-tokens", str(k))
    server = Server(tmp_path, "--speculation", method, *length, *FEW_BLOCKS).wait_ready()
    try:
        requests = [
            request | ({"speculation": "off"} if i % 10 == 3 else {})
            for i, request in enumerate(make_requests(num_requests))
        ]
        answers, expected = send_at_once(server, requests, range(num_requests)), without(num_requests)
        assert [i for i in range(num_requests) if answers[i] != expected[i]] == []
        assert server.metric("num_preemptions_total") > 0
        if k is not None:
            assert server.metric("spec_decode_num_accepted_tokens_total") > 0
        server.wait_idle()
    finally:
        server.close()


def test_it_is_counted_in_the_answer_and_in_the_metrics(start: StartServer) -> None:
    """The text repeats itself after 13 bytes, the last of which is the prompt; from then on a look at it finds that."""
    server = start("--speculation", "suffix", "--num-spec-tokens", "4").wait_ready()
    answer = server.complete("Z", temperature=0, ignore_eos=True, max_tokens=60)
    assert answer["choices"][0]["text"] == cycle_text(60)
    details = answer["usage"]["completion_tokens_details"]
    accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert accepted > 30
    assert rejected == 0
    assert server.metric("spec_decode_num_accepted_tokens_total") == accepted
    assert server.metric("spec_decode_num_draft_tokens_total") == accepted + rejected
    drafts = server.metric("spec_decode_num_drafts_total")
    assert drafts * 4 >= accepted >= drafts
    first = server.metric("spec_decode_num_accepted_tokens_per_pos_total", position="0")
    assert drafts >= first >= server.metric("spec_decode_num_accepted_tokens_per_pos_total", position="3") > 0


def test_a_request_may_switch_it_off_but_not_choose_another(start: StartServer) -> None:
    server = start("--speculation", "suffix", "--num-spec-tokens", "4").wait_ready()
    params: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 40}
    off, on = (server.complete("Z", **params, speculation=method) for method in ("off", "suffix"))
    assert off["choices"] == on["choices"]
    assert off["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0
    assert on["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    for wanted, message in (
        ("draft", "speculation 'draft' is not what this server was started with ('suffix')"),
        ("fast", "speculation: expected 'draft' or 'mtp' or 'off' or 'self' or 'suffix'"),
    ):
        refused = server.post(COMPLETIONS, prompt="Z", speculation=wanted)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "speculation"
        assert message in refused.json()["error"]["message"]


def test_texts_are_drafted_from_requests_of_the_same_key_alone(start: StartServer) -> None:
    """The text does not repeat itself yet, so that what is accepted comes from an earlier answer."""
    first, second, *_ = API_KEYS
    server = start("--speculation", "suffix", f"--api-keys={first},{second}").wait_ready()
    accepted = []
    for key, salt in ((first, "a"), (second, "a"), (first, "b"), (first, "a"), (second, "a")):
        server.http.headers["authorization"] = f"Bearer {key}"
        answer = server.complete("Z", temperature=0, ignore_eos=True, max_tokens=12, cache_salt=salt)
        assert answer["choices"][0]["text"] == cycle_text(12)
        accepted.append(answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"])
    assert accepted[:3] == [0, 0, 0]
    assert min(accepted[3:]) > 0


def test_stop_strings_and_limits_inside_accepted_tokens(start: StartServer) -> None:
    server = start("--speculation", "suffix", "--num-spec-tokens", "8").wait_ready()
    for max_tokens in range(20, 30):
        params: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": max_tokens}
        assert server.text("Z", **params) == cycle_text(max_tokens)
        assert server.text("Z", **params, stop="楽") == server.text("Z", **params, stop="楽", speculation="off")
    prompt = "Za数é👍Za数é👍Z"
    whole, stopped = (server.text(prompt, temperature=0, max_tokens=40, stop=stop) for stop in (None, "é"))
    assert stopped == whole.partition("é")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculation", "magic"], "speculation.method must be one of off, draft, mtp, self, suffix, not 'magic'"),
        (
            ["--speculation", "suffix", "--num-spec-tokens", "17"],
            "speculation.num_spec_tokens must be at most 16, not 17",
        ),
        pytest.param(
            ["--speculation", "suffix", "--num-spec-tokens", "0"],
            "speculation.num_spec_tokens must be at least 1, not 0",
            marks=pytest.mark.long,
        ),
        (["--speculation", "draft", "--draft-model", "nowhere"], "draft_model: 'nowhere' is neither"),
        (["--speculation", "mtp"], "has no module of multi-token prediction"),
        (["--speculation", "self", "--draft-layers", "99"], "draft_layers 99 leaves nothing to verify with"),
    ],
)
def test_wrong_settings_are_refused_at_the_start(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, output = run_shoal(tmp_path, "serve", "--port", "0", *arguments)
    assert code != 0
    assert message in output


@pytest.fixture
def swapped_folder(tmp_path: Path) -> Path:
    """The bundled draft model with two tokens of its vocabulary exchanged."""
    folder = tmp_path / "swapped"
    shutil.copytree(resolve_checkpoint("shoal-draft"), folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.mark.parametrize("draft", ["swapped_folder", pytest.param("cycle_folder", marks=pytest.mark.long)])
def test_a_draft_with_another_vocabulary_is_refused_at_the_start(
    draft: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(draft)
    code, output = run_shoal(tmp_path, "serve", "--port", "0", "--speculation", "draft", "--draft-model", str(folder))
    assert code != 0
    assert f"draft_model {folder} has another vocabulary than the model" in output
