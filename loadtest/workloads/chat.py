"""chat: short questions, answers of very different lengths, as in public traces of chats.

**Which figures.**  In LMSYS-Chat-1M a prompt has 69.5 tokens on average and an answer 214.5 (Zheng et al. 2023).  In
the conversation trace of Azure that came with Splitwise (Patel et al. 2024) the median answer has 129 tokens, and the
mean one 211.  A log-normal distribution whose mean is so far above its median has sigma = sqrt(2 ln(211 / 129)) = 0.99.

**What is made of them.**  Prompts are log-normal with the mean of LMSYS-Chat-1M and sigma 1.  Answers keep the shape
and are scaled to a context of 1,024 tokens by about 0.4: median 45, and sigma 1.2, because a public chat has more
models and kinds of users than one service; cut at 640 tokens, which about one in seventy reaches.  So their mean is 87
tokens, and the longest of 32 has five and a half times as many.

**What can be foretold.**  Half of the variance of the logarithm of an answer's length: a quarter is the client's (some
want short answers, some long ones) and a quarter the kind of prompt ("Name ..." asks for less than "Write ...").  The
other half is chance.  That is about what the Azure trace allows: in 184 requests that follow each other there (from
2023-11-16 18:47:11 on), which of nine ranges the length of the prompt is in, by which applications can be told apart,
explains 51% of the variance of the logarithm of the output's length.  Nothing else in a request says how long its
answer will be; prompt and answer lengths are independent.
"""

from __future__ import annotations

from math import log, sqrt
from statistics import NormalDist

from shoal.loadtest.text import prompt, prose
from shoal.loadtest.workload import WorkloadRequest
from shoal.loadtest.workloads.maker import Maker, length

MAX_TOKENS = 640
MAX_PROMPT_TOKENS = 384

PROMPT_MEDIAN, PROMPT_SIGMA = 42.2, 1.0  # mean 69.5
OUTPUT_MEDIAN, OUTPUT_SIGMA = 45.0, 1.2
CLIENT_SHARE, KIND_SHARE = 0.25, 0.25  # of the variance of the logarithm of an answer's length
NUM_CLIENTS = 8
# From those that ask for the least to those that ask for the most.
KINDS = (
    "Name what this is about: ",
    "Give a title to this: ",
    "Is the following right? ",
    "Summarize in a few words: ",
    "List what is said here: ",
    "Describe what this does: ",
    "Explain step by step: ",
    "Write a manual from these notes: ",
)


def chat(maker: Maker) -> list[WorkloadRequest]:
    client_offsets = _offsets(NUM_CLIENTS, OUTPUT_SIGMA * sqrt(CLIENT_SHARE))
    kind_offsets = _offsets(len(KINDS), OUTPUT_SIGMA * sqrt(KIND_SHARE))
    noise = OUTPUT_SIGMA * sqrt(1 - CLIENT_SHARE - KIND_SHARE)
    rng = maker.rng
    rng.shuffle(client_offsets)  # a client's number says nothing
    requests = []
    for index in range(maker.num_requests):
        client, kind = rng.randrange(NUM_CLIENTS), rng.randrange(len(KINDS))
        logarithm = log(OUTPUT_MEDIAN) + client_offsets[client] + kind_offsets[kind] + rng.gauss(0, noise)
        num_prompt_tokens = maker.log_normal(PROMPT_MEDIAN, PROMPT_SIGMA, MAX_PROMPT_TOKENS)
        requests.append(
            maker.request(
                index,
                prompt(KINDS[kind], prose, rng, num_prompt_tokens, maker.tokenize),
                num_output_tokens=length(logarithm, MAX_TOKENS),
                max_tokens=MAX_TOKENS,
                is_greedy=rng.random() < 0.5,
                client=f"client-{client}",
            )
        )
    return requests


def _offsets(num: int, sigma: float) -> list[float]:
    """So many values, as a normal distribution spreads them: mean 0, standard deviation sigma."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)]
    scale = sigma / sqrt(sum(quantile**2 for quantile in quantiles) / num)
    return [quantile * scale for quantile in quantiles]
