"""What the processes of a locust run do: send requests, collect what came of them, or both."""

from __future__ import annotations

import logging
import resource
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.event import EventHook
from locust.rpc import Message
from locust.runners import MasterRunner, WorkerRunner

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.records import Load, RequestRecord
from shoal.loadtest.results import ResultsWriter
from shoal.loadtest.stream import PATH, CompletionClient
from shoal.loadtest.traffic import Share, Traffic
from shoal.loadtest.workload import WorkloadRequest, read_workload, write_workload

logger = logging.getLogger("shoal.loadtest")

_SHARE, _RECORD, _END = "shoal-share", "shoal-record", "shoal-end"  # messages between master and workers
_POLL_SECONDS = 0.1


class LocustTest(ABC):
    """The load test in one process of locust.

    Bad options end a headless process with exit code 2 and a line that says what is wrong; with the web interface, in
    which options may still be changed, they are logged when the run starts.
    """

    def __init__(self, environment: Environment) -> None:
        assert environment.runner is not None
        self.environment = environment
        self.runner = environment.runner
        options: Any = environment.parsed_options
        self.options = options
        if self.options.headless:
            self._check_options()
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stop.add_listener(self.end)

    def _check_options(self) -> None:
        try:
            requests, load = self.read_options()
            Traffic(requests, load, CompletionClient("http://unused", timeout_seconds=1), lambda _: None)
        except LoadTestError as error:
            if not isinstance(self.runner, WorkerRunner):  # its master says so
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    def read_options(self) -> tuple[list[WorkloadRequest], Load]:
        """The workload and the load that the options name.

        Raises:
            LoadTestError: they are not right.
        """
        options = self.options
        if not options.workload:
            raise LoadTestError("--workload FILE is needed: the requests to send, as JSON lines")
        if options.rate and options.replay:
            raise LoadTestError("give either --rate or --replay")
        is_open = options.rate or options.replay
        load = Load(
            users=0 if is_open else self.runner.target_user_count or options.num_users or 1,
            think_seconds=options.think_seconds,
            rate=options.rate,
            burstiness=options.burstiness,
            seed=options.load_seed,
        )
        return read_workload(Path(options.workload)), load

    def _start(self, **_: Any) -> None:
        try:
            self.begin(*self.read_options())
        except LoadTestError as error:
            logger.error("%s", error)
            self.environment.process_exit_code = 2
            self.give_up()

    def finish(self) -> None:
        """End the run, and without a web interface, or with `--autoquit`, the process."""
        gevent.spawn(self._finish)  # on its own, because what belongs to the run is killed

    def _finish(self) -> None:
        web_ui = self.environment.web_ui
        if web_ui is None:
            self.runner.quit()
            return
        self.runner.stop()
        if self.options.autoquit >= 0:
            gevent.sleep(self.options.autoquit)
            self.runner.quit()
            web_ui.stop()

    @abstractmethod
    def begin(self, requests: list[WorkloadRequest], load: Load) -> None:
        """A run starts."""

    @abstractmethod
    def give_up(self) -> None:
        """The run could not start."""

    @abstractmethod
    def end(self, **_: Any) -> None:
        """The run has ended, or was cut off."""


class SendingTest(LocustTest):
    """A process that sends: a worker, or one that is alone.

    Attributes:
        share: its part of the load.
        traffic: of the present run; None before the first.
    """

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.share = Share()
        self.traffic: Traffic | None = None
        self._cpu_seconds_before = 0.0
        environment.events.test_stopping.add_listener(self._stop)

    def begin(self, requests: list[WorkloadRequest], load: Load) -> None:
        client = CompletionClient(self.environment.host or "", timeout_seconds=self.options.request_timeout)
        traffic = self.traffic = Traffic(requests, load, client, self._report, self.share)
        self._cpu_seconds_before = cpu_seconds()
        traffic.start()
        self.started(requests, traffic.started_at)
        gevent.spawn(self._watch, traffic)

    def _watch(self, traffic: Traffic) -> None:
        traffic.finished.wait()
        if traffic is self.traffic:
            self.all_sent()

    def _stop(self, **_: Any) -> None:
        if self.traffic:
            self.traffic.stop()

    def _report(self, record: RequestRecord) -> None:
        fire_events(self.environment.events.request, record)
        self.deliver(record)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of this process since the run started."""
        return cpu_seconds() - self._cpu_seconds_before

    def started(self, requests: list[WorkloadRequest], started_at: float) -> None:
        """The run has started, at this time of the monotonic clock."""

    @abstractmethod
    def deliver(self, record: RequestRecord) -> None:
        """Hand on what came of a request."""

    @abstractmethod
    def all_sent(self) -> None:
        """All requests of the share have ended, or there is no server any more."""


class LocalTest(SendingTest):
    """A process that is alone."""

    _collector: Collector | None = None

    def started(self, requests: list[WorkloadRequest], started_at: float) -> None:
        self._collector = Collector(self.options, requests, started_at)

    def deliver(self, record: RequestRecord) -> None:
        assert self._collector is not None
        self._collector.add(record)

    def all_sent(self) -> None:
        self.finish()

    def give_up(self) -> None:
        self.finish()

    def end(self, **_: Any) -> None:
        if self._collector:
            self._collector.end(self.cpu_seconds)


class WorkerTest(SendingTest):
    """One of several that send: it has its share from the master, and hands its records to it."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.runner.register_message(_SHARE, self._take_share)

    def _take_share(self, msg: Message, **_: Any) -> None:
        self.share = Share(**msg.data)

    def deliver(self, record: RequestRecord) -> None:
        self.runner.send_message(_RECORD, asdict(record))

    def all_sent(self) -> None:
        self.end()

    def give_up(self) -> None:
        self.runner.send_message(_END, {"cpu_seconds": 0.0})

    def end(self, **_: Any) -> None:
        self.runner.send_message(_END, {"cpu_seconds": self.cpu_seconds})


class MasterTest(LocustTest):
    """Sends nothing: it deals the workload to the workers, collects their records, and ends the run when all workers
    have ended or are gone."""

    runner: MasterRunner

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._worker_cpu_seconds: dict[str, float] = {}
        self._cpu_seconds_before = 0.0
        self._collector: Collector | None = None
        self.runner.register_message(_RECORD, self._take_record)
        self.runner.register_message(_END, self._take_end)
        environment.events.quitting.add_listener(self.end)  # the last records come after the run was cut off

    def begin(self, requests: list[WorkloadRequest], load: Load) -> None:
        workers = sorted(self._workers())
        if 0 < load.users < len(workers):
            raise LoadTestError(f"users must be at least 1 for each of {len(workers)} workers, not {load.users} in all")
        self._worker_cpu_seconds = {}
        self._cpu_seconds_before = cpu_seconds()
        self._collector = Collector(self.options, requests, time.monotonic())
        for index, worker in enumerate(workers):
            self.runner.send_message(_SHARE, asdict(Share(index, len(workers))), client_id=worker)
        gevent.spawn(self._watch, self._collector, set(workers))

    def _workers(self) -> set[str]:
        clients = self.runner.clients
        return {worker.id for worker in clients.ready + clients.spawning + clients.running}

    def _watch(self, collector: Collector, dealt: set[str]) -> None:
        while (dealt & self._workers()) - self._worker_cpu_seconds.keys():
            gevent.sleep(_POLL_SECONDS)
            if collector is not self._collector:
                return
        self.finish()

    def _take_record(self, msg: Message, **_: Any) -> None:
        if self._collector:
            self._collector.add(RequestRecord(**msg.data))

    def _take_end(self, msg: Message, **_: Any) -> None:
        self._worker_cpu_seconds[msg.node_id] = msg.data["cpu_seconds"]

    def give_up(self) -> None:
        self.finish()

    def end(self, **_: Any) -> None:
        if self._collector:
            own = cpu_seconds() - self._cpu_seconds_before
            self._collector.end(own + sum(self._worker_cpu_seconds.values()))


class Collector:
    """Writes the files that the options name: of results while they come, and of what was sent at the end."""

    def __init__(self, options: Any, requests: list[WorkloadRequest], started_at: float) -> None:
        self._requests = {request.request_id: request for request in requests}
        self._sent_at: dict[str, float] = {}
        self._record = Path(options.record) if options.record else None
        self._writer = ResultsWriter(Path(options.results), started_at=started_at) if options.results else None

    def add(self, record: RequestRecord) -> None:
        self._sent_at[record.request_id] = record.sent_at
        if self._writer:
            self._writer.add(record)

    def end(self, cpu_seconds: float) -> None:
        if self._writer:
            self._writer.end(cpu_seconds)
        if self._record:
            sent = sorted(self._sent_at.items(), key=lambda item: item[1])
            write_workload(self._record, [replace(self._requests[name], arrival_time=at) for name, at in sent])


def locust_test(environment: Environment) -> LocustTest:
    """The test of this process, whatever its part."""
    if isinstance(environment.runner, MasterRunner):
        return MasterTest(environment)
    return WorkerTest(environment) if isinstance(environment.runner, WorkerRunner) else LocalTest(environment)


def fire_events(request_event: EventHook, record: RequestRecord) -> None:
    """Tell locust of a request that has ended: see `loadtest/locustfile.py` for what its rows mean."""
    rows: list[tuple[str, str, float]] = []
    if record.token_times:
        first, last = record.token_times[0], record.token_times[-1]
        rows.append(("TTFT", "to the first token", 1000 * (first - record.sent_at)))
        if len(record.token_times) > 1:
            rows.append(("ITL", "mean of an answer", 1000 * (last - first) / (len(record.token_times) - 1)))
    if record.error is None:
        rows.append(("tokens", "of an answer (no time)", record.num_output_tokens))
    for request_type, name, value in rows:
        request_event.fire(
            request_type=request_type, name=name, response_time=value, response_length=0, exception=None, context={}
        )
    request_event.fire(
        request_type="POST",
        name=PATH,
        response_time=1000 * ((record.finished_at or record.sent_at) - record.sent_at),
        response_length=0,
        exception=LoadTestError(record.error) if record.error else None,
        context={},
    )


def cpu_seconds() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
