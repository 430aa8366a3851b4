"""Policies on the whole server: a setting chooses one, requests carry what it reads, and no text depends on it."""

from __future__ import annotations

import pytest

from shoal.scheduler.policies import POLICIES
from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Waiting

COMPLETIONS = "/v1/completions"
LENGTHS = (60, 3, 25, 1, 40)
SOME = ("fair", "static")
OTHERS = sorted(POLICIES.keys() - set(SOME))


@pytest.mark.parametrize("policy", [*SOME, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_every_policy_answers_every_request_and_frees_every_block(policy: str, start: StartServer) -> None:
    """Five requests share two rows; the last static batch is not full, so it starts at its timeout."""
    server = start("--policy", policy, "--max-num-seqs", "2", "--static-timeout-seconds", "0.05").wait_ready()
    server.until("it says which policy it has", lambda: f"policy {policy}\n" in server.log)
    waiting = [
        Waiting(
            server,
            COMPLETIONS,
            prompt="Z",
            temperature=0,
            ignore_eos=True,
            max_tokens=max_tokens,
            user=f"user {index % 2}",
            priority=-index,
            ttft_slo_ms=1000.0 / (index + 1),
            tpot_slo_ms=50,
        )
        for index, max_tokens in enumerate(LENGTHS)
    ]
    texts = [one.answer().json()["choices"][0]["text"] for one in waiting]
    assert texts == [cycle_text(max_tokens) for max_tokens in LENGTHS]
    server.wait_idle()
