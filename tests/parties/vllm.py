"""vLLM's own benchmark, `vllm bench serve`, on its random prompts: https://docs.vllm.ai/en/latest/benchmarking/cli."""

import json
import tempfile
from pathlib import Path
from typing import Any

from party import BASE_URL, MODEL, MODEL_FOLDER, check, program, run

NUM_REQUESTS = 6
NUM_OUTPUT_TOKENS = 16
NAMED = ("--model", MODEL, "--tokenizer", MODEL_FOLDER)


def benchmark(*words: str) -> dict[str, Any]:
    """The report of a benchmark, of which all requests have to succeed."""
    with tempfile.TemporaryDirectory() as temp:
        program(
            *("vllm", "bench", "serve", "--base-url", BASE_URL.removesuffix("/v1"), *words),
            *("--num-prompts", str(NUM_REQUESTS), "--input-len", "64", "--output-len", str(NUM_OUTPUT_TOKENS)),
            *("--save-result", "--save-detailed", "--result-dir", temp),
        )
        (path,) = Path(temp).glob("*.json")
        report = json.loads(path.read_text())
    assert report["completed"] == NUM_REQUESTS, report["errors"]
    return report


def generate(*words: str) -> None:
    """Run a benchmark of texts, each of which has to have all its tokens."""
    report = benchmark(*words)
    assert report["output_lens"] == [NUM_OUTPUT_TOKENS] * NUM_REQUESTS, report


@check
def completions_of_the_model_that_the_server_names() -> None:
    """The model card has the folder in which its tokenizer is."""
    generate()


@check
def chats() -> None:
    generate(*NAMED, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions")


@check
def responses() -> None:
    generate(*NAMED, "--backend", "openai-responses", "--endpoint", "/v1/responses")


@check
def embeddings() -> None:
    benchmark(*NAMED, "--backend", "openai-embeddings", "--endpoint", "/v1/embeddings")


run()
