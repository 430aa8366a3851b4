"""What the commands refuse: one clear line on standard error, and exit code 2, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shoal.extras import install_command
from shoal.loadtest import cli
from shoal.loadtest.plan import SHARES, Plan, make_plan
from shoal.loadtest.records import Load, LoadTestError, read_json, write_json
from shoal.scheduler.policies import POLICIES


def invoke(command: str, *args: str) -> Result:
    return CliRunner().invoke(getattr(cli, command), args)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--policies", "fcfs,quick"], "policies: unknown 'quick'; known are deadline, fair, fcfs"),
        (["--workload", "chat,talk"], "workload: unknown 'talk'; known are chat, code, agent, uniform"),
        (["--speculation", "magic"], "speculation: unknown 'magic'; known are off, draft, mtp, self, suffix"),
        (["--users", "3", "--rate", "3"], "either --users (closed loops) or --rate (open loops), not both"),
        (["--users", "3", "--think-seconds", "-1"], "think_seconds must be a finite number of at least 0, not -1"),
        (["--rate", "nan"], "rate must be a finite number of at least 0, not nan"),
        (["--replay", "gone.jsonl"], "gone.jsonl"),
        (["--replay", "gone.jsonl", "--workload", "chat"], "either --workload or --replay, not both"),
        (["--costs", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named(args: list[str], complaint: str, tmp_path: Path) -> None:
    result = invoke("loadtest", "--output", str(tmp_path / "out"), *args)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Everything is saved")]
    assert len(errors) == 1 and errors[0].startswith("shoal loadtest: ")
    assert complaint in result.stderr


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--users", "many"], "'--users': 'many' is not a valid integer"),
        (["--users", "3,0"], "'--users': 0 is not in the range x>=1"),
        (["--rate", "1,x"], "'--rate' / '--rates': 'x' is not a valid float"),
        (["--rates", "5,-1"], "'--rate' / '--rates': -1.0 is not in the range 0<x<="),
        (["--burstiness", "0"], "'--burstiness': 0.0 is not in the range 0<x<="),
        (["--requests", "0"], "'--requests': 0 is not in the range x>=1"),
        (["--repetitions", "0"], "'--repetitions': 0 is not in the range x>=1"),
        (["--tpot-slo-ms", "inf"], "'--tpot-slo-ms': inf is not in the range 0<x<="),
        (["--ttft-slo-ms", "0"], "'--ttft-slo-ms': 0.0 is not in the range 0<x<="),
        (["--profile", "slow"], "'--profile': 'slow' is not one of 'fast', 'full'"),
        (["--nonsense"], "No such option '--nonsense'"),
        (["--resume"], "--resume needs --output"),
        (["--", "--port", "80"], "--port cannot stand after --"),
        (["--", "--scheduler.policy=sjf"], "--scheduler.policy cannot stand after --"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_usage(args: list[str], complaint: str) -> None:
    result = invoke("loadtest", *args)
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_a_broken_line_of_a_replayed_workload_is_named_by_number(tmp_path: Path) -> None:
    good = {"request_id": "a", "session": "a", "prompt": "x", "prompt_token_ids": [1], "num_output_tokens": 1}
    file = tmp_path / "saved.jsonl"
    file.write_text(json.dumps(good | {"max_tokens": 2}) + "\n{broken\n")
    result = invoke("loadtest", "--replay", str(file))
    assert result.exit_code == 2
    assert "line 2" in result.stderr


def test_a_folder_that_holds_a_comparison_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    result = invoke("loadtest", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "holds a comparison already; go on with --resume" in result.stderr


def test_libraries_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "NEEDED", ("locust", "no_such_library"))
    for command in ("loadtest", "simulate", "profile"):
        result = invoke(command)
        assert result.exit_code == 2
        advice = install_command("loadtest")
        assert result.stderr == f"shoal {command}: no_such_library not installed: run `{advice}`\n"


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
    return make_plan(POLICIES, **asked)


def setups(plan: Plan) -> list[str]:
    return list(dict.fromkeys(run.setup.name for run in plan.runs))


def test_without_any_choice_the_policies_are_compared_on_chat() -> None:
    plan = planned()
    assert setups(plan) == ["static", "static-nopad", "fcfs", "sjf"]
    assert [(run.workload, run.load) for run in plan.runs] == [("chat", Load(users=32))] * 4
    assert plan.num_requests == 96


def test_what_people_have_is_compared_if_it_is_asked_for() -> None:
    assert setups(planned(hugging_face=True)) == ["static", "static-nopad", "fcfs", "sjf", "hf-generate"]
    assert "hf-generate" in setups(planned(hugging_face=True, size="full"))
    with pytest.raises(LoadTestError, match="unknown 'hf-generate'"):
        planned(policies=("hf-generate",))


def test_what_people_have_must_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "transformers" else object())
    result = invoke("loadtest", "--hugging-face", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr == f"shoal loadtest: transformers not installed: run `{install_command('train')}`\n"


def test_what_is_named_is_crossed() -> None:
    asked = {"policies": ("fcfs", "sjf"), "speculation": ("off", "draft"), "workloads": ("all",), "rates": (5.0, 10.0)}
    plan = planned(**asked, options=("--x",))
    assert len(plan.names) == 6 and len(plan.runs) == 6 * 4 * 2
    assert setups(plan) == ["fcfs", "sjf", "fcfs + draft", "sjf + draft"]
    assert {run.setup.options for run in plan.runs} == {("--x",)}
    assert {run.load.rate for run in plan.runs} == {5.0, 10.0}


def test_the_full_size_finds_saturation_by_itself_and_repeats_it() -> None:
    runs = planned(size="full", policies=("fcfs",)).runs
    assert [run.load.share for run in runs] == [0, 0, *SHARES, *SHARES]
    everything = planned(size="full")
    assert {"chat", "uniform", "code", "agent"} <= set(everything.names)
    assert {"priority", "fair", "static", "static-nopad"} <= {run.setup.policy for run in everything.runs}
    curve = [run.repetition for run in everything.runs if run.load.share == SHARES[0]]
    assert set(curve) == {0, 1}, "so that its curves have bands"


def test_a_recorded_workload_is_sent_when_it_was_recorded(tmp_path: Path) -> None:
    request = {"request_id": "a", "session": "a", "prompt": "x", "prompt_token_ids": [1], "num_output_tokens": 1}
    file = tmp_path / "saved one.jsonl"
    for recorded, load in (({}, Load(users=32)), ({"arrival_time": 0.5}, Load())):
        file.write_text(json.dumps(request | {"max_tokens": 2} | recorded) + "\n")
        plan = planned(replay=str(file))
        assert (plan.names, plan.num_requests, plan.runs[0].load) == (["saved-one"], 1, load)


def test_a_plan_is_read_back_from_its_file(tmp_path: Path) -> None:
    plan = planned(size="full", seed=3)
    write_json(tmp_path / "plan.json", plan)
    assert read_json(tmp_path / "plan.json", Plan) == plan


def test_names_are_not_repeated() -> None:
    assert len(planned(policies=("fcfs", "fcfs")).runs) == 1
    with pytest.raises(LoadTestError, match="unknown ''"):
        planned(policies=("",))
