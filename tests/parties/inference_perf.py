"""Kubernetes' inference-perf: https://github.com/kubernetes-sigs/inference-perf."""

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from party import BASE_URL, MODEL, MODEL_FOLDER, check, program, run

NUM_REQUESTS = 6
LENGTHS = {"min": 8, "max": 32, "mean": 16, "std_dev": 4, "total_count": 8}


def measure(api: dict[str, Any], data: dict[str, Any]) -> None:
    """Run a benchmark, of which all requests have to succeed."""
    with tempfile.TemporaryDirectory() as temp:
        config = {
            "api": api,
            "data": data,
            "load": {"type": "constant", "stages": [{"rate": 2, "duration": NUM_REQUESTS / 2}], "num_workers": 1},
            "server": {"type": "vllm", "model_name": MODEL, "base_url": BASE_URL.removesuffix("/v1")},
            "tokenizer": {"pretrained_model_name_or_path": MODEL_FOLDER},
            "storage": {"local_storage": {"path": temp}},
        }
        Path(temp, "config.yml").write_text(yaml.safe_dump(config))
        program("inference-perf", "--config_file", f"{temp}/config.yml")
        (path,) = Path(temp).rglob("summary_lifecycle_metrics.json")
        report = json.loads(path.read_text())
    assert (report["successes"]["count"], report["failures"]["count"]) == (NUM_REQUESTS, 0), report


@check
def streamed_completions() -> None:
    data = {"type": "random", "input_distribution": LENGTHS, "output_distribution": LENGTHS}
    measure({"type": "completion", "streaming": True}, data)


@check
def chats_with_prefixes_in_common() -> None:
    prefixes = {"num_groups": 2, "num_prompts_per_group": 3, "system_prompt_len": 48, "question_len": 16}
    measure({"type": "chat"}, {"type": "shared_prefix", "shared_prefix": prefixes | {"output_len": 16}})


@check
def streamed_messages() -> None:
    measure({"type": "anthropic_messages", "streaming": True}, {"type": "mock"})


run()
