"""Traces of calls, as a collector gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.scheduler.errors import ConfigError, EngineError
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats
from shoal.server import tracing
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest, News
from shoal.server.generation import Generation
from shoal.server.settings import ServerConfig, resolve
from shoal.server.setup import build_service
from shoal.server.terms import Terms
from shoal.server.tracing import Tracer, make_tracer
from shoal.server.wire.parsing import read_body
from shoal.server.wire.requests import ChatBody, CompletionBody
from tests.e2e.checkpoints import cycle_checkpoint
from tests.server.collector import Collector, attributes
from tests.server.test_metrics import READY

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(cycle_checkpoint(tmp_path_factory.mktemp("checkpoints") / "cycle"))


def play(folder: str, collector: Collector, *, end: str = "answers", n: int = 2) -> None:
    """A call with two prompts in an engine that is played by hand."""

    async def scene() -> None:
        service, client = build_service(resolve({"model": folder, "server": {"otlp_endpoint": collector.url}}))
        assert service.tracer is not None
        client.connect(READY, lambda command: None)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
        terms = Terms(context=service.tracer.context(headers if end == "answers" else {"traceparent": "nonsense"}))
        body: Any = read_body(CompletionBody, {"prompt": "Z", "n": n, "max_tokens": 2, "temperature": 0.5, "seed": 7})
        if end == "leaves":
            body = read_body(ChatBody, {"messages": [{"role": "user", "content": "Z"}], "n": n})
        prompts = [("Z" * 20, [5] * 20), ("Z", [5])]
        generation = Generation(service, body, prompts, "", api_id="call", seed=7, terms=terms)
        names = [f"call-{prompt}-{i}" for prompt in range(2) for i in range(n)]
        waiting = asyncio.ensure_future(generation.complete())
        await asyncio.sleep(0.01)
        stats = SchedulerStats(0, 0, 0.0, 0, 0, 0)
        client.take(News([RequestOutput(names[0], [7], num_cached_tokens=16, queue_time=0.004)], stats))
        await asyncio.sleep(0.01)
        match end:
            case "answers":
                outputs = [RequestOutput(names[0], [8], FinishReason.LENGTH)]
                outputs += [RequestOutput(name, [7, 9], FinishReason.STOP) for name in names[1:]]
                client.take(News(outputs, stats))
                await waiting
            case "fails":
                client.give_up(EngineError("no engine"))
                with pytest.raises(EngineError):
                    await waiting
            case "leaves":
                waiting.cancel()
                await asyncio.wait([waiting])
        await service.tracer.close()

    asyncio.run(scene())


def test_a_call_is_a_span(folder: str, collector: Collector) -> None:
    began = time.time_ns()
    play(folder, collector)
    (span,) = collector.spans
    assert collector.paths == ["/v1/traces"]
    assert (collector.resource["service.name"], collector.resource["telemetry.sdk.language"]) == ("shoal", "python")
    assert (span.name, span.kind) == ("llm_request", 2)  # of a server
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "a=b")
    assert began < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()

    found = attributes(span)
    latencies = {name: found.pop(name) for name in list(found) if name.startswith("gen_ai.latency.")}
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "shoal",
        "gen_ai.request.id": "call",
        "gen_ai.request.model": "cycle",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.95,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.n": 2,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": "call",
        "gen_ai.response.model": "cycle",
        "gen_ai.response.finish_reasons": ["length", "stop", "stop", "stop"],
        "gen_ai.usage.input_tokens": 21,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.prompt_tokens": 21,
        "gen_ai.usage.completion_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 16,
    }
    ttft, queue, prefill, decode, inference, e2e = (
        latencies.pop(f"gen_ai.latency.{name}")
        for name in (
            *("time_to_first_token", "time_in_queue", "time_in_model_prefill"),
            *("time_in_model_decode", "time_in_model_inference", "e2e"),
        )
    )
    assert not latencies
    assert queue == 0.004
    assert queue + prefill == pytest.approx(ttft) and prefill + decode == pytest.approx(inference)
    assert 0.01 <= ttft < queue + inference <= e2e
    assert e2e == pytest.approx((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9, abs=1e-6)


@pytest.mark.parametrize(("end", "reason"), [("fails", "error"), ("leaves", "abort")])
def test_a_call_that_does_not_end_by_itself(folder: str, collector: Collector, end: str, reason: str) -> None:
    play(folder, collector, end=end)
    (span,) = collector.spans
    found = attributes(span)
    assert found["gen_ai.response.finish_reasons"] == [reason] * 4
    assert found["gen_ai.operation.name"] == ("chat" if end == "leaves" else "text_completion")
    assert found["gen_ai.usage.output_tokens"] == 1
    assert span.parent_span_id == b"", "a header that makes no sense begins a trace"
    assert span.status.code == (2 if end == "fails" else 0)
    assert span.status.message == ("no engine" if end == "fails" else "")
    assert found.get("error.type") == ("EngineError" if end == "fails" else None)


def test_a_collector_that_hangs_holds_nothing_up(
    folder: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.1)
    collector.hangs = True
    began = time.monotonic()
    play(folder, collector)
    assert time.monotonic() - began < tracing.SEND_SECONDS


def test_a_path_of_the_endpoint_is_kept(collector: Collector) -> None:
    async def scene() -> None:
        tracer = Tracer(f"{collector.url}/spans/here", "fish")
        request = EngineRequest("a-0-0", [1], SamplingParams(max_tokens=1, seed=2**63))
        tracer.record("a", "chat", [[Journal(request, "0", time.monotonic())]], None, None)
        await tracer.close()

    asyncio.run(scene())
    assert collector.paths == ["/spans/here"]
    assert "gen_ai.request.seed" not in attributes(collector.spans[0]), "it has no room for 64 bits without a sign"


def test_nothing_is_loaded_where_nothing_is_traced() -> None:
    script = """
import sys
from shoal.server import tracing
from shoal.server.settings import ServerConfig
assert tracing.make_tracer(ServerConfig(), "fish") is None
print(*(name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "requests"))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"otlp_endpoint needs packages .* -m pip install") as caught:
        make_tracer(ServerConfig(otlp_endpoint="http://localhost:4318"), "fish")
    assert caught.value.param == "otlp_endpoint"


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://localhost:4317", "http://", ""])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint must be text like"):
        ServerConfig(otlp_endpoint=endpoint)
