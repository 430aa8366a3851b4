"""The load generator, for locust.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --workload chat.jsonl --users 32 --headless

Each request of the workload is sent once, and the run ends with the last answer.  `--users` alone is a closed loop:
users take sessions of the workload in order and, with `--think-seconds`, pause before each request but their first.
`--rate` makes an open loop, in which requests are sent when they are due, whatever the server does.  So does
`--replay`, at the times that the workload names, such as those that `--record` noted.  Users play no part then.

Locust's table, CSV and report have these rows; a failed request is a failure of POST:

- `POST`: from the request (in an open loop: from when it was due) to the end of the answer, in ms
- `TTFT`: to the first token, in ms
- `ITL`: mean time between the events of one answer, in ms
- `tokens`: output tokens of a request; not a time, though its columns say so

"Aggregated" adds these up and means nothing.  With `--processes`, or `--master` and `--worker`, each worker takes its
part of the workload.  It writes what it measured to files of its own, whose names end in its number.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, BinaryIO

import gevent
import msgspec
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner
from msgspec import Struct
from msgspec.structs import replace

from shoal.loadtest.records import Load, LoadTestError, RequestRecord
from shoal.loadtest.stream import CALL, CompletionClient
from shoal.loadtest.traffic import Begin, End, Traffic
from shoal.loadtest.workload import WorkloadRequest, read_workload

logger = logging.getLogger("shoal.loadtest")

ALL_SENT = "shoal-all-sent"  # message of a process that sends


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument_group("Load on a language model server").add_argument
    add("--workload", metavar="FILE", default="", help="requests to send, as JSON lines")
    add("--rate", type=float, default=0.0, help="open loop: requests a second")
    add("--burstiness", type=float, default=1.0, help="open loop: squared variation of arrivals; 1 is Poisson")
    add("--replay", action="store_true", help="open loop: send each request at the arrival_time in the workload")
    add("--think-seconds", type=float, default=0.0, help="closed loop: mean pause of a user before a request")
    add("--load-seed", type=int, default=0, help="of arrivals and pauses")
    add("--request-timeout", type=float, default=600.0, help="longest silence of the server, in seconds")
    add("--results", metavar="FILE", default="", help="write what was measured of each request, as JSON lines")
    add("--record", metavar="FILE", default="", help="write what was sent, and when, as a workload for --replay")


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    if not isinstance(environment.runner, MasterRunner):
        CompletionUser.sender = Sender(environment)
    if not isinstance(environment.runner, WorkerRunner):
        environment.runner.register_message(ALL_SENT, environment.shape_class.note_sent)
        environment.events.quitting.add_listener(check_recorded)


class UntilAllIsSent(LoadTestShape):
    """The users that are asked for, until every process that sends has sent its part."""

    use_common_options = True
    num_sent = 0

    def note_sent(self, **_: Any) -> None:
        self.num_sent += 1

    def reset_time(self) -> None:
        """Locust calls it at the start of each run."""
        super().reset_time()
        self.num_sent = 0

    def tick(self) -> tuple[int, float] | None:
        runner: Any = self.runner
        options = runner.environment.parsed_options
        is_over = options.run_time and self.get_run_time() > options.run_time
        if is_over or 0 < runner.worker_count <= self.num_sent:
            return None
        options.expect_workers = runner.worker_count  # an option that locust hands to its workers
        return options.num_users or 1, options.spawn_rate or 1


class CompletionUser(User):
    """A user of a closed loop; in an open loop it only waits for the end."""

    sender: Sender

    @task
    def run_to_the_end(self) -> None:
        if traffic := self.sender.traffic:
            traffic.serve_user()
            traffic.finished.wait()
        raise StopUser


class Sender:
    """A process that sends: a worker, or the only process.

    Attributes:
        traffic: of the present run; None before the first.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.runner: Any = environment.runner
        self.options: Any = environment.parsed_options
        self.traffic: Traffic | None = None
        self._requests: dict[str, WorkloadRequest] = {}
        self._results: BinaryIO | None = None
        self._recorded: BinaryIO | None = None
        self._cpu_seconds_before = 0.0
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stopping.add_listener(self._stop)
        environment.events.test_stop.add_listener(self._end)

    def _start(self, **_: Any) -> None:
        self.traffic, self._results, self._recorded = None, None, None
        self._cpu_seconds_before = time.process_time()
        try:
            self.traffic = self._traffic()
        except LoadTestError as error:
            logger.error("%s", error)
            self.environment.process_exit_code = 2
        else:
            self.traffic.start()
            self._results, self._recorded = self._open(self.options.results), self._open(self.options.record)
            _write(self._results, Begin(self.traffic.started_at))
        gevent.spawn(self._watch, self.traffic)  # on its own, because what belongs to the run is killed at its end

    def _traffic(self) -> Traffic:
        """The traffic that the options ask for; raises LoadTestError if they are not right."""
        options = self.options
        if not options.workload:
            raise LoadTestError("--workload FILE is needed: the requests to send, as JSON lines")
        if options.rate and options.replay:
            raise LoadTestError("give either --rate or --replay")
        load = Load(
            users=0 if options.rate or options.replay else options.num_users or 1,
            think_seconds=options.think_seconds,
            rate=options.rate,
            burstiness=options.burstiness,
            seed=options.load_seed,
        )
        requests = read_workload(Path(options.workload))
        self._requests = {request.request_id: request for request in requests}
        client = CompletionClient(self.environment.host or "", timeout_seconds=options.request_timeout)
        index, count = self.runner.worker_index, options.expect_workers
        return Traffic(requests, load, client, self._report, index=index, count=count)

    def _open(self, path: str) -> BinaryIO | None:
        """A file of this process: what is written is in it at once."""
        if not path:
            return None
        file = Path(path)
        if isinstance(self.runner, WorkerRunner):
            file = file.with_name(f"{file.stem}-{self.runner.worker_index}{file.suffix}")
        return file.open("wb", buffering=0)

    def _watch(self, traffic: Traffic | None) -> None:
        """Tell when all has been sent."""
        if traffic:
            traffic.finished.wait()
        if isinstance(self.runner, WorkerRunner):
            # The master waits for half a second for what comes after the end: too little on a busy machine.
            last: dict[str, Any] = {}
            self.environment.events.report_to_master.fire(client_id=self.runner.client_id, data=last)
            self.runner.send_message("stats", last)
        self.runner.send_message(ALL_SENT)

    def _report(self, record: RequestRecord) -> None:
        fire_events(self.environment, record)
        _write(self._results, record)
        _write(self._recorded, replace(self._requests[record.request_id], arrival_time=record.sent_at))

    def _stop(self, **_: Any) -> None:
        if self.traffic:
            self.traffic.stop()

    def _end(self, **_: Any) -> None:
        _write(self._results, End(time.process_time() - self._cpu_seconds_before))


def _write(file: BinaryIO | None, line: Struct) -> None:
    if file:
        file.write(msgspec.json.encode(line) + b"\n")


def check_recorded(environment: Environment, **_: Any) -> None:
    """A run that recorded no request must not look like one that went well."""
    if not environment.stats.total.num_requests:
        logger.error("no request was sent and recorded")
        environment.process_exit_code = 2


def fire_events(environment: Any, record: RequestRecord) -> None:
    """Tell locust of a request that has ended: the rows that the module's docstring explains."""

    def fire(kind: str, name: str, value: float, error: LoadTestError | None = None) -> None:
        environment.events.request.fire(
            request_type=kind, name=name, response_time=value, response_length=0, exception=error, context={}
        )

    if times := record.token_times:
        fire("TTFT", "to the first token", 1000 * (times[0] - record.sent_at))
        if len(times) > 1:
            fire("ITL", "mean of an answer", 1000 * (times[-1] - times[0]) / (len(times) - 1))
    if record.error is None:
        fire("tokens", "of an answer (no time)", record.num_output_tokens)
    seconds = (record.finished_at or record.sent_at) - record.sent_at
    fire("POST", CALL.path, 1000 * seconds, LoadTestError(record.error) if record.error else None)
