"""EvalScope's stress test: https://evalscope.readthedocs.io/en/latest/user_guides/stress_test/quick_start.html."""

import json
import tempfile
from pathlib import Path

from party import BASE_URL, MODEL, MODEL_FOLDER, check, program, run

NUM_REQUESTS = 6


def stress(endpoint: str, *words: str) -> None:
    """Run a stress test, of which all requests have to succeed."""
    with tempfile.TemporaryDirectory() as temp:
        program(
            *("evalscope", "perf", "--model", MODEL, "--url", f"{BASE_URL}/{endpoint}"),
            *("--number", str(NUM_REQUESTS), "--parallel", "2", "--tokenizer-path", MODEL_FOLDER),
            *("--dataset", "random", "--min-prompt-length", "32", "--max-prompt-length", "64"),
            *("--outputs-dir", temp, *words),
        )
        (summary,) = (json.loads(path.read_text()) for path in Path(temp).rglob("benchmark_summary.json"))
    assert (summary["Success Requests"], summary["Failed Requests"]) == (NUM_REQUESTS, 0), summary


@check
def chats() -> None:
    stress("chat/completions", "--max-tokens", "16")


@check
def completions_that_are_not_streamed() -> None:
    stress("completions", "--max-tokens", "16", "--no-stream")


@check
def embeddings() -> None:
    stress("embeddings", "--api", "openai_embedding", "--dataset", "random_embedding")


run()
