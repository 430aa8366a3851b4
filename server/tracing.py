"""Traces for OpenTelemetry: a span for each API call, sent to a collector.  Nothing of it loads unless it is wanted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shoal.extras import install_command
from shoal.scheduler.errors import ConfigError
from shoal.server.engine.journal import Journal
from shoal.server.settings import ServerConfig

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

FLUSH_SECONDS = 2.0  # at the end, in which what is left may still be sent
SEND_SECONDS = 5.0  # that a collector may take for some spans


class Tracer:
    """Makes the spans, and hands them to a thread that sends them; what a slow collector does not take is dropped.

    Names of attributes are those of OpenTelemetry's conventions for generative AI, and vLLM's where those have none.

    Args:
        endpoint: of the collector, for OTLP over HTTP; without a path it is `/v1/traces`.

    Raises:
        ConfigError: the packages are missing.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"otlp_endpoint needs packages that are not installed: {install_command('otel')}",
                param="otlp_endpoint",
            ) from error
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = f"{endpoint.rstrip('/')}/v1/traces"
        named = Resource.create({"service.name": "shoal", "service.version": version("shoal")})
        resource = named.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME and the like have the last word
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=SEND_SECONDS)))
        self._tracer = self._provider.get_tracer("shoal", version("shoal"))
        self._model_name = model_name

    @staticmethod
    def context(headers: Mapping[str, str]) -> Context:
        """The trace that a request says to belong to (W3C Trace Context); an empty one if it names none."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        return TraceContextTextMapPropagator().extract(headers)

    def record(
        self,
        api_id: str,
        operation: str,
        prompts: Sequence[Sequence[Journal]],
        context: Context | None,
        failure: Exception | None,
    ) -> None:
        """Make the span of a call that has ended.

        Args:
            operation: "chat" or "text_completion".
            prompts: the choices of each.
            context: that the request came with.
            failure: with which the call ended, if it did.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode  # noqa: PLC0415

        now, ended_at = time.monotonic(), time.time_ns()
        choices = [choice for prompt in prompts for choice in prompt]
        span = self._tracer.start_span(
            "llm_request",
            context,
            SpanKind.SERVER,
            self._attributes(api_id, operation, prompts) | _latencies(choices, now),
            start_time=ended_at - int((now - choices[0].arrival_time) * 1e9),
        )
        if failure is not None:
            span.set_attribute("error.type", type(failure).__name__)
            span.set_status(Status(StatusCode.ERROR, str(failure)))
        span.end(ended_at)

    async def close(self) -> None:
        """Send what is left, as far as the collector takes it at once."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop has ended, since this took too long
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="shoal-spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await done.wait()

    def _attributes(
        self, api_id: str, operation: str, prompts: Sequence[Sequence[Journal]]
    ) -> dict[str, AttributeValue]:
        params = prompts[0][0].request.params
        choices = [choice for prompt in prompts for choice in prompt]
        num_prompt_tokens = sum(len(prompt[0].request.prompt_token_ids) for prompt in prompts)
        num_tokens = sum(len(choice.output_token_ids) for choice in choices)
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "shoal",
            "gen_ai.request.id": api_id,
            "gen_ai.request.model": self._model_name,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.n": len(prompts[0]),
            "gen_ai.request.choice.count": len(prompts[0]),
            "gen_ai.response.id": api_id,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.finish_reasons": [str(choice.finish_reason) for choice in choices],
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "gen_ai.usage.output_tokens": num_tokens,
            "gen_ai.usage.prompt_tokens": num_prompt_tokens,
            "gen_ai.usage.completion_tokens": num_tokens,
            "gen_ai.usage.cache_read.input_tokens": sum(prompt[0].num_cached_tokens for prompt in prompts),
        }
        if params.seed < 2**63:  # an attribute's integers have a sign
            attributes["gen_ai.request.seed"] = params.seed
        return attributes


def _latencies(choices: Sequence[Journal], now: float) -> dict[str, AttributeValue]:
    """Seconds, from the arrival of a call to its end.  The first token is that of whichever choice had one first."""
    arrival = choices[0].arrival_time
    latencies: dict[str, AttributeValue] = {"gen_ai.latency.e2e": now - arrival}
    first_times = [one.first_token_time for one in choices if one.first_token_time is not None]
    last_times = [one.last_token_time for one in choices if one.last_token_time is not None]
    if first_times and last_times:
        first, last = min(first_times), max(last_times)
        queue_time = min(one.queue_time for one in choices if one.first_token_time == first)
        latencies |= {
            "gen_ai.latency.time_to_first_token": first - arrival,
            "gen_ai.latency.time_in_queue": queue_time,
            "gen_ai.latency.time_in_model_prefill": first - arrival - queue_time,
            "gen_ai.latency.time_in_model_decode": last - first,
            "gen_ai.latency.time_in_model_inference": last - arrival - queue_time,
        }
    return latencies


def make_tracer(config: ServerConfig, model_name: str) -> Tracer | None:
    """What traces the calls, if the settings name a collector."""
    return Tracer(config.otlp_endpoint, model_name) if config.otlp_endpoint is not None else None
