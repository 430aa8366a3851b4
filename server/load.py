"""A small load against this very server, for those who watch it: users that each wait for their answer.

It is no measurement to publish: it shares the API process.  `shoal loadtest` compares policies from outside.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from random import Random

from shoal.scheduler.errors import InvalidRequestError, QueueFullError, ShoalError
from shoal.scheduler.policies import POLICIES
from shoal.server.errors import EngineUnavailableError, NotFoundError, RateLimitError
from shoal.server.generation import Generation
from shoal.server.limits import UNLIMITED
from shoal.server.scheduling import resolve_scheduling
from shoal.server.service import Service, new_id, unix_time
from shoal.server.terms import Terms
from shoal.server.wire.engine import Load, LoadBody, Loads, Times, WorkloadName
from shoal.server.wire.requests import CompletionBody

MAX_LOADS = 12  # that are remembered
NUM_CLIENTS = 4  # among whom the users are shared out, for policies that share among clients
PAUSE_SECONDS = 0.25  # after a refusal
TIMELINE_SECONDS = 0.5


@dataclass(frozen=True)
class Workload:
    """What users ask: how many tokens a prompt has, least and most, and its answer; and what of it all have alike.

    Of `rare` requests in a hundred the answer is `rare_factor` times as long.
    """

    prompt: tuple[int, int]
    output: tuple[int, int]
    num_shared: int = 0
    rare: int = 0
    rare_factor: int = 1


WORKLOADS: dict[WorkloadName, Workload] = {
    "chat": Workload(prompt=(20, 120), output=(16, 96)),
    "mixed": Workload(prompt=(10, 60), output=(8, 24), rare=15, rare_factor=10),
    "shared": Workload(prompt=(8, 40), output=(16, 48), num_shared=192),
    "long": Workload(prompt=(200, 600), output=(8, 32)),
}


class LoadRunner:
    """Runs one load at a time, and remembers the last ones."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loads: deque[_Run] = deque(maxlen=MAX_LOADS)

    def policies(self) -> list[str]:
        """Those under which a load may be run."""
        settings = self._service.settings
        return sorted(POLICIES) if settings.server.page_policies and settings.engine.engines == 1 else []

    def all(self) -> Loads:
        return Loads([run.report() for run in self._loads], self.policies())

    async def start(self, body: LoadBody, api_key: str | None) -> Load:
        """Begin a load with the rights of this key.

        Raises:
            InvalidRequestError: another one runs, or the policy may not be changed, or not now.
            EngineUnavailableError: there is no engine.
        """
        if self._loads and self._loads[0].state == "running":
            raise InvalidRequestError("a load is running: end it before another begins")
        if body.policy is not None and body.policy not in self.policies():
            raise InvalidRequestError(
                f"policy: expected one of {', '.join(self.policies()) or 'none'}, not {body.policy[:32]!r}",
                param="policy",
            )
        self._service.engine.ready  # noqa: B018 (raises)
        run = _Run(self._service, body, api_key)
        self._loads.appendleft(run)
        try:
            await run.begin()
        except BaseException:
            self._loads.remove(run)
            raise
        return run.report()

    def end(self, load_id: str) -> Load:
        """End a load.

        Raises:
            NotFoundError: there is none of this id.
        """
        for run in self._loads:
            if run.id == load_id:
                run.cancel()
                return run.report()
        raise NotFoundError(f"there is no load {load_id[:64]!r}")


class _Run:
    """One load."""

    def __init__(self, service: Service, body: LoadBody, api_key: str | None) -> None:
        self.id = new_id("load")
        self.state = "running"
        self._service = service
        self._body = body
        self._api_key = api_key
        self._policy = body.policy or service.engine.events.policy or service.settings.scheduler.policy
        self._started = unix_time()
        self._began = self._ended = time.monotonic()
        self._num_requests = self._num_failed = 0
        self._ttft: list[float] = []
        self._itl: list[float] = []
        self._e2e: list[float] = []
        self._timeline: list[int] = []
        self._problem: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Change the policy, if that is wanted, and let the users come."""
        if self._body.policy is not None and not await self._use(self._body.policy):
            raise InvalidRequestError("policy: can be changed only while no request is unfinished", param="policy")
        self._began = time.monotonic()
        self._task = asyncio.create_task(self._run())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def report(self) -> Load:
        elapsed = (time.monotonic() if self.state == "running" else self._ended) - self._began
        num_output_tokens = sum(self._timeline)
        return Load(
            id=self.id,
            state=self.state,  # type: ignore[arg-type]  # one of the names
            workload=self._body.workload,
            users=self._body.users,
            seconds=self._body.seconds,
            policy=self._policy,
            started=self._started,
            elapsed=round(elapsed, 2),
            num_requests=self._num_requests,
            num_failed=self._num_failed,
            num_output_tokens=num_output_tokens,
            tokens_per_second=round(num_output_tokens / elapsed, 1) if elapsed > 0 else 0.0,
            ttft=_times(self._ttft),
            itl=_times(self._itl),
            e2e=_times(self._e2e),
            timeline=self._timeline,
            problem=self._problem,
        )

    async def _use(self, policy: str) -> bool:
        return not self._service.engine.journals() and await self._service.engine.events.use_policy(policy)

    async def _run(self) -> None:
        state = "finished"
        try:
            async with asyncio.timeout(self._body.seconds), asyncio.TaskGroup() as group:
                for number in range(self._body.users):
                    group.create_task(self._be_user(number))
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            state = "cancelled"
        except ExceptionGroup as errors:
            state, self._problem = "failed", str(errors.exceptions[0])
        finally:
            self._ended = time.monotonic()
            self.state = state
            if self._body.policy is not None:
                await self._restore()

    async def _restore(self) -> None:
        """Have the engine use its own policy again, once nobody else needs it."""
        if self._service.engine.events.policy != self._policy:
            self._problem = "the engine was replaced, and the new one has the policy of its settings"
        for _ in range(20):
            await asyncio.sleep(0.1)
            if self._service.engine.events.policy in ("", self._service.settings.scheduler.policy):
                return
            if await self._use(self._service.settings.scheduler.policy):
                return

    async def _be_user(self, number: int) -> None:
        for body in _asked(self._service, self._body, number):
            try:
                await self._ask(body)
            except EngineUnavailableError:
                raise
            except (QueueFullError, RateLimitError):
                self._num_failed += 1
                await asyncio.sleep(PAUSE_SECONDS)
            except ShoalError as error:
                self._num_failed += 1
                self._problem = error.message
                await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, body: CompletionBody) -> None:
        """One request, measured as its tokens come."""
        service, began = self._service, time.monotonic()
        terms = Terms(
            resolve_scheduling(body, self._api_key, shares_prefixes=service.settings.cache.share_prefixes),
            allowance=service.allowances.get(self._api_key, UNLIMITED),
        )
        prompts = await service.prompts.of_completion(body)
        generation = Generation(service, body, prompts, "", api_id=new_id("load"), seed=body.seed or 0, terms=terms)
        last = 0.0
        async with aclosing(generation.deltas()) as steps:
            async for deltas in steps:
                now = time.monotonic()
                self._count(now, sum(len(delta.token_ids) for delta in deltas))
                if last:
                    self._itl.append(now - last)
                else:
                    self._ttft.append(now - began)
                last = now
        self._e2e.append(time.monotonic() - began)
        self._num_requests += 1

    def _count(self, now: float, num_tokens: int) -> None:
        at = int((now - self._began) / TIMELINE_SECONDS)
        self._timeline += [0] * (at + 1 - len(self._timeline))
        self._timeline[at] += num_tokens


def _asked(service: Service, body: LoadBody, number: int) -> Iterator[CompletionBody]:
    """What one user asks, one after the other; the same for each load with this seed."""
    workload, random = WORKLOADS[body.workload], Random(f"{body.seed} {number}")
    longest, vocab_size = service.engine.ready.limits.max_model_len, service.config.vocab_size
    shared = Random(body.seed).choices(range(vocab_size), k=min(workload.num_shared, longest // 4))
    while True:
        num_output_tokens = random.randint(*workload.output)
        if random.randrange(100) < workload.rare:
            num_output_tokens *= workload.rare_factor
        num_output_tokens = min(num_output_tokens, longest // 3)
        num_prompt_tokens = min(random.randint(*workload.prompt), longest // 3)
        yield CompletionBody(
            prompt=[*shared, *random.choices(range(vocab_size), k=num_prompt_tokens)],
            max_tokens=num_output_tokens,
            min_tokens=num_output_tokens,
            ignore_eos=True,
            temperature=0.8,
            seed=random.randrange(2**31),
            user=f"load {number % NUM_CLIENTS}",
        )


def _times(seconds: list[float]) -> Times | None:
    if not seconds:
        return None
    found = sorted(seconds)
    p50, p95 = (found[min(int(len(found) * share), len(found) - 1)] for share in (0.5, 0.95))
    return Times(round(1000 * p50, 2), round(1000 * p95, 2))
