"""agent: sessions of several turns, in which each prompt is the whole of the one before, and more.

All agents begin with the same instructions.  A turn adds what the model answered to the one before, and what a tool
or user said to that.  The answers in prompts are recorded ones (code of the corpus, as long as the answer was), so that
the prompts are the same whatever a server writes.  A session ends when its next prompt would leave no room for an
output.
"""

from __future__ import annotations

from shoal.loadtest.text import code, passage, prose
from shoal.loadtest.workload import WorkloadRequest
from shoal.loadtest.workloads.maker import MIN_MODEL_LEN, Maker

MAX_TOKENS = 160
MAX_PROMPT_TOKENS = MIN_MODEL_LEN - MAX_TOKENS
MIN_TURNS, MAX_TURNS = 3, 8
NUM_INSTRUCTION_TOKENS = 96
MIN_TURN_TOKENS, MAX_TURN_TOKENS = 20, 100
OUTPUT_MEDIAN, OUTPUT_SIGMA = 50.0, 0.7


def agent(maker: Maker) -> list[WorkloadRequest]:
    instructions = passage(prose, maker.rng, NUM_INSTRUCTION_TOKENS, maker.tokenize)
    requests: list[WorkloadRequest] = []
    num_sessions = 0
    while len(requests) < maker.num_requests:
        requests += _session(maker, instructions, len(requests), num_sessions)
        num_sessions += 1
    return requests[: maker.num_requests]


def _session(maker: Maker, instructions: str, first_index: int, number: int) -> list[WorkloadRequest]:
    requests: list[WorkloadRequest] = []
    text = instructions
    for _ in range(maker.rng.randint(MIN_TURNS, MAX_TURNS)):
        text += _turn(maker)
        token_ids = maker.tokenize(text)
        if len(token_ids) > MAX_PROMPT_TOKENS:
            break
        num_output_tokens = maker.log_normal(OUTPUT_MEDIAN, OUTPUT_SIGMA, MAX_TOKENS)
        requests.append(
            maker.request(
                first_index + len(requests),
                (text, token_ids),
                num_output_tokens=num_output_tokens,
                max_tokens=MAX_TOKENS,
                session=f"{maker.name}-session-{number:04}",
                client=f"agent-{number}",
            )
        )
        text += "\n\nAnswer:\n" + passage(code, maker.rng, num_output_tokens, maker.tokenize)
    return requests


def _turn(maker: Maker) -> str:
    num_tokens = maker.rng.randint(MIN_TURN_TOKENS, MAX_TURN_TOKENS)
    return "\n\nUser:\n" + passage(prose, maker.rng, num_tokens, maker.tokenize)
