"""GuideLLM with its defaults, but for the number of requests: https://github.com/vllm-project/guidellm."""

import json
import tempfile
from pathlib import Path

from party import BASE_URL, MODEL_FOLDER, check, program, run

NUM_REQUESTS = 6


def benchmark(backend: str = "", profile: str = "kind=synchronous") -> None:
    """Run a benchmark, of which all requests have to succeed; the span that it measures may leave one out."""
    with tempfile.TemporaryDirectory() as temp:
        program(
            *("guidellm", "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={BASE_URL.removesuffix('/v1')}{backend}"),
            *("--profile", profile),
            *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
            *("--tokenizer", f"kind=huggingface_auto,model={MODEL_FOLDER}"),
            folder=Path(temp),
        )
        (one,) = json.loads(Path(temp, "benchmarks.json").read_text())["benchmarks"]
    totals = one["metrics"]["request_totals"]
    assert totals["successful"] == totals["total"] >= NUM_REQUESTS - 1, totals
    tokens = one["metrics"]["output_token_count"]["successful"]
    assert tokens["mean"] == 16, tokens


@check
def one_after_another() -> None:
    benchmark()


@check
def several_at_a_time() -> None:
    benchmark(profile="kind=concurrent,streams=3")


@check
def completions() -> None:
    benchmark(backend=",request_format=/v1/completions")


run()
