"""code: completions in a handful of files, as an editor asks for them.

Each request has the beginning of a file as its prompt, up to where the user stands, and asks for what comes next.  Who
works on the same file shares what is above the place of the other, which the prefix cache can find.  The outputs are
short to medium ones: log-normal with a median of 40 tokens and sigma 0.8.
"""

from __future__ import annotations

from shoal.loadtest.text import Tokenize, cut, modules
from shoal.loadtest.workload import WorkloadRequest
from shoal.loadtest.workloads.maker import Maker

NUM_FILES = 6
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 300, 700
MAX_TOKENS = 256
OUTPUT_MEDIAN, OUTPUT_SIGMA = 40.0, 0.8


def code(maker: Maker) -> list[WorkloadRequest]:
    rng = maker.rng
    files = [path.read_text("utf-8") for path in rng.sample(modules(), NUM_FILES)]
    requests = []
    for index in range(maker.num_requests):
        file = rng.randrange(NUM_FILES)
        num_tokens = rng.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
        requests.append(
            maker.request(
                index,
                _beginning(files[file], num_tokens, maker.tokenize),
                num_output_tokens=maker.log_normal(OUTPUT_MEDIAN, OUTPUT_SIGMA, MAX_TOKENS),
                max_tokens=MAX_TOKENS,
                client=f"editor-{file}",
            )
        )
    return requests


def _beginning(text: str, num_tokens: int, tokenize: Tokenize) -> tuple[str, list[int]]:
    """Of so many tokens, or of the next larger number for which there is one."""
    while (found := cut(text, num_tokens, tokenize)) is None:
        num_tokens += 1
    return found
