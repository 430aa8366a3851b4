"""A profile of a "real" engine that is a simulation: what it knew comes back, and what is saved is read."""

from __future__ import annotations

import json
from dataclasses import replace as replace_limits
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from shoal.loadtest.costs import fit
from shoal.loadtest.profile import FILE, SERIES, Profile, read_profile
from shoal.loadtest.records import Load, LoadTestError, Run, write_json
from shoal.loadtest.twin import simulate
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError
from tests.loadtest.twin import LIMITS, REALISTIC, chat, run, server_info

OPTIONS = ("--threads", "2")
PROFILE = Profile(server=server_info(), options=OPTIONS, versions={"shoal": "1"}, costs=REALISTIC)


def measure(most_requests: int) -> list[Run]:
    """The runs of a profile of at most so many requests a run, which a simulation stands in for."""
    return [
        simulate(
            planned,
            chat(
                min(num_requests, most_requests),
                num_prompt_tokens={"chat": 70, "code": 400, "agent": 450}[planned.workload],
            ),
            server=PROFILE.server,
            costs=REALISTIC,
        )
        for planned, num_requests in SERIES.items()
    ]


def test_a_profile_knows_what_the_engine_costs() -> None:
    runs = measure(256)
    assert sum(max(record.finished_at or 0 for record in one.requests) for one in runs) < 60
    costs = replace(fit(runs), deviations={})
    for policy in ("fcfs", "static", "sjf"):
        real, twin = (
            [record.finished_at for record in run(chat(100, 77), Load(rate=40.0), policy, costs).requests]
            for costs in (REALISTIC, costs)
        )
        assert twin == pytest.approx(real, rel=0.01)


def test_a_profile_of_few_requests_is_enough_for_a_load_test_of_few() -> None:
    load = Load(users=4)
    costs = replace(fit(measure(8)), deviations={})
    for policy in ("fcfs", "static"):
        real, twin = (run(chat(8, 7), load, policy, costs).requests[-1].finished_at for costs in (REALISTIC, costs))
        assert twin == pytest.approx(real, rel=0.1)


# -- the twin of a measured run ----------------------------------------------------------------------------------------


def test_a_server_whose_steps_have_other_costs_is_not_predicted() -> None:
    other = server_info(replace_limits(LIMITS, max_num_seqs=2), {"static_timeout_seconds": 2.0})
    PROFILE.check(other)
    other.settings["engine"] = {"threads": 1, "trace": "another.json"}
    with pytest.raises(LoadTestError, match="its threads is 1, the profile's is 2"):
        PROFILE.check(other)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / FILE, PROFILE)
    assert read_profile(tmp_path) == PROFILE


def test_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"there is no profile in .*: profile.json is missing"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("options", "x", r"Expected `array`, got `str` - at `\$.options`"),
        ("more", 3, "unknown field `more`"),
        ("server.limits.num_blocks", 0, "num_blocks must be at least 1, not 0"),
        ("server.limits.num_blocks", "many", r"Expected `int`, got `str` - at `\$.server.limits.num_blocks`"),
        ("costs.token_seconds", ..., r"missing required field `token_seconds` - at `\$.costs`"),
        ("costs.walk_seconds", 1, r"unknown field `walk_seconds` - at `\$.costs`"),
        ("costs.send_seconds", True, r"Expected `float`, got `bool` - at `\$.costs.send_seconds`"),
        ("costs.pair_seconds", -1.0, r"Expected `float` >= 0.0 - at `\$.costs.pair_seconds`"),
        ("costs.pair_seconds", float("nan"), "malformed"),
        ("costs.token_seconds", {"1": 1.0}, r"length >= 2 - at `\$.costs.token_seconds`"),
        ("costs.deviations", {"1": []}, r"length >= 1 - at `\$.costs.deviations"),
        ("costs.deviations", {"many": [1.0]}, r"at `key` in `\$.costs.deviations`"),
    ],
)
def test_what_is_broken_is_refused_by_name(*, tmp_path: Path, path: str, value: object, message: str) -> None:
    write_json(tmp_path / FILE, PROFILE)
    saved = json.loads((tmp_path / FILE).read_text())
    *parents, last = path.split(".")
    place = saved
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    (tmp_path / FILE).write_text(json.dumps(saved))
    with pytest.raises(LoadTestError, match=f"profile.json.*{message}"):
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
        (["--max-num-seqs", "8"], {"max_num_seqs": 8, "num_blocks": 512}, {"max_num_seqs": 8}),
        (
            ["--max-num-seqs", "8", "--num-blocks", "99"],
            {"max_num_seqs": 8, "num_blocks": 99},
            {"max_num_seqs": 8},
        ),
        (
            ["--predictor", "max_tokens", "--ageing-seconds", "3"],
            {},
            {"predictor": "max_tokens", "ageing_seconds": 3.0},
        ),
    ],
)
def test_options_change_limits_and_knobs(options: list[str], limits: dict[str, int], knobs: dict[str, Any]) -> None:
    assert PROFILE.server_with(options) == server_info(replace_limits(LIMITS, **limits), knobs)  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize(("rows", "num_blocks"), [("32", 100), ("1", 64)])
def test_memory_that_was_short_stays_so(rows: str, num_blocks: int) -> None:
    short = replace(PROFILE, server=server_info(SchedulerConfig(num_blocks=100, max_model_len=1024)))
    assert short.server_with(["--max-num-seqs", rows]).limits.num_blocks == num_blocks


def test_blocks_that_were_set_stay() -> None:
    server = server_info()
    server.settings["cache"]["num_blocks"] = 4096
    assert replace(PROFILE, server=server).server_with(["--max-num-seqs", "8"]).limits.num_blocks == 4096


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "1"], "how --threads 1 changes the costs is unknown"),
        (["--max-num-seqs", "few"], "argument --max-num-seqs: invalid int value: 'few'"),
        (["--max-num-seqs"], "argument --max-num-seqs: expected one argument"),
        (["8"], "how 8 changes"),
    ],
)
def test_options_that_cannot_be_simulated_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        PROFILE.server_with(options)


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        PROFILE.server_with(["--max-num-batched-tokens", "8"])
