"""The load generator, for locust.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --workload chat.jsonl --users 32 --headless

Each request of the workload is sent once, and the run ends with the last answer.  `--users` alone is a closed loop:
users take sessions of the workload in order and, with `--think-seconds`, pause before each request but their first.
`--rate` makes an open loop of it, in which requests are sent when they are due, whatever the server does; so does
`--replay`, at the times that the workload names, such as those that `--record` noted.  Users play no part then.

Locust's table, CSV and report have these rows; a failed request is a failure of POST:

- `POST`: from the request (in an open loop: from when it was due) to the end of the answer, in ms
- `TTFT`: to the first token, in ms
- `ITL`: mean time between the events of one answer, in ms
- `tokens`: output tokens of a request; not a time, though its columns say so

"Aggregated" adds these up and means nothing.  With `--master` and `--worker`, or `--processes`, each worker takes its
part of the workload, and the master writes the files.
"""

from __future__ import annotations

from typing import Any

from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser

from shoal.loadtest.locust_nodes import SendingTest, locust_test


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("Load on a language model server")
    add = group.add_argument
    add("--workload", metavar="FILE", default="", help="requests to send, as JSON lines")
    add("--rate", type=float, default=0.0, help="open loop: requests a second")
    add(
        "--burstiness", type=float, default=1.0, help="open loop: squared variation of arrivals; 1 is a Poisson process"
    )
    add(
        "--replay", action="store_true", help="open loop: send each request at the arrival_time that the workload names"
    )
    add("--think-seconds", type=float, default=0.0, help="closed loop: mean pause of a user before a request")
    add("--load-seed", type=int, default=0, help="of arrivals and pauses")
    add("--request-timeout", type=float, default=600.0, help="longest silence of the server, in seconds")
    add("--results", metavar="FILE", default="", help="write what was measured of each request, as JSON lines")
    add("--record", metavar="FILE", default="", help="write what was sent, and when, as a workload for --replay")


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    test = locust_test(environment)
    if isinstance(test, SendingTest):
        CompletionUser.test = test


class CompletionUser(User):
    """A user of a closed loop; in an open one it only waits for the end."""

    test: SendingTest

    def on_start(self) -> None:
        self.is_first = True

    @task
    def session(self) -> None:
        traffic = self.test.traffic
        if traffic is None:
            raise StopUser
        if traffic.is_open:
            traffic.finished.wait()
        elif traffic.serve_next_session(is_first=self.is_first):
            self.is_first = False
            return
        raise StopUser
