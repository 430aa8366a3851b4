"""Drives OpenVINO GenAI's continuous batching."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai


class Engine:
    """A pipeline with the weights of a GGUF file."""

    def __init__(self, weights: str, precision: str, num_threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GiB
        scheduler.max_num_seqs = 32
        scheduler.max_num_batched_tokens = 512
        scheduler.enable_prefix_caching = False
        hint = "bf16" if precision == "bfloat16" else "f32"
        properties = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": num_threads}
        if precision != "int8":
            properties["KV_CACHE_PRECISION"] = hint
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(weights, scheduler, "CPU", properties)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        results = self._pipeline.generate(tensors, [config] * len(prompts))
        lengths = {len(result.m_generation_ids[0]) for result in results}
        assert lengths == {max_tokens}, f"asked for {max_tokens} tokens, got {lengths}"
