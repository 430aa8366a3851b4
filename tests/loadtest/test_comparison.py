"""Comparisons with servers and load generators that record what happens, and fail on command."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from shoal.loadtest.comparison import Comparison, Results
from shoal.loadtest.records import LoadTestError, ServerDiedError
from shoal.loadtest.measuring import Measurer, server_options
from shoal.loadtest.metrics import Slo
from shoal.loadtest.plan import Experiment, Plan, PlannedRun, interleave
from shoal.loadtest.records import Load, RequestRecord, Setup
from shoal.loadtest.results import LocustResult, ResultsWriter, read_results
from shoal.loadtest.server_process import Announced, ServerProcess
from shoal.loadtest.steps import EngineRequest, Step
from shoal.loadtest.storage import RUN_FILE, TRACE_FILE, Storage
from shoal.loadtest.workload import WorkloadRequest, read_workload
from shoal.loadtest.workload_files import WorkloadFiles

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
    num_alive: int = 0

    def start_server(self, options: Sequence[str], log: Path) -> AbstractContextManager[ServerProcess]:
        policy = options[options.index("--policy") + 1]
        self.starts.append(policy)
        if policy in self.dies_at_start:
            raise ServerDiedError("the server ended with exit code 2; its last words:\nno")
        Path(options[options.index("--trace") + 1]).write_text("[")
        return nullcontext(FakeServer(policy))  # type: ignore[arg-type]

    def run_load(
        self, url: str, workload: Path, load: Load, results: Path, *, observe: Callable[[int], None]
    ) -> LocustResult:
        self.loads.append(load)
        policy = self.starts[-1]
        dies = (policy, self.starts.count(policy)) in self.dies_in_the_middle
        requests = read_workload(workload)
        writer = ResultsWriter(results, started_at=STARTED_AT)
        for number, request in enumerate(requests[:1] if dies else requests, 1):
            writer.add(answer(request, number, self.texts.get(policy, "text")))
            observe(number)
        if not dies:
            writer.end(cpu_seconds=0.25)
        writer.close()
        if dies:
            raise ServerDiedError("the server ended by signal SIGKILL; it said nothing")
        return read_results(results)


@dataclass
class FakeServer:
    url: str

    @property
    def announced(self) -> Announced:
        return Announced(url=self.url, num_blocks=8, block_size=32, max_model_len=64, max_num_seqs=4)

    def cpu_seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    def check(self) -> None:
        pass


class NoProgress:
    def __init__(self) -> None:
        self.num_expected = self.num_ended = 0

    def expect(self, num_runs: int) -> None:
        self.num_expected += num_runs

    def begin(self, planned: PlannedRun) -> None:
        pass

    def observe(self, num_requests: int) -> None:
        pass

    def end(self) -> None:
        self.num_ended += 1


def answer(request: WorkloadRequest, number: int, text: str) -> RequestRecord:
    return RequestRecord(
        request_id=request.request_id,
        client=request.client,
        engine_id=f"cmpl-{number}",
        sent_at=0.0,
        token_times=[float(number)],
        finished_at=float(number),
        num_output_tokens=request.num_output_tokens,
        text_hash=text if number == 2 else "the same",
    )


def plan(*experiments: Experiment) -> Plan:
    return Plan(experiments=experiments, num_requests=3, slo=Slo())


def experiment(*setups: Setup, **values: object) -> Experiment:
    return replace(Experiment(workload="chat", setups=setups, loads=(USERS,)), **values)  # type: ignore[arg-type]


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


def no_trace(path: Path) -> tuple[list[Step], dict[str, EngineRequest]]:
    assert path.read_text() == "["
    return [], {}


def compare(
    folder: Path, world: World, what: Plan, *, is_resumed: bool = False, progress: NoProgress | None = None
) -> Results:
    storage = Storage(folder, what, is_resumed=is_resumed, read=no_trace)
    files = WorkloadFiles(storage)
    for name in files.missing(what.workloads):
        files.copy(name, requests())
    measurer = Measurer(
        model="tiny", storage=storage, start_server=world.start_server, run_load=world.run_load, warm=lambda url: None
    )
    return Comparison(what, storage, measurer.measure, files.sending, progress or NoProgress()).run()


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
    progress = NoProgress()
    what = plan(experiment(STATIC, FCFS, repetitions=2))
    results = compare(tmp_path, World(), what, progress=progress)
    assert results.complaints == []
    assert (progress.num_expected, progress.num_ended) == (4, 4)
    assert [folder.name for folder in results.runs.values()] == [
        "001-static-chat-2-users-r1",
        "002-fcfs-chat-2-users-r1",
        "003-fcfs-chat-2-users-r2",
        "004-static-chat-2-users-r2",
    ]
    for planned, folder in results.runs.items():
        run = Storage(tmp_path, what, is_resumed=True, read=no_trace).load(folder)
        assert (run.setup, run.load, run.repetition) == (planned.setup, planned.load, planned.repetition)
        assert (run.block_size, run.generator_cpu_seconds, run.is_complete) == (32, 0.25, True)
        assert [record.priority for record in run.requests] == [0, 1, 2]
        assert (folder / TRACE_FILE).exists() and not (folder / "trace.json").exists()


def test_steps_are_on_the_clock_of_the_run_and_without_the_warming(tmp_path: Path) -> None:
    def trace(path: Path) -> tuple[list[Step], dict[str, EngineRequest]]:
        steps = [Step(start, 0.5, 0.4, [], 0, 8, 0, 0, 0, 0, 0) for start in (STARTED_AT - 1, STARTED_AT + 2)]
        ways = [EngineRequest(name, at, at, None) for name, at in (("warm", STARTED_AT - 1), ("a", STARTED_AT + 1))]
        return steps, {way.request_id: way for way in ways}

    what = plan(experiment(FCFS))
    (folder,) = compare(tmp_path, World(), what).runs.values()
    run = Storage(tmp_path, what, is_resumed=True, read=trace).load(folder)
    assert [step.start for step in run.steps] == [2.0]
    assert run.engine_requests == {"a": EngineRequest("a", 1.0, 1.0, None)}


def test_open_loops_are_shares_of_what_the_closed_loop_reached(tmp_path: Path) -> None:
    world = World()
    results = compare(tmp_path, world, plan(experiment(STATIC, FCFS), experiment(FCFS, loads=(), shares=(0.5, 1.1))))
    assert [load.rate for load in world.loads] == [0.0, 0.0, 0.5, 1.1]  # 3 requests in 3 seconds
    assert not results.complaints


def test_one_client_alone_is_sent_what_it_sends_among_the_others(tmp_path: Path) -> None:
    world = World()
    alone = experiment(FCFS, workload="two-tenants:modest", loads=(Load(rate=2.0, seed=5),))
    results = compare(tmp_path, world, plan(alone))
    assert world.loads == [Load(seed=5)]  # when the file says
    (planned,) = results.runs
    assert planned.load.rate == 2.0
    (file,) = tmp_path.glob("workload-two-tenants-modest-*.jsonl")
    (sent,) = read_workload(file)
    assert sent.client == "modest" and sent.arrival_time is not None
    with pytest.raises(LoadTestError, match=r"'nobody'; clients are greedy, modest"):
        compare(tmp_path / "other", world, plan(replace(alone, workload="two-tenants:nobody")))


def test_texts_that_differ_are_named_and_kept(tmp_path: Path) -> None:
    results = compare(tmp_path, World(texts={"fcfs": "other"}), plan(experiment(STATIC, FCFS, SJF)))
    assert results.same_work.differing == {"chat": ["q1"]}
    assert results.complaints == [
        "fcfs, chat, 2 users, repetition 1: 1 answers differ from those of the first run of chat: q1"
    ]
    assert len(results.runs) == 3


# -- what dies -------------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_start_costs_its_setup_and_nothing_else(tmp_path: Path) -> None:
    world = World(dies_at_start={"static"})
    results = compare(tmp_path, world, plan(experiment(STATIC, FCFS, repetitions=2)))
    assert world.starts == ["static", "fcfs", "fcfs"]
    assert [run.setup for run in results.runs] == [FCFS, FCFS]
    (complaint,) = results.complaints
    assert complaint.startswith("static, chat, 2 users, repetition 1: the server ended with exit code 2")
    assert complaint.endswith("further runs of this setup are left out")


def test_a_server_that_dies_in_the_middle_leaves_what_was_measured(tmp_path: Path) -> None:
    world = World(dies_in_the_middle={("fcfs", 1)})
    what = plan(experiment(STATIC, FCFS, repetitions=2))
    results = compare(tmp_path, world, what)
    assert world.starts == ["static", "fcfs", "fcfs", "static"]
    assert "signal SIGKILL" in results.failures[0]
    assert any("broke off: 1 requests" in line for line in results.incomplete)
    broken = next(folder for run, folder in results.runs.items() if run.setup == FCFS and not run.repetition)
    run = Storage(tmp_path, what, is_resumed=True, read=no_trace).load(broken)
    assert not run.is_complete and [record.request_id for record in run.requests] == ["q0"]


def test_a_comparison_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    what = plan(experiment(STATIC, FCFS, SJF))
    first = compare(tmp_path, World(dies_in_the_middle={("fcfs", 1)}), what)
    world = World()
    second = compare(tmp_path, world, what, is_resumed=True)
    assert world.starts == ["fcfs"]
    assert not second.complaints and first.complaints
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert json.loads((second.runs[next(run for run in second.runs if run.setup == FCFS)] / RUN_FILE).read_text())[
        "is_complete"
    ]


def test_a_comparison_that_was_killed_has_kept_what_had_ended(tmp_path: Path) -> None:
    world, what = World(), plan(experiment(STATIC, FCFS))
    run_load = world.run_load

    def killed(*args: object, **named: object) -> LocustResult:
        if world.starts[-1] == "fcfs":
            raise KeyboardInterrupt
        return run_load(*args, **named)  # type: ignore[arg-type]

    world.run_load = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, world, what)
    again = World()
    compare(tmp_path, again, what, is_resumed=True)
    assert again.starts == ["fcfs"]


def test_a_folder_holds_one_comparison(tmp_path: Path) -> None:
    what = plan(experiment(FCFS))
    compare(tmp_path, World(), what)
    with pytest.raises(LoadTestError, match="go on with --resume"):
        compare(tmp_path, World(), what)
    with pytest.raises(LoadTestError, match="another comparison, which differs in experiments, seed"):
        compare(tmp_path, World(), replace(plan(experiment(SJF)), seed=1), is_resumed=True)


# -- the server process ----------------------------------------------------------------------------------------------

READY = """
print('INFO shoal: KV cache: 12 blocks of 16 tokens, 3 MiB; requests up to 128 tokens, 4 at once, policy fcfs')
print('INFO shoal: ready after 0.1 s: http://127.0.0.1:1234', flush=True)
import time, signal
{ignore}
time.sleep(60)
"""


def server(tmp_path: Path, script: str, start_seconds: float = 30.0) -> ServerProcess:
    return ServerProcess([], tmp_path / "log", command=(sys.executable, "-c", script), start_seconds=start_seconds)


def test_a_server_says_where_and_what_it_is(tmp_path: Path) -> None:
    with server(tmp_path, READY.format(ignore="")) as process:
        assert process.announced == Announced(
            url="http://127.0.0.1:1234", num_blocks=12, block_size=16, max_model_len=128, max_num_seqs=4
        )
        process.check()
        assert min(process.cpu_seconds()) >= 0.0
    with pytest.raises(ServerDiedError, match="by signal SIGTERM"):
        process.check()


def test_a_server_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.loadtest.server_process.END_SECONDS", 0.1)
    with server(tmp_path, READY.format(ignore="signal.signal(signal.SIGTERM, signal.SIG_IGN)")) as process:
        pass
    with pytest.raises(ServerDiedError, match=f"{signal.SIGKILL.name}|{signal.SIGTERM.name}"):
        process.check()


def test_a_server_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    script = "import sys; print('shoal serve: no such model'); sys.exit(2)"
    with (
        pytest.raises(ServerDiedError, match=r"(?s)exit code 2; its last words:.*no such model"),
        server(tmp_path, script),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerDiedError, match=r"not ready after 0 s"),
        server(tmp_path, "import time; time.sleep(60)", 0.2),
    ):
        pass


def test_the_command_line_of_a_server(tmp_path: Path) -> None:
    setup = Setup(policy="sjf", speculation="draft", options=("--max-num-seqs", "8"))
    assert server_options("tiny", setup, tmp_path / "t") == [
        *("--model", "tiny", "--policy", "sjf", "--speculation", "draft", "--trace", str(tmp_path / "t")),
        *("--max-num-seqs", "8"),
    ]
