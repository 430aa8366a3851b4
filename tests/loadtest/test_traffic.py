"""Who sends what, and when: with a fake of the client, so that nothing but the traffic is tested."""

from __future__ import annotations

from collections.abc import Callable

import gevent
import pytest

from shoal.loadtest.arrivals import closed_sessions, open_arrivals
from shoal.loadtest.records import Load, LoadTestError, RequestRecord
from shoal.loadtest.traffic import Traffic
from shoal.loadtest.workload import WorkloadRequest

PATIENCE = 120.0


class FakeClient:
    """Takes its time for each request, and notes who was in flight together."""

    def __init__(self, seconds: float = 0.0, error: str | None = None) -> None:
        self.sent: list[str] = []
        self.in_flight = 0
        self.most_at_once = 0
        self._seconds = seconds
        self._error = error

    def stream(self, body: bytes, record: RequestRecord, now: Callable[[], float]) -> None:
        self.sent.append(record.request_id)
        self.in_flight += 1
        self.most_at_once = max(self.most_at_once, self.in_flight)
        try:
            gevent.sleep(self._seconds)
        finally:
            self.in_flight -= 1
            record.finished_at = now()
        record.error = self._error


def workload(*sessions: str, arrival_times: list[float] | None = None) -> list[WorkloadRequest]:
    """A request for each letter, its session."""
    return [
        WorkloadRequest(
            request_id=f"{session}{index}",
            session=session,
            prompt="a",
            prompt_token_ids=[1],
            num_output_tokens=1,
            max_tokens=1,
            arrival_time=arrival_times[index] if arrival_times else None,
        )
        for index, session in enumerate("".join(sessions))
    ]


def due_times(load: Load, requests: list[WorkloadRequest]) -> list[float]:
    return [arrival.seconds for arrival in open_arrivals(load, requests)]


def run(
    client: FakeClient, requests: list[WorkloadRequest], load: Load, index: int = 0, count: int = 1
) -> tuple[Traffic, list[RequestRecord]]:
    """With as many users as the load has, until all has been sent."""
    records: list[RequestRecord] = []
    traffic = Traffic(requests, load, client, records.append, index=index, count=count)  # type: ignore[arg-type]  # a fake
    traffic.start()
    users = [gevent.spawn(traffic.serve_user) for _ in range(load.users)]
    assert traffic.finished.wait(PATIENCE)
    gevent.joinall(users, timeout=PATIENCE)
    return traffic, records


# -- closed loop -----------------------------------------------------------------------------------------------------


def test_one_user_sends_all_in_the_order_of_the_workload_session_by_session() -> None:
    client = FakeClient()
    run(client, workload("aabcbc"), Load(users=1))
    assert client.sent == ["a0", "a1", "b2", "b4", "c3", "c5"]


def test_users_share_the_sessions_and_never_send_two_requests_of_one_at_once() -> None:
    client = FakeClient(seconds=0.01)
    _, records = run(client, workload("aaabbbccc"), Load(users=2))
    assert client.most_at_once == 2
    assert client.sent[:2] == ["a0", "b3"]
    spans = {record.request_id: (record.sent_at, record.finished_at or 0.0) for record in records}
    assert len(spans) == 9
    for session in ("a0 a1 a2", "b3 b4 b5", "c6 c7 c8"):
        first, second, third = (spans[name] for name in session.split())
        assert first[1] <= second[0] <= second[1] <= third[0]


def test_more_users_than_sessions_are_no_harm() -> None:
    client = FakeClient(seconds=0.01)
    run(client, workload("abc"), Load(users=10))
    assert client.most_at_once == 3


def test_a_user_pauses_before_each_request_but_its_first() -> None:
    load = Load(users=1, think_seconds=0.02, seed=4)
    requests = workload("abcd")
    _, records = run(FakeClient(), requests, load)
    pauses = [arrival.seconds for (arrival,) in closed_sessions(load, requests)]
    assert records[0].sent_at < PATIENCE
    for before, after, pause in zip(records, records[1:], pauses[1:], strict=False):
        assert after.sent_at - (before.finished_at or 0.0) >= pause


# -- open loop -------------------------------------------------------------------------------------------------------


def test_an_open_loop_sends_when_due_whatever_the_server_does() -> None:
    load = Load(rate=200.0, seed=1)
    requests = workload("aaaaaaaaaabbbbbbbbbb")
    slow, quick = FakeClient(seconds=0.5), FakeClient()
    _, slow_records = run(slow, requests, load)
    _, quick_records = run(quick, requests, load)
    due = due_times(load, requests)
    for records in (slow_records, quick_records):
        assert sorted(record.sent_at for record in records) == due
    assert slow.sent == quick.sent == [request.request_id for request in requests]
    assert slow.most_at_once > 10
    # Latencies count from the due time, so nothing ends before it.
    assert all((record.finished_at or 0.0) >= record.sent_at for record in quick_records)


def test_a_replay_sends_at_the_times_of_the_workload_in_their_order() -> None:
    client = FakeClient()
    _, records = run(client, workload("abc", arrival_times=[0.03, 0.0, 0.01]), Load())
    assert client.sent == ["b1", "c2", "a0"]
    assert [record.sent_at for record in records] == [0.0, 0.01, 0.03]


def test_stopping_cuts_off_what_is_in_flight_and_reports_it() -> None:
    client = FakeClient(seconds=PATIENCE)
    records: list[RequestRecord] = []
    requests = workload("abc", arrival_times=[0.0, 0.0, PATIENCE])
    traffic = Traffic(requests, Load(), client, records.append)  # type: ignore[arg-type]  # a fake
    traffic.start()
    gevent.sleep(0.02)
    traffic.stop()
    assert {record.error for record in records} == {"cut off: GreenletExit()"}
    assert len(records) == 2
    assert client.in_flight == 0


# -- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [Load(users=3), Load(rate=1000.0, seed=2)])
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_shares_make_up_the_whole(load: Load, count: int) -> None:
    requests = workload("aabbbcddee")
    clients = [FakeClient() for _ in range(count)]
    due = [run(client, requests, load, index, count)[1] for index, client in enumerate(clients)]
    sent = [name for client in clients for name in client.sent]
    assert sorted(sent) == sorted(request.request_id for request in requests)
    if load.rate:
        assert sorted(record.sent_at for records in due for record in records) == due_times(load, requests)
    else:
        owners = [{name[0] for name in client.sent} for client in clients]
        assert sum(map(len, owners)) == 5, "a session is sent by one"


@pytest.mark.parametrize("load", [Load(users=2), Load(rate=1000.0)])
def test_a_server_that_is_gone_or_full_ends_no_run_early(load: Load) -> None:
    client = FakeClient(error="connection: refused")
    run(client, workload("abcdefghij" * 10), load)
    assert len(client.sent) == 100


def test_a_load_that_does_not_suit_the_workload_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(LoadTestError, match="has no arrival_time"):
        Traffic(workload("a"), Load(), FakeClient(), print)  # type: ignore[arg-type]  # a fake
