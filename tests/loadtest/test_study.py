"""Comparisons with servers and load generators that record what happens, and fail on command."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from shoal.loadtest.measure import TRACE_FILE, Tools, load_run
from shoal.loadtest.plan import Experiment, Plan, PlannedRun, interleave
from shoal.loadtest.profile import series
from shoal.loadtest.records import Load, LoadTestError, RequestRecord, ServerDiedError, ServerInfo, Setup
from shoal.loadtest.server import ServerProcess
from shoal.loadtest.study import Comparison, ProfileRuns, Runs, open_folder, sending
from shoal.loadtest.traffic import Begin, End
from shoal.loadtest.workload import WorkloadRequest, read_workload, write_workload
from tests.loadtest.made_runs import SERVER

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

    def start_server(self, options: Sequence[str], log: Path) -> AbstractContextManager[ServerProcess]:
        policy = options[options.index("--policy") + 1]
        self.starts.append(policy)
        if policy in self.dies_at_start:
            raise ServerDiedError("the server ended with exit code 2; the last lines of its log:\nno")
        Path(options[options.index("--trace") + 1]).write_text("[")
        return nullcontext(FakeServer(policy))  # type: ignore[arg-type]

    def run_load(self, url: str, workload: Path, load: Load, results: Path, observe: Callable[[int], None]) -> None:
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
        observe(len(answers))
        if dies:
            raise ServerDiedError("the server ended by signal SIGKILL; its log is empty")

    @property
    def tools(self) -> Tools:
        return Tools(start_server=self.start_server, run_load=self.run_load, warm=lambda url: None)


@dataclass
class FakeServer:
    url: str

    def info(self) -> ServerInfo:
        return SERVER

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


def plan(*experiments: Experiment) -> Plan:
    return Plan(experiments=experiments, num_requests=3)


def experiment(*setups: Setup, **values: object) -> Experiment:
    return replace(Experiment(workload="chat", setups=setups, loads=(USERS,)), **values)


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


def compare(folder: Path, world: World, what: Plan) -> Comparison:
    found = Comparison(what, Runs(folder, "tiny", world.tools), {name: requests() for name in what.workloads})
    found.run()
    return found


# -- order -----------------------------------------------------------------------------------------------------------


def test_repetitions_are_outermost_and_no_setup_always_comes_first() -> None:
    both = (experiment(STATIC, FCFS, SJF, repetitions=3), experiment(STATIC, FCFS, workload="code", repetitions=2))
    runs = list(interleave(both, lambda one: one.loads))
    assert [run.repetition for run in runs] == [0] * 5 + [1] * 5 + [2] * 3
    assert [run.workload for run in runs[:10]] == (["chat"] * 3 + ["code"] * 2) * 2
    chat = [run.setup.policy for run in runs if run.workload == "chat"]
    assert chat == ["static", "fcfs", "sjf", "fcfs", "sjf", "static", "sjf", "static", "fcfs"]
    assert len({run.name for run in runs}) == len(runs)


def test_runs_of_setups_that_differ_in_an_option_alone_have_names_of_their_own() -> None:
    load = Load(users=2)
    narrow, wide = (Setup(policy="fcfs", options=("--scheduler.max-num-seqs", rows)) for rows in ("2", "16"))
    names = {PlannedRun(setup=setup, workload="chat", load=load).name for setup in (Setup(policy="fcfs"), narrow, wide)}
    assert len(names) == 3


def test_the_order_turns_with_the_load_too() -> None:
    loads = (Load(users=1), Load(users=8))
    runs = interleave([experiment(STATIC, FCFS, loads=loads)], lambda one: one.loads)
    assert [run.setup.policy for run in runs] == ["static", "fcfs", "fcfs", "static"]


# -- what is measured ------------------------------------------------------------------------------------------------


def test_everything_is_measured_and_saved(tmp_path: Path) -> None:
    found = compare(tmp_path, World(), plan(experiment(STATIC, FCFS, repetitions=2)))
    assert not found.failures and not found.incomplete
    assert [folder.name for folder in found.runs.values()] == [
        "001-static-chat-2-users-r1",
        "002-fcfs-chat-2-users-r1",
        "003-fcfs-chat-2-users-r2",
        "004-static-chat-2-users-r2",
    ]
    for planned, folder in found.runs.items():
        run = load_run(folder)
        assert (run.setup, run.load, run.repetition) == (planned.setup, planned.load, planned.repetition)
        assert (run.server, run.generator_cpu_seconds, run.is_complete) == (SERVER, 0.25, True)
        assert (run.started_at, run.steps) == (STARTED_AT, [])
        assert [record.priority for record in run.requests] == [0, 1, 2]
        assert sorted(path.name for path in folder.iterdir()) == ["requests.jsonl", "run.json", TRACE_FILE]


def test_open_loops_are_shares_of_what_the_closed_loop_reached(tmp_path: Path) -> None:
    world = World()
    found = compare(tmp_path, world, plan(experiment(STATIC, FCFS), experiment(FCFS, loads=(), shares=(0.5, 1.1))))
    assert [load.rate for load in world.loads] == [0.0, 0.0, 0.5, 1.1]  # 3 requests in 3 seconds
    assert not found.failures
    alone = compare(tmp_path / "other", World(), plan(experiment(FCFS, loads=(), shares=(0.5,))))
    assert alone.failures == ["chat: no closed loop was measured, so there are no open loops"]


def test_one_client_alone_is_sent_what_it_sends_among_the_others(tmp_path: Path) -> None:
    world = World()
    alone = experiment(FCFS, workload="two-tenants:modest", loads=(Load(rate=2.0, seed=5),))
    found = compare(tmp_path, world, plan(alone))
    assert world.loads == [Load(seed=5)]  # at the times in the workload
    (planned,) = found.runs
    assert planned.load.rate == 2.0
    (sent,) = world.sent["fcfs"]
    assert sent.client == "modest" and sent.arrival_time is not None
    nobody = PlannedRun(setup=FCFS, workload="two-tenants:nobody", load=USERS)
    with pytest.raises(LoadTestError, match=r"'nobody'; clients are greedy, modest"):
        sending(nobody, {"two-tenants": requests()})


def test_texts_that_differ_are_named_and_kept(tmp_path: Path) -> None:
    found = compare(tmp_path, World(texts={"fcfs": "other"}), plan(experiment(STATIC, FCFS, SJF)))
    assert {name: list(differing) for name, differing in found.differing.items()} == {"chat": ["q1"]}
    assert found.incomplete == [
        "fcfs, chat, 2 users, repetition 1: 1 answers differ from those of the first run of chat: q1"
    ]
    assert len(found.runs) == 3


# -- what dies -------------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_start_costs_its_setup_and_nothing_else(tmp_path: Path) -> None:
    world = World(dies_at_start={"static"})
    found = compare(tmp_path, world, plan(experiment(STATIC, FCFS, repetitions=2)))
    assert world.starts == ["static", "fcfs", "fcfs"]
    assert [run.setup for run in found.runs] == [FCFS, FCFS]
    (complaint,) = found.failures
    assert complaint.startswith("static, chat, 2 users, repetition 1: the server ended with exit code 2")
    assert complaint.endswith("further runs of this setup are left out")


def test_a_server_that_dies_in_the_middle_leaves_what_was_measured(tmp_path: Path) -> None:
    world = World(dies_in_the_middle={("fcfs", 1)})
    found = compare(tmp_path, world, plan(experiment(STATIC, FCFS, repetitions=2)))
    assert world.starts == ["static", "fcfs", "fcfs", "static"]
    assert "signal SIGKILL" in found.failures[0]
    assert any("broke off: 1 requests" in line for line in found.incomplete)
    broken = next(folder for run, folder in found.runs.items() if run.setup == FCFS and not run.repetition)
    run = load_run(broken)
    assert not run.is_complete and [record.request_id for record in run.requests] == ["q0"]


def test_a_comparison_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    what = plan(experiment(STATIC, FCFS, SJF))
    first = compare(tmp_path, World(dies_in_the_middle={("fcfs", 1)}), what)
    world = World()
    second = compare(tmp_path, world, what)
    assert world.starts == ["fcfs"]
    assert first.failures and not second.failures
    assert len(list(tmp_path.iterdir())) == 3
    assert all(load_run(folder).is_complete for folder in second.runs.values())


def test_a_comparison_that_was_killed_has_kept_what_had_ended(tmp_path: Path) -> None:
    world, what = World(), plan(experiment(STATIC, FCFS))
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


def test_a_folder_holds_one_comparison_and_goes_on_with_its_plan(tmp_path: Path) -> None:
    what, folder = plan(experiment(FCFS, shares=(0.5,))), tmp_path / "out"
    with pytest.raises(LoadTestError, match=r"plan\.json cannot be read"):
        open_folder(folder, None)
    assert open_folder(folder, what) is what
    stale = folder / "workload-chat.jsonl"  # of an attempt that came to nothing
    write_workload(stale, requests())
    open_folder(folder, what)
    assert not stale.exists()
    (folder / "plan.json").write_bytes(msgspec.json.encode(what))
    assert open_folder(folder, None) == what
    with pytest.raises(LoadTestError, match="holds a comparison already; go on with --resume"):
        open_folder(folder, what)


# -- the profile -----------------------------------------------------------------------------------------------------


def profile_runs(folder: Path, world: World, num_requests: int = 256) -> ProfileRuns:
    what = Plan(options=("--threads", "2"), experiments=(experiment(FCFS),), num_requests=num_requests)
    taking = ProfileRuns(folder, what, world.tools)
    for file in taking.workloads:
        write_workload(file, requests())
    return taking


def test_the_series_is_run_again_and_again_and_nothing_twice(tmp_path: Path) -> None:
    length, first, again = len(series(None, ())), World(), World()
    taking = profile_runs(tmp_path, first)
    taking.take_series()
    taking.take()
    taking.take()
    assert len(first.starts) == length + 2
    names = [folder.name for folder in (tmp_path / "runs").iterdir()]
    assert all("threads-2" in name for name in names)
    resumed = profile_runs(tmp_path, again)
    for _ in range(length + 3):
        resumed.take()
    assert len(again.starts) == 1, "all but the last were there"
    taking.take_series()
    assert len(first.starts) == 2 * length - 1, "the series that was begun is completed"


def test_the_workloads_of_a_profile_are_made_once_for_all_its_runs(tmp_path: Path) -> None:
    most: defaultdict[str, int] = defaultdict(int)
    for stretch in series(None, ()):
        most[stretch.workload] = max(most[stretch.workload], stretch.num_requests)
    assert {name: number for name, number, _ in profile_runs(tmp_path, World()).workloads.values()} == most


def test_a_failure_amid_the_comparison_costs_it_nothing(tmp_path: Path) -> None:
    world = World(dies_at_start={"fcfs"})
    taking = profile_runs(tmp_path, world)
    taking.try_to(taking.take)
    taking.try_to(taking.take)
    assert world.starts == ["fcfs"], "no further one after a failure"
    assert "broke off: the server ended with exit code 2" in taking.failure
    with pytest.raises(LoadTestError, match="exit code 2"):
        taking.take_series()


def test_between_few_runs_the_profile_has_its_turn(tmp_path: Path) -> None:
    turns: list[int] = []
    world = World()
    what = plan(experiment(STATIC, FCFS, repetitions=4))
    found = Comparison(what, Runs(tmp_path, "tiny", world.tools), {"chat": requests()})
    found.run(lambda: turns.append(len(world.starts)))
    assert turns == [3, 6]
