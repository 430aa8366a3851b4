"""A request of a trace is explained, and the twin says how other policies would have served it."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from shoal.loadtest import explain as explain_module
from shoal.loadtest.cli import explain as command
from shoal.loadtest.explain import SLOWEST, Explained, described, explain, find_request, recorded_requests
from shoal.loadtest.records import Load, LoadTestError, Run
from shoal.loadtest.trace import Trace, read_whole_trace
from shoal.loadtest.twin import SJF_ORACLE
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.explanation import RequestHistory
from shoal.server.engine.chrome_trace import ChromeTrace
from tests.loadtest.twin import LIMITS, REALISTIC, ask, chat, run, server_info

# One row.  The short request comes while the first of two long ones is served.
QUEUE = [
    ask("first", num_output_tokens=40, arrival_time=0.0),
    ask("long", num_output_tokens=400, max_tokens=400, arrival_time=0.01),
    ask("short", num_output_tokens=4, max_tokens=4, arrival_time=0.02),
]


def recorded(found: Run) -> Trace:
    return Trace(found.steps, found.server)


@pytest.fixture(scope="module")
def queue() -> Trace:
    return recorded(run(QUEUE, Load(), costs=REALISTIC, max_num_seqs=1))


def test_the_short_request_would_have_been_served_first(queue: Trace) -> None:
    explained = explain(queue, "short", [SJF_ORACLE, "fcfs"])
    assert (explained.policy, explained.num_requests, explained.num_simulated) == ("fcfs", 3, 3)
    assert explained.simulated_ms == pytest.approx(explained.timing.total_ms, rel=0.1)
    oracle, fcfs = explained.others
    assert fcfs.total_ms == explained.simulated_ms
    assert oracle.total_ms is not None
    assert oracle.total_ms < explained.timing.total_ms / 4
    lines = list(described(explained))
    assert lines[0] == f"short: {explained.timing.total_ms:,.1f} ms from its arrival to its last step"
    assert f"  under {SJF_ORACLE}: {oracle.total_ms:,.0f} ms instead of {explained.timing.total_ms:,.0f}" in lines


def test_all_other_policies_are_compared_unless_some_are_named(queue: Trace) -> None:
    names = [other.policy for other in explain(queue, "short").others]
    assert "fcfs" not in names
    assert {"sjf", "fair", "priority", "deadline", "static"} <= {*names}


def test_the_twin_of_a_trace_knows_what_policies_may_know() -> None:
    """The workload that is made of a trace has the lengths, arrivals and terms of the one that made it."""
    asked = chat(40)
    found = recorded_requests(run(asked, Load(rate=50.0), costs=REALISTIC, max_num_seqs=4).steps, "r7")
    first = {request.request_id: request for request in asked}
    assert len(found) == 40
    for request in found:
        before = first[request.request_id]
        for name in ("client", "priority", "num_output_tokens", "max_tokens"):
            assert getattr(request, name) == getattr(before, name)
        assert len(request.prompt_token_ids) == len(before.prompt_token_ids)


def test_prefixes_that_were_found_are_found_again() -> None:
    first = ask("a", 64, 17, session="s")
    second = replace(ask("b", 1, 4, session="s"), prompt_token_ids=[*first.prompt_token_ids, *range(32)])
    found = run([first, second], Load(users=1), costs=REALISTIC)
    assert found.requests[1].num_cached_tokens == 64
    again = recorded_requests(found.steps, "a")
    replayed = run(again, Load(), costs=REALISTIC)
    assert [record.num_cached_tokens for record in replayed.requests] == [0, 64]


def test_of_many_requests_those_around_it_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "MAX_REQUESTS", 10)
    trace = recorded(run(chat(40), Load(rate=50.0), costs=REALISTIC, max_num_seqs=4))
    explained = explain(trace, "r20", ["sjf"])
    assert (explained.num_requests, explained.num_simulated) == (40, 10)
    assert any("10 of 40 requests" in line for line in described(explained))


def test_requests_are_found_by_the_beginning_of_their_ids(queue: Trace) -> None:
    assert find_request(queue.steps, "sho") == "short"
    assert find_request(queue.steps, SLOWEST) == "long"
    with pytest.raises(LoadTestError, match="3 requests, and the id of none begins with 'x'"):
        find_request(queue.steps, "x")
    many = recorded(run([ask(f"r{number}") for number in range(8)], Load(users=8)))
    with pytest.raises(LoadTestError, match=r"8 requests begin with 'r': r0, r1, r2, r3, r4, \.\.\."):
        find_request(many.steps, "r")
    with pytest.raises(LoadTestError, match="no request"):
        find_request([], SLOWEST)


def test_what_the_twin_cannot_know_is_said(queue: Trace) -> None:
    assert "20" in explain(Trace(queue.steps[:5], queue.server), "first").why_not, "too few steps"
    assert "older Shoal" in explain(Trace(queue.steps, None), "first").why_not
    speculating = server_info(LIMITS)
    speculating.settings["speculation"] = {"method": "suffix"}
    explained = explain(Trace(queue.steps, speculating), "first")
    assert "speculated" in explained.why_not
    assert list(described(explained))[-1].startswith("No comparison with other policies: the engine speculated")
    with pytest.raises(ConfigError, match="nonsense"):
        explain(queue, "first", ["nonsense"])


def test_the_command_reads_a_trace_plain_or_packed(queue: Trace, tmp_path: Path) -> None:
    plain, packed = tmp_path / "trace.json", tmp_path / "trace.json.gz"
    assert queue.server is not None
    trace = ChromeTrace(plain, msgspec.to_builtins({"limits": queue.server.limits, "settings": queue.server.settings}))
    for step in queue.steps:
        trace(step)
    trace.close()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert read_whole_trace(path).steps == queue.steps
    answer = CliRunner().invoke(command, [str(packed), SLOWEST, "--policy", "sjf,fair", "--json"])
    assert answer.exit_code == 0, answer.output
    explained = msgspec.json.decode(answer.output, type=Explained)
    history = RequestHistory("long")
    for step in queue.steps:
        history(step)
    assert explained.timing == history.explanation()
    assert [other.policy for other in explained.others] == ["sjf", "fair"]
    assert CliRunner().invoke(command, [str(plain), "short", "--policy", "sjf"]).output.startswith("short: ")
    wrong = CliRunner().invoke(command, [str(plain), "nobody"])
    assert (wrong.exit_code, wrong.output.count("\n")) == (2, 1)
