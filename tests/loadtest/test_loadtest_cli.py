"""What the commands refuse: one clear line on standard error, and exit code 2, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shoal.loadtest import cli
from shoal.loadtest.records import LoadTestError
from shoal.loadtest.metrics import Slo
from shoal.loadtest.plan import Experiment, Plan
from shoal.loadtest.planning import SIZES, plan_comparison
from shoal.loadtest.records import Load, Setup
from shoal.loadtest.storage import Storage


def invoke(command: str, *args: str) -> Result:
    return CliRunner().invoke(getattr(cli, command), args)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--policies", "fcfs,quick"], "policies: unknown 'quick'; known are deadline, fair, fcfs"),
        (["--workload", "chat,talk"], "workload: unknown 'talk'; known are chat, code, agent, uniform"),
        (["--speculation", "magic"], "speculation: unknown 'magic'; known are off, draft, ngram, self"),
        (["--rate", "0"], "rate must be a finite number above 0, not 0"),
        (["--rates", "5,-1"], "rate must be a finite number above 0, not -1"),
        (["--rate", "nan"], "rate must be a finite number above 0, not nan"),
        (["--users", "0"], "users must be at least 1, not 0"),
        (["--users", "3", "--rate", "3"], "either --users (closed loops) or --rate (open loops), not both"),
        (["--users", "3", "--think-seconds", "-1"], "think-seconds must be a finite number of at least 0, not -1"),
        (["--rate", "3", "--burstiness", "0"], "burstiness must be a finite number above 0, not 0"),
        (["--requests", "0"], "requests must be at least 1, not 0"),
        (["--repetitions", "0"], "repetitions must be at least 1, not 0"),
        (["--ttft-slo-ms", "0"], "ttft-slo-ms must be a finite number above 0, not 0"),
        (["--replay", "gone.jsonl"], "gone.jsonl"),
        (["--replay", "gone.jsonl", "--workload", "chat"], "either --workload or --replay, not both"),
        (["--costs", "nowhere"], "nowhere"),
        (["--", "--port", "80"], "--port cannot stand after --"),
        (["--", "--scheduler.policy=sjf"], "--scheduler.policy cannot stand after --"),
    ],
)
def test_bad_input_is_named(args: list[str], complaint: str, tmp_path: Path) -> None:
    options, servers = (args, []) if "--" not in args else ([], args)
    result = invoke("loadtest", "--output", str(tmp_path / "out"), *options, *servers)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Everything is saved")]
    assert len(errors) == 1 and errors[0].startswith("shoal loadtest: ")
    assert complaint in result.stderr


@pytest.mark.parametrize("args", [["--users", "many"], ["--rate", "1,x"], ["--profile", "slow"], ["--nonsense"]])
def test_what_cannot_be_read_is_refused_with_the_usage(args: list[str]) -> None:
    result = invoke("loadtest", *args)
    assert result.exit_code == 2
    assert args[0] in result.stderr


def test_a_broken_line_of_a_replayed_workload_is_named_by_number(tmp_path: Path) -> None:
    good = {"request_id": "a", "session": "a", "prompt": "x", "prompt_token_ids": [1], "num_output_tokens": 1}
    file = tmp_path / "saved.jsonl"
    file.write_text(json.dumps(good | {"max_tokens": 2}) + "\n{broken\n")
    result = invoke("loadtest", "--replay", str(file))
    assert result.exit_code == 2
    assert "line 2" in result.stderr


def test_a_folder_that_holds_another_comparison_is_left_alone(tmp_path: Path) -> None:
    other = Plan(
        experiments=(Experiment(workload="code", setups=(Setup(policy="fcfs"),), loads=(Load(users=1),)),),
        num_requests=3,
        slo=Slo(),
    )
    Storage(tmp_path, other)
    for more in ([], ["--resume"]):
        result = invoke("loadtest", "--output", str(tmp_path), *more)
        assert result.exit_code == 2
        assert "holds another comparison" in result.stderr


def test_a_folder_in_which_nothing_was_measured_is_free_for_another_plan(tmp_path: Path) -> None:
    def plan(num_requests: int) -> Plan:
        return Plan(experiments=(), num_requests=num_requests, slo=Slo())

    storage = Storage(tmp_path, plan(3))
    storage.workload_file("chat").touch()
    storage.withdraw()
    assert not list(tmp_path.glob("*.json*"))
    (tmp_path / "runs" / "001-fcfs").mkdir()
    other = Storage(tmp_path, plan(4))
    other.withdraw()
    with pytest.raises(LoadTestError, match="holds another comparison"):
        Storage(tmp_path, plan(3))


def test_to_go_on_needs_a_folder() -> None:
    result = invoke("loadtest", "--resume")
    assert result.exit_code == 2
    assert "--resume needs --output" in result.stderr


def test_libraries_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "NEEDED", ("locust", "no_such_library"))
    for command in ("loadtest", "simulate", "profile"):
        result = invoke(command)
        assert result.exit_code == 2
        assert result.stderr == f"shoal {command}: no_such_library not installed: pip install 'shoal[loadtest]'\n"


def test_a_simulation_without_a_profile_is_refused(tmp_path: Path) -> None:
    result = invoke("simulate", "--costs", str(tmp_path))
    assert result.exit_code == 2
    assert "profile.json" in result.stderr


def test_a_simulation_refuses_the_same_input() -> None:
    result = invoke("simulate", "--policies", "quick")
    assert result.exit_code == 2
    assert "known are deadline" in result.stderr and "sjf-oracle" in result.stderr


# -- plans -------------------------------------------------------------------------------------------------------------


def planned(**asked: object) -> Plan:
    nothing = dict.fromkeys(
        ("policies", "workloads", "users", "rates", "num_requests", "replay", "speculation", "repetitions", "costs")
    )
    values = {"think_seconds": 0.0, "burstiness": 1.0, "seed": 0, "size": "fast", "model": "shoal-moe", "options": ()}
    return plan_comparison(**nothing | values | {"ttft_slo_ms": 1000.0, "tpot_slo_ms": 100.0} | asked)  # type: ignore[arg-type]


def test_without_any_choice_the_policies_are_compared_on_chat() -> None:
    (experiment,) = planned().experiments
    assert [setup.name for setup in experiment.setups] == ["static", "static-nopad", "fcfs", "sjf"]
    assert (experiment.workload, experiment.loads, experiment.repetitions) == ("chat", (Load(users=32),), 1)


def test_what_is_named_is_crossed() -> None:
    plan = planned(
        policies=("fcfs", "sjf"), speculation=("off", "draft"), workloads=("all",), rates=(5.0, 10.0), options=("--x",)
    )
    assert len(plan.experiments) == 6
    assert [setup.name for setup in plan.experiments[0].setups] == ["fcfs", "sjf", "fcfs + draft", "sjf + draft"]
    assert {setup.options for setup in plan.setups} == {("--x",)}
    assert [load.rate for load in plan.experiments[0].loads] == [5.0, 10.0]
    assert not plan.experiments[0].shares


def test_the_full_profile_finds_saturation_by_itself() -> None:
    (experiment,) = planned(size="full", policies=("fcfs",)).experiments
    assert experiment.shares == SIZES["full"].shares
    everything = planned(size="full")
    assert {name.partition(":")[0] for name in everything.workloads} >= {"chat", "uniform", "code", "agent"}
    assert {"priority", "fair", "static", "static-nopad"} <= {setup.policy for setup in everything.setups}


def test_names_are_not_repeated() -> None:
    assert len(planned(policies=("fcfs", "fcfs")).experiments[0].setups) == 1
    with pytest.raises(LoadTestError, match="unknown ''"):
        planned(policies=("",))
