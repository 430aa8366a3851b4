"""uniform: all requests are alike, 128 tokens in and 128 out.

The control: batches of such requests end together, so that static batching should lose little.
"""

from __future__ import annotations

from shoal.loadtest.text import prompt, prose
from shoal.loadtest.workload import WorkloadRequest
from shoal.loadtest.workloads.maker import Maker

NUM_PROMPT_TOKENS = 128
NUM_OUTPUT_TOKENS = 128


def uniform(maker: Maker) -> list[WorkloadRequest]:
    return [
        maker.request(
            index,
            prompt("", prose, maker.rng, NUM_PROMPT_TOKENS, maker.tokenize),
            num_output_tokens=NUM_OUTPUT_TOKENS,
            max_tokens=NUM_OUTPUT_TOKENS,
            is_greedy=maker.rng.random() < 0.5,
        )
        for index in range(maker.num_requests)
    ]
