"""A profile of a "real" engine that is a simulation: what it knew comes back, and what is saved is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.loadtest.costs import CostModel
from shoal.loadtest.errors import LoadTestError, WorkloadError
from shoal.loadtest.profile import (
    FILE,
    SERIES,
    Profile,
    make_profile,
    measure_series,
    read_profile,
    read_profiled_workload,
    write_profile,
)
from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.server_options import KNOBS, apply_options
from shoal.loadtest.simulator import simulate
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError
from tests.loadtest.twin import LIMITS, REALISTIC, chat

PROFILE = Profile(
    model="m", options=("--threads", "2"), versions={"shoal": "1"}, limits=LIMITS, knobs=KNOBS, costs=REALISTIC
)


def make(name: str, num_requests: int, seed: int) -> list[WorkloadRequest]:
    return chat(num_requests, seed, num_prompt_tokens={"chat": 70, "code": 400}[name])


class Engine:
    """Stands in for a real one: simulates what it is asked to measure."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.setups: list[Setup] = []
        self.seconds = 0.0

    def measure(self, workload: Sequence[WorkloadRequest], load: Load, setup: Setup) -> Run:
        self.setups.append(setup)
        limits, knobs = apply_options(setup.options, ("--threads", "2"), LIMITS, KNOBS)
        run = simulate(workload, load, setup, limits=limits, knobs=knobs, costs=self.costs)
        self.seconds += max(record.finished_at or 0 for record in run.requests)
        return run


def test_a_profile_knows_what_the_engine_costs() -> None:
    engine = Engine(REALISTIC)
    limits = replace(LIMITS, num_blocks=1)  # which the traces know better
    options = ("--threads", "2")
    runs = list(measure_series(engine.measure, make, options))
    profile = make_profile(runs, model="m", limits=limits, knobs=KNOBS, options=options)
    assert profile.limits == LIMITS
    assert len(engine.setups) == len(SERIES)
    assert all(setup.options[:2] == options for setup in engine.setups)
    assert engine.seconds < 60
    workload, load = chat(100, 77), Load(rate=40.0)
    for policy in ("fcfs", "static", "sjf"):
        ends = [
            [
                record.finished_at
                for record in simulate(
                    workload, load, Setup(policy=policy), limits=LIMITS, knobs=KNOBS, costs=costs
                ).requests
            ]
            for costs in (REALISTIC, replace(profile.costs, deviations=()))
        ]
        assert ends[0] == pytest.approx(ends[1], rel=0.01)


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    write_profile(tmp_path / "new", PROFILE, {"chat": chat(5), "two-tenants": chat(2)})
    assert read_profile(tmp_path / "new") == PROFILE
    assert read_profiled_workload(tmp_path / "new", "chat") == chat(5)
    assert read_profiled_workload(tmp_path / "new", "chat", 3) == chat(5)[:3]
    with pytest.raises(WorkloadError, match="'chat' has 5 requests, fewer than 6"):
        read_profiled_workload(tmp_path / "new", "chat", 6)
    with pytest.raises(WorkloadError, match="has no workload 'code'; it has chat, two-tenants"):
        read_profiled_workload(tmp_path / "new", "code")


def test_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"there is no profile in .*: profile.json cannot be read: No such file"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "model must be a string, not 3"),
        ({"options": "x"}, "options must be a list of strings, not 'x'"),
        ({"versions": {"shoal": 3}}, "versions.shoal must be a string, not 3"),
        ({"more": 3}, "profile.more is unknown"),
        ({"costs": {}}, "costs.version is missing"),
        ({"limits": {}}, "limits.max_num_seqs is missing"),
        ({"knobs": {"ageing_seconds": 1}}, "knobs.ttft_slo_ms is missing"),
    ],
)
def test_a_broken_profile_is_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_profile(tmp_path, PROFILE, {})
    saved = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(saved | change))
    with pytest.raises(LoadTestError, match=f"profile.json is broken: {message}"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("limits", "num_blocks", 0, "limits.num_blocks must be at least 1, not 0"),
        ("limits", "num_blocks", "many", "limits has a value of the wrong type"),
        ("knobs", "ageing_tokens", -1, "knobs.ageing_tokens must be above 0, not -1"),
    ],
)
def test_a_broken_limit_is_refused_by_name(
    *, tmp_path: Path, section: str, name: str, value: object, message: str
) -> None:
    write_profile(tmp_path, PROFILE, {})
    saved = json.loads((tmp_path / FILE).read_text())
    saved[section][name] = value
    (tmp_path / FILE).write_text(json.dumps(saved))
    with pytest.raises(LoadTestError, match=message):
        read_profile(tmp_path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"model": ')
    with pytest.raises(LoadTestError, match=r"profile.json is not JSON: .*line 1"):
        read_profile(tmp_path)


# -- options of the server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "limits", "knobs"),
    [
        ([], {}, {}),
        (["--threads=2"], {}, {}),
        (
            ["--max-num-batched-tokens", "256", "--max-chunk-tokens=64"],
            {"max_num_batched_tokens": 256, "max_chunk_tokens": 64},
            {},
        ),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}, {}),
        (["--enable-prefix-caching"], {}, {}),
        (["--enable-prefix-caching", "false"], {"enable_prefix_caching": False}, {}),
        (["--max-num-seqs", "8"], {"max_num_seqs": 8, "num_blocks": 512}, {}),
        (["--max-num-seqs", "8", "--num-blocks", "99"], {"max_num_seqs": 8, "num_blocks": 99}, {}),
        (
            ["--predictor", "max_tokens", "--ageing-seconds", "3"],
            {},
            {"predictor": "max_tokens", "ageing_seconds": 3.0},
        ),
    ],
)
def test_options_change_limits_and_knobs(options: list[str], limits: dict[str, int], knobs: dict[str, float]) -> None:
    assert PROFILE.configure(options) == (replace(LIMITS, **limits), KNOBS | knobs)  # type: ignore[arg-type]  # any field


def test_memory_that_was_short_stays_so() -> None:
    short = SchedulerConfig(num_blocks=100, max_model_len=1024)
    assert apply_options(["--max-num-seqs", "32"], [], short, KNOBS)[0].num_blocks == 100
    assert apply_options(["--max-num-seqs", "1"], [], short, KNOBS)[0].num_blocks == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "1"], "what --threads does to the costs of steps is not known"),
        (["--max-num-seqs", "few"], "--max-num-seqs must be of type int, not 'few'"),
        (["--enable-prefix-caching", "maybe"], "--enable-prefix-caching must be of type bool, not 'maybe'"),
        (["8"], "unexpected argument '8'"),
    ],
)
def test_options_that_cannot_be_simulated_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        PROFILE.configure(options)


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        PROFILE.configure(["--max-num-batched-tokens", "8"])
