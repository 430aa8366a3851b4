"""`python -m tests.chaos`: a real server under mixed load, while its engine is killed and its clients misbehave.

It prints a table for people and one line of JSON last, and exits with 1 if an answer was lost or
differs, or if anything leaks.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import click
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from shoal.testing import ServerProcess
from tests.chaos.asking import (
    NUM_QUESTIONS,
    Answer,
    Cursor,
    Gaps,
    RefusedError,
    ask,
    check,
    events,
    question,
    read_stream,
    read_whole,
    streamed,
)

ENGINE = "shoal.server.engine.process"
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)  # of the last it hangs, until it is found out
BATCH_SECONDS = 120.0  # by which batches have ended once nobody else asks
QUIET_SECONDS = 10.0  # by which everything that was abandoned must be gone


class Chaos:
    """One run.

    Args:
        kills_apart: mean seconds between two faults of the engine.
    """

    def __init__(self, server: ServerProcess, http: httpx.AsyncClient, seed: int, kills_apart: float) -> None:
        self.server, self.http, self.random = server, http, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.differing: list[str] = []
        self.pauses: list[float] = []
        self.longest_gap = 0.0
        self._kills_apart = kills_apart
        self._expected: list[Answer] = []
        self._is_over = asyncio.Event()

    # -- the run ---------------------------------------------------------------------------------------------------

    async def run(self, seconds: float, num_users: int) -> None:
        """Learn what undisturbed answers are, then disturb.  All the while batches wait for idle rows."""
        self._expected = [await ask(self.http, number) for number in range(NUM_QUESTIONS)]
        batches = [await self._begin_batch(path) for path in {question(number)[0] for number in range(NUM_QUESTIONS)}]
        users = [asyncio.create_task(self._be_user()) for _ in range(num_users)]
        killing = asyncio.create_task(self._kill_engines())
        await asyncio.sleep(seconds)
        self._is_over.set()
        await asyncio.gather(*users, killing)
        for batch_id in batches:
            await self._end_batch(batch_id)

    async def _be_user(self) -> None:
        kinds: dict[Callable[[int], Awaitable[None]], int] = {
            self._stream: 40,
            self._whole: 20,
            self._leave: 12,
            self._come_back: 12,
            self._ask_twice: 4,
            self._read_slowly: 6,
            self._use_others: 12,
            self._be_hostile: 10,
        }
        while not self._is_over.is_set():
            (kind,) = self.random.choices(list(kinds), list(kinds.values()))
            number = self.random.randrange(NUM_QUESTIONS)
            name = kind.__name__.strip("_")
            try:
                await kind(number)
            except RefusedError as refused:
                self.counts[f"refused {refused.code}"] += 1
                if refused.status not in (429, 503):
                    self.differing.append(f"{name} of question {number}: {refused}")
                await asyncio.sleep(0.2)
            except Exception as error:  # nothing may be lost
                self.differing.append(f"{name} of question {number}: {error!r}")
            self.counts[name] += 1

    def _compare(self, number: int, answer: Answer) -> None:
        if answer != self._expected[number]:
            self.differing.append(f"question {number}: {answer} is not {self._expected[number]}")

    # -- what users do -----------------------------------------------------------------------------------------------

    async def _whole(self, number: int) -> None:
        self._compare(number, await ask(self.http, number))

    async def _stream(self, number: int, pause: float = 0.0) -> None:
        path, body = question(number)
        gaps, found = Gaps(), []
        async with self.http.stream("POST", path, json=streamed(body)) as response:
            if not response.is_success:
                await response.aread()
            check(response)
            async for event in events(response, Cursor()):
                gaps.note()
                found.append(event)
                await asyncio.sleep(pause)
        self._compare(number, read_stream(found))
        if not pause:
            self.longest_gap = max(self.longest_gap, gaps.longest)

    async def _read_slowly(self, number: int) -> None:
        await self._stream(number, pause=0.05)

    async def _leave(self, number: int) -> None:
        """Go away after some events."""
        path, body = question(number)
        left = self.random.randrange(20)
        async with self.http.stream("POST", path, json=streamed(body)) as response:
            if not response.is_success:
                await response.aread()
            check(response)
            async for _ in events(response, Cursor()):
                left -= 1
                if left < 0:
                    return

    async def _come_back(self, number: int) -> None:
        """Leave again and again, and go on where the stream was left."""
        path, body = question(number)
        cursor, found, stream_id = Cursor(), [], ""
        while True:
            left = self.random.randrange(1, 20)
            if stream_id:
                headers = {"last-event-id": cursor.last} if cursor.last else {}
                request = self.http.build_request("GET", f"/v1/streams/{stream_id}", headers=headers)
            else:
                request = self.http.build_request(
                    "POST", path, json=streamed(body), headers={"x-stream-resume": "true"}
                )
            response = await self.http.send(request, stream=True)
            try:
                if not response.is_success:
                    await response.aread()
                check(response)
                stream_id = response.headers["x-request-id"]
                async for event in events(response, cursor):
                    found.append(event)
                    left -= 1
                    if not left:
                        break
                else:
                    break
            finally:
                await response.aclose()
            self.counts["streams that were left and went on"] += 1
        self._compare(number, read_stream(found))

    async def _ask_twice(self, number: int) -> None:
        """Ask for the same work twice at once: it is done once, and both get the same answer."""
        path, body = question(number)
        headers = {"idempotency-key": f"{self.random.random()}"}
        both = await asyncio.gather(*(self.http.post(path, json=body, headers=headers) for _ in range(2)))
        for response in both:
            check(response)
        if both[0].content != both[1].content:
            self.differing.append(f"question {number}, asked twice: {both[0].text} is not {both[1].text}")
        self._compare(number, read_whole(both[0].json()))

    async def _use_others(self, number: int) -> None:
        _, body = question(number)
        messages = body.get("messages")
        text = messages[0]["content"] if messages else body["prompt"]
        tokens = (await self._post("/tokenize", {"prompt": text, "add_special_tokens": False})).json()["tokens"]
        told = (await self._post("/detokenize", {"tokens": tokens})).json()["prompt"]
        if told != text:
            self.differing.append(f"tokens of {text!r} are {told!r}")
        for place in ("/v1/models", "/server_info", "/metrics", "/version"):
            response = await self.http.get(place)
            if response.status_code not in (200, 503):
                self.differing.append(f"GET {place}: {response.status_code}")

    async def _be_hostile(self, number: int) -> None:
        """Ask for what can never be served."""
        body = self.random.choice(
            [
                b"{" * 1000,
                b'{"prompt": "a", "top_k": 1' + b"0" * 30 + b"}",
                b'{"prompt": "a", "stop": [' + b'"",' * 5000 + b'""]}',
                b'{"prompt": [' + b"1," * 5000 + b"1]}",
                b'{"prompt": "a", "n": 100000}',
                b'{"prompt": "a", "logit_bias": {"a": [' + b"[" * 400 + b"]" * 400 + b"]}}",
                b"\xff\xfe",
            ]
        )
        response = await self.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        if not (400 <= response.status_code < 500 or response.status_code == 503):
            self.differing.append(f"a hostile body {body[:40]!r}: {response.status_code} {response.text[:100]}")

    async def _post(self, path: str, body: object) -> httpx.Response:
        response = await self.http.post(path, json=body)
        check(response)
        return response

    # -- batches -----------------------------------------------------------------------------------------------------

    async def _begin_batch(self, path: str) -> str:
        """A batch of all questions of an endpoint; returns its id."""
        questions = {number: question(number) for number in range(NUM_QUESTIONS)}
        lines = [
            json.dumps({"custom_id": str(number), "method": "POST", "url": path, "body": body})
            for number, (own_path, body) in questions.items()
            if own_path == path
        ]
        response = await self.http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("questions", "\n".join(lines))}
        )
        check(response)
        fields = {"input_file_id": response.json()["id"], "endpoint": path, "completion_window": "24h"}
        batch_id: str = (await self._post("/v1/batches", fields)).json()["id"]
        return batch_id

    async def _end_batch(self, batch_id: str) -> None:
        """Wait until it is completed, and compare: each line has one answer."""
        deadline = time.monotonic() + BATCH_SECONDS
        while (batch := (await self.http.get(f"/v1/batches/{batch_id}")).json())["status"] != "completed":
            if time.monotonic() > deadline:
                self.differing.append(f"a batch does not end: {batch}")
                return
            await asyncio.sleep(0.2)
        content = (await self.http.get(f"/v1/files/{batch['output_file_id']}/content")).text
        answers = [json.loads(line) for line in content.splitlines()]
        if (
            len({answer["custom_id"] for answer in answers}) != len(answers)
            or len(answers) != batch["request_counts"]["total"]
        ):
            self.differing.append(f"a batch of {batch['request_counts']} has {len(answers)} answers")
        for answer in answers:
            self._compare(int(answer["custom_id"]), read_whole(answer["response"]["body"]))
        self.counts["lines of batches"] += len(answers)

    # -- what happens to the engine ----------------------------------------------------------------------------------

    async def _kill_engines(self) -> None:
        while not self._is_over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), self.random.uniform(0.5, 1.5) * self._kills_apart)
                return
            pids = self._engines()
            if not pids or not await self._is_healthy():
                continue
            number, before = self.random.choice(SIGNALS), await self._num_restarts()
            began = time.monotonic()
            with suppress(ProcessLookupError):
                os.kill(pids[0], number)
            while await self._num_restarts() == before:  # noqa: ASYNC110 (another process changes it)
                await asyncio.sleep(0.005)
            self.counts[f"engines ended by {number.name}"] += 1
            if number is not signal.SIGSTOP:  # that it hangs is known after hang_seconds only
                self.pauses.append(time.monotonic() - began)

    def _engines(self) -> list[int]:
        """The engine that works first, then the one that stands by."""
        children = psutil.Process(self.server.process.pid).children()
        return [child.pid for child in children if ENGINE in " ".join(child.cmdline())]

    async def _num_restarts(self) -> float:
        metrics = self.metrics((await self.http.get("/metrics")).text)
        return metrics.get("shoal:engine_restarts_total", 0.0)

    async def _is_healthy(self) -> bool:
        return (await self.http.get("/health")).is_success

    # -- what is left ------------------------------------------------------------------------------------------------

    async def state(self) -> dict[str, float]:
        """What must be the same before and after, once nobody asks for anything."""
        deadline = time.monotonic() + QUIET_SECONDS
        while True:
            metrics = self.metrics((await self.http.get("/metrics")).text)
            busy = [metrics[f"vllm:{name}"] for name in ("num_requests_running", "num_requests_waiting")]
            if not any(busy) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        api = psutil.Process(self.server.process.pid)
        return {
            "requests": sum(busy),
            "blocks in use": metrics["vllm:kv_cache_usage_perc"],
            "descriptors": api.num_fds(),
            "tasks": metrics["shoal:api_tasks"],
            "threads": api.num_threads(),
            "processes": len(api.children(recursive=True)),
            "MiB": round(api.memory_info().rss / 2**20),
        }

    @staticmethod
    def metrics(text: str) -> dict[str, float]:
        families = text_string_to_metric_families(text)
        return {sample.name: sample.value for family in families for sample in family.samples}


def leaks(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What there is more of, beyond what a few connections and caches explain."""
    allowed = {"descriptors": 4, "tasks": 4, "threads": 2, "MiB": 0.05 * before["MiB"] + 8}
    return [
        f"{name}: {before[name]:g} before, {after[name]:g} after"
        for name in before
        if after[name] > before[name] + allowed.get(name, 0)
    ]


async def rage(server: ServerProcess, seconds: float, users: int, seed: int, kills_apart: float) -> int:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=1.0)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, trust_env=False) as http:
        warm = Chaos(server, http, seed + 1, kills_apart=1e9)
        await warm.run(min(60.0, seconds / 4), users)
        await asyncio.sleep(2.0)  # connections that nobody uses end
        before = await warm.state()
        chaos = Chaos(server, http, seed, kills_apart)
        await chaos.run(seconds, users)
        await asyncio.sleep(2.0)
        after = await chaos.state()
        metrics = chaos.metrics((await http.get("/metrics")).text)
    found = leaks(before, after)
    rows: dict[str, object] = dict(chaos.counts.most_common())
    rows |= {
        "engines that were replaced": metrics["shoal:engine_restarts_total"],
        "requests that went on in another engine": metrics["shoal:requests_resumed_total"],
        "pause, median [s]": round(median(chaos.pauses), 3) if chaos.pauses else None,
        "pause, longest [s]": round(max(chaos.pauses), 3) if chaos.pauses else None,
        "longest silence of a stream [s]": round(chaos.longest_gap, 3),
        "lost or differing": len(chaos.differing),
        "leaks": len(found),
    }
    for name, value in rows.items():
        click.echo(f"{name:45} {value}")
    click.echo(f"before: {before}\nafter:  {after}")
    for line in (*chaos.differing[:20], *found):
        click.echo(f"! {line[:600]}")
    click.echo(json.dumps(rows | {"before": before, "after": after}))
    return 1 if chaos.differing or found else 0


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="How long.")
@click.option("--users", default=32, show_default=True, help="Clients at once.")
@click.option("--seed", default=0, show_default=True)
@click.option("--kills-apart", default=5.0, show_default=True, help="Mean seconds between faults of the engine.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(seconds: float, users: int, seed: int, kills_apart: float, options: tuple[str, ...]) -> None:
    """Disturb a real server; OPTIONS, after --, are of `shoal serve`, such as --standby."""
    few_blocks = ["--num-blocks", "400", "--max-num-seqs", "24", "--hang-seconds", "3", "--no-access-log"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with ServerProcess([*few_blocks, "--data-folder", folder, *options], log) as server:
            code = asyncio.run(rage(server, seconds, users, seed, kills_apart))
            server.check()
        if "Traceback" in (text := log.read_text(errors="replace")):
            click.echo("! the server's log has a traceback:\n" + text[text.index("Traceback") :][:3000])
            code = 1
    sys.exit(code)


main()
