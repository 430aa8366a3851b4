"""What all workloads are made with."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, exp, log
from random import Random

from shoal.loadtest.text import Tokenize
from shoal.loadtest.workload import WorkloadRequest

MIN_MODEL_LEN = 1024
CHAT_TEMPERATURE = 0.8


@dataclass(slots=True)
class Maker:
    """Makes the requests of one workload.

    Attributes:
        rng: seeded by the workload's name and seed.  Python's own, whose numbers stay the same from release to release.
    """

    name: str
    num_requests: int
    seed: int
    tokenize: Tokenize
    rng: Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = Random(f"{self.name} {self.seed}")

    def request(
        self,
        index: int,
        prompt: tuple[str, list[int]],
        *,
        num_output_tokens: int,
        max_tokens: int,
        is_greedy: bool = True,
        session: str | None = None,
        client: str = "",
        priority: int = 0,
        ttft_slo_ms: float | None = None,
    ) -> WorkloadRequest:
        """Request number `index`, a session of its own unless one is named."""
        request_id = f"{self.name}-{index:05}"
        text, token_ids = prompt
        return WorkloadRequest(
            request_id=request_id,
            session=session or request_id,
            client=client,
            prompt=text,
            prompt_token_ids=token_ids,
            num_output_tokens=num_output_tokens,
            max_tokens=max_tokens,
            temperature=0.0 if is_greedy else CHAT_TEMPERATURE,
            seed=self.rng.getrandbits(31),
            priority=priority,
            ttft_slo_ms=ttft_slo_ms,
        )

    def log_normal(self, median: float, sigma: float, most: int) -> int:
        """A length: log-normal, rounded up, cut at `most`."""
        return length(log(median) + self.rng.gauss(0, sigma), most)


def length(logarithm: float, most: int) -> int:
    """The length of which this is the logarithm, rounded up, cut at `most`."""
    return min(ceil(exp(min(logarithm, log(most)))), most)
