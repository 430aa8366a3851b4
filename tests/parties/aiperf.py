"""NVIDIA's AIPerf with its defaults, but for the number of requests: https://github.com/ai-dynamo/aiperf."""

import json
import os
import tempfile
from pathlib import Path

from party import BASE_URL, MODEL, MODEL_FOLDER, check, program, run

os.environ["HF_HUB_OFFLINE"] = ""  # where it is offline, it looks for tokenizers in the hub's cache alone
NUM_REQUESTS = 6


def profile(kind: str, *words: str) -> None:
    """Run a benchmark of a kind of endpoint, of which all requests have to succeed."""
    with tempfile.TemporaryDirectory() as temp:
        program(
            *("aiperf", "profile", "--model", MODEL, "--url", BASE_URL.removesuffix("/v1"), "--endpoint-type", kind),
            *("--tokenizer", MODEL_FOLDER, "--request-count", str(NUM_REQUESTS), "--concurrency", "2"),
            *("--isl", "64", "--osl", "16", "--ui", "none", "--artifact-dir", temp, *words),
        )
        (path,) = Path(temp).rglob("profile_export_aiperf.json")
        report = json.loads(path.read_text())
    assert report["request_count"]["avg"] == NUM_REQUESTS, report
    assert not report.get("error_summary"), report["error_summary"]


@check
def streamed_chats() -> None:
    profile("chat", "--streaming")


@check
def streamed_responses() -> None:
    profile("responses", "--streaming")


@check
def streamed_messages() -> None:
    profile("messages", "--streaming")


@check
def completions() -> None:
    profile("completions")


@check
def embeddings() -> None:
    profile("embeddings")


run()
