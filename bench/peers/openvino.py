"""Drives OpenVINO GenAI's continuous batching: `python -m bench.peers.openvino WEIGHTS.gguf THREADS`."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    weights, num_threads = sys.argv[1:]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB
    scheduler.max_num_seqs = 32
    scheduler.max_num_batched_tokens = 512
    scheduler.enable_prefix_caching = False
    precision = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": int(num_threads)}
    if "Q8" not in weights:
        precision["KV_CACHE_PRECISION"] = "f32"
    pipeline = openvino_genai.ContinuousBatchingPipeline(weights, scheduler, "CPU", precision)
    for line in sys.stdin:
        work = json.loads(line)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = work["max_tokens"]
        config.ignore_eos = True
        prompts = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in work["prompts"]]
        began = time.perf_counter()
        results = pipeline.generate(prompts, [config] * len(prompts))
        print("seconds", time.perf_counter() - began, flush=True)
        lengths = {len(result.m_generation_ids[0]) for result in results}
        assert lengths == {work["max_tokens"]}, f"asked for {work['max_tokens']} tokens, got {lengths}"


main()
