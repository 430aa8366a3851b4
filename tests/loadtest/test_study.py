"""Comparisons with servers and load generators that record what happens, and fail on command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from shoal.loadtest import measure, study
from shoal.loadtest.measure import TRACE_FILE, load_run
from shoal.loadtest.plan import Plan, crossed, make_plan
from shoal.loadtest.profile import SERIES, read_profile
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, RequestRecord, ServerInfo, Setup
from shoal.loadtest.study import PROFILED, Runs, begin, compare_all, differing_answers, measure_profile, workload_file
from shoal.loadtest.traffic import Begin, End
from shoal.loadtest.workload import WorkloadRequest, read_workload, write_workload
from shoal.testing import ServerFailedError
from tests.loadtest.made_runs import SERVER
from tests.loadtest.twin import REALISTIC

STATIC, FCFS, SJF = (Setup(policy=policy) for policy in ("static", "fcfs", "sjf"))
USERS = Load(users=2)
STARTED_AT = 1000.0


@dataclass
class World:
    """Servers and a load generator: what they did, and when they are to fail (by policy and number of start)."""

    dies_at_start: set[str] = field(default_factory=set)
    dies_in_the_middle: set[tuple[str, int]] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    starts: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    sent: dict[str, list[WorkloadRequest]] = field(default_factory=dict)

    def start_server(self, options: Sequence[str], log: Path) -> AbstractContextManager[FakeServer]:
        policy = options[options.index("--policy") + 1]
        self.starts.append(policy)
        if policy in self.dies_at_start:
            raise ServerFailedError("the server ended with exit code 2; the last lines of its log:\nno")
        Path(options[options.index("--trace") + 1]).write_text("[")
        return nullcontext(FakeServer(policy))

    def run_load(self, url: str, workload: Path, load: Load, results: Path) -> None:
        self.loads.append(load)
        policy = self.starts[-1]
        dies = (policy, self.starts.count(policy)) in self.dies_in_the_middle
        requests = self.sent[policy] = read_workload(workload)
        text = self.texts.get(policy, "text")
        answers = [
            answer(request, number, text) for number, request in enumerate(requests[:1] if dies else requests, 1)
        ]
        lines = [Begin(STARTED_AT), *answers, *([] if dies else [End(cpu_seconds=0.25)])]
        results.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        if dies:
            raise ServerFailedError("the server ended by signal SIGKILL; its log is empty")

    def replaces(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(measure, "ServerProcess", self.start_server)
        patch.setattr(measure, "run_locust", self.run_load)
        patch.setattr(measure, "warm", lambda url: None)
        patch.setattr(ServerInfo, "of", lambda server: SERVER)


@dataclass
class FakeServer:
    url: str

    def cpu_seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    def check(self) -> None:
        pass


def answer(request: WorkloadRequest, number: int, text: str) -> RequestRecord:
    return RequestRecord(
        request_id=request.request_id,
        client=request.client,
        priority=request.priority,
        engine_id=f"cmpl-{number}-0-0",
        sent_at=0.0,
        token_times=[float(number)],
        finished_at=float(number),
        num_output_tokens=request.num_output_tokens,
        text_hash=text if number == 2 else "the same",
    )


def plan(*policies: str, loads: Sequence[Load] = (USERS,), repetitions: int = 1) -> Plan:
    setups = [Setup(policy=policy) for policy in policies]
    asked = Plan(num_requests=3, repetitions=repetitions)
    return replace(asked, runs=tuple(crossed(asked, "chat", setups, loads)))


def requests() -> list[WorkloadRequest]:
    return [
        WorkloadRequest(
            request_id=f"q{number}",
            session=f"s{number}",
            client="modest" if number == 1 else "greedy",
            prompt="Hi",
            prompt_token_ids=[1],
            num_output_tokens=4,
            max_tokens=8,
            priority=number,
        )
        for number in range(3)
    ]


def save_requests(folder: Path, names: Iterable[str]) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        write_workload(workload_file(folder, name), requests())


def compare(folder: Path, world: World, what: Plan) -> tuple[Runs, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        world.replaces(patch)
        return compare_all(what, folder, {name: requests() for name in what.names})


# -- order -----------------------------------------------------------------------------------------------------------


def test_repetitions_are_outermost_and_no_setup_always_comes_first() -> None:
    asked = {"policies": ("static", "fcfs", "sjf"), "workloads": ("chat", "code"), "repetitions": 3}
    runs = make_plan(["static", "fcfs", "sjf"], **asked).runs
    assert [run.repetition for run in runs] == [0] * 6 + [1] * 6 + [2] * 6
    assert [run.workload for run in runs] == (["chat"] * 3 + ["code"] * 3) * 3
    chat = [run.setup.policy for run in runs if run.workload == "chat"]
    assert chat == ["static", "fcfs", "sjf", "fcfs", "sjf", "static", "sjf", "static", "fcfs"]
    assert len({run.name for run in runs}) == len(runs)


def test_runs_of_setups_that_differ_in_an_option_alone_have_names_of_their_own() -> None:
    load = Load(users=2)
    narrow, wide = (Setup(policy="fcfs", options=("--scheduler.max-num-seqs", rows)) for rows in ("2", "16"))
    names = {PlannedRun(setup=setup, workload="chat", load=load).name for setup in (Setup(policy="fcfs"), narrow, wide)}
    assert len(names) == 3


def test_the_order_turns_with_the_load_too() -> None:
    runs = plan("static", "fcfs", loads=[Load(users=1), Load(users=8)]).runs
    assert [run.setup.policy for run in runs] == ["static", "fcfs", "fcfs", "static"]


# -- what is measured ------------------------------------------------------------------------------------------------


def test_everything_is_measured_and_saved(tmp_path: Path) -> None:
    runs, failures = compare(tmp_path, World(), plan("static", "fcfs", repetitions=2))
    assert not failures and not differing_answers(runs)
    assert [folder.name for folder in runs.values()] == [
        "001-static-chat-2-users-repetition-1",
        "002-fcfs-chat-2-users-repetition-1",
        "003-fcfs-chat-2-users-repetition-2",
        "004-static-chat-2-users-repetition-2",
    ]
    for planned, folder in runs.items():
        run = load_run(folder)
        assert (run.setup, run.load, run.repetition) == (planned.setup, planned.load, planned.repetition)
        assert (run.server, run.generator_cpu_seconds, run.is_complete) == (SERVER, 0.25, True)
        assert (run.started_at, run.steps) == (STARTED_AT, [])
        assert [record.priority for record in run.requests] == [0, 1, 2]
        assert sorted(path.name for path in folder.iterdir()) == ["requests.jsonl", "run.json", TRACE_FILE]


def test_open_loops_are_shares_of_what_the_closed_loop_reached(tmp_path: Path) -> None:
    shares = [Load(share=0.5), Load(share=1.1)]
    runs, failures = compare(tmp_path, World(), plan("fcfs", loads=[USERS, *shares]))
    assert [planned.load.rate for planned in runs] == [0.0, 0.5, 1.1]  # 3 requests in 3 seconds
    assert not failures
    _, failures = compare(tmp_path / "other", World(), plan("fcfs", loads=shares[:1]))
    assert failures == [
        "fcfs, chat, 0.5 of capacity, repetition 1: no closed loop was measured, so there is no open loop"
    ]


def test_texts_that_differ_are_named_and_kept(tmp_path: Path) -> None:
    runs, _ = compare(tmp_path, World(texts={"fcfs": "other"}), plan("static", "fcfs", "sjf"))
    assert {planned.setup: differing for planned, differing in differing_answers(runs).items()} == {FCFS: ["q1"]}
    assert len(runs) == 3


# -- what dies -------------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_start_costs_its_runs_and_nothing_else(tmp_path: Path) -> None:
    runs, failures = compare(tmp_path, World(dies_at_start={"static"}), plan("static", "fcfs", repetitions=2))
    assert [run.setup for run in runs] == [FCFS, FCFS]
    assert len(failures) == 2
    assert failures[0].startswith("static, chat, 2 users, repetition 1: the server ended with exit code 2")


def test_a_server_that_dies_in_the_middle_leaves_what_was_measured(tmp_path: Path) -> None:
    world = World(dies_in_the_middle={("fcfs", 1)})
    runs, failures = compare(tmp_path, world, plan("static", "fcfs", repetitions=2))
    assert world.starts == ["static", "fcfs", "fcfs", "static"]
    assert "signal SIGKILL" in failures[0]
    broken = next(folder for run, folder in runs.items() if run.setup == FCFS and not run.repetition)
    run = load_run(broken)
    assert not run.is_complete and [record.request_id for record in run.requests] == ["q0"]


def test_a_comparison_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    what = plan("static", "fcfs", "sjf")
    _, first_failures = compare(tmp_path, World(dies_in_the_middle={("fcfs", 1)}), what)
    world = World()
    runs, failures = compare(tmp_path, world, what)
    assert world.starts == ["fcfs"]
    assert first_failures and not failures
    assert len(list(tmp_path.iterdir())) == 3
    assert all(load_run(folder).is_complete for folder in runs.values())


def test_a_comparison_that_was_killed_has_kept_what_had_ended(tmp_path: Path) -> None:
    world, what = World(), plan("static", "fcfs")
    run_load = world.run_load

    def killed(*args: object) -> None:
        if world.starts[-1] == "fcfs":
            raise KeyboardInterrupt
        run_load(*args)  # type: ignore[arg-type]

    world.run_load = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, world, what)
    again = World()
    compare(tmp_path, again, what)
    assert again.starts == ["fcfs"]


def test_a_folder_holds_one_comparison_and_goes_on_with_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = plan("fcfs", loads=[USERS, Load(share=0.5)])
    monkeypatch.setattr(study, "make_workloads", lambda plan, folder, names: save_requests(folder, names))
    begin(what, tmp_path)
    assert (tmp_path / "workload-chat.jsonl").exists()
    assert msgspec.json.decode((tmp_path / "plan.json").read_bytes(), type=Plan) == what
    with pytest.raises(LoadTestError, match="holds a comparison already; go on with --resume"):
        begin(what, tmp_path)


# -- the profile -----------------------------------------------------------------------------------------------------


def test_a_profile_is_a_series_of_runs_none_of_which_is_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, world = Plan(options=("--threads", "2")), World()
    save_requests(tmp_path, PROFILED)
    monkeypatch.setattr(study, "fit", lambda runs: REALISTIC)
    world.replaces(monkeypatch)
    assert measure_profile(what, tmp_path) == read_profile(tmp_path)
    assert len(world.starts) == len(SERIES)
    assert all("threads-2" in folder.name for folder in (tmp_path / "runs").iterdir())
    measure_profile(what, tmp_path)
    assert len(world.starts) == len(SERIES)


def test_a_profile_ends_with_the_first_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what, world = plan("fcfs"), World(dies_at_start={"fcfs"})
    save_requests(tmp_path, PROFILED)
    world.replaces(monkeypatch)
    with pytest.raises(ServerFailedError, match="the server ended with exit code 2"):
        measure_profile(what, tmp_path)
    assert world.starts == ["fcfs"]
