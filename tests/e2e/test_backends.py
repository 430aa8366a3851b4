"""What a server announces of its backend, and that all backends give the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.model.backends.native_library import supported_isas
from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server

needs_native = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {"40": 2.0}},
    {"temperature": 0.9, "seed": 3, "top_p": 0.95, "top_k": 40, "frequency_penalty": 0.4},
    {"temperature": 1.0, "seed": 4, "min_p": 0.01, "presence_penalty": -0.5},
    {"temperature": 1.3, "seed": 5, "top_n_sigma": 2.0, "typical_p": 0.9, "xtc_probability": 0.5},
]


@needs_native
def test_the_backends_give_the_same_answers(start: StartServer, tiny: Server, tiny_folder: Path) -> None:
    """The same tokens, greedy or drawn; the numbers may differ in their last digits."""
    tiny.until("it says what it computes with", lambda: "float32, native (" in tiny.log)
    torch = start("--model", str(tiny_folder), "--backend", "torch").wait_ready()
    torch.until("it says what it computes with", lambda: "float32, torch on cpu" in torch.log)
    for request in REQUESTS:
        body = {"max_tokens": 40, "ignore_eos": True, "logprobs": 3, **request}
        native, other = (server.complete("the cat sat on", **body)["choices"][0] for server in (tiny, torch))
        assert native["text"] == other["text"]
        assert native["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-3)


@needs_native
def test_what_is_kept_in_fewer_bits_is_announced(start: StartServer) -> None:
    server = start("--quantization", "int8", "--kv-cache-dtype", "float16").wait_ready()
    announced = f"int8 weights, float16 KV cache, native ({supported_isas()[0]}, 1 thread)"
    server.until("it says what it keeps in fewer bits", lambda: announced in server.log)
    assert server.text("Z", max_tokens=40, temperature=0) == cycle_text(40)


def test_torch_serves_where_native_cannot_and_one_line_says_why(start: StartServer) -> None:
    server = start("--block-size", "8").wait_ready()
    assert server.text("Z", max_tokens=40, temperature=0) == cycle_text(40)
    server.until("the announcement is complete", lambda: "ready after" in server.log)
    (line,) = [line for line in server.log.splitlines() if " WARNING " in line]
    assert "the torch backend serves, which is slower and takes more memory: block_size 8 is not for" in line
