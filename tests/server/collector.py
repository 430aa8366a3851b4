"""A collector of OpenTelemetry's traces: OTLP over HTTP, in protobuf."""

from __future__ import annotations

import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """What it got; `hangs` has it answer nothing for a while."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}
        self.hangs = False
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if collector.hangs:
                    time.sleep(30)
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.headers["content-type"] == "application/x-protobuf"
                collector.paths.append(self.path)
                for one in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resource = attributes(one.resource)
                    collector.spans += [span for scope in one.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def attributes(owner: Any) -> dict[str, Any]:
    """The attributes of a span or a resource, as Python has them."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(one) for one in value.array_value.values]
        return getattr(value, kind)

    return {one.key: plain(one.value) for one in owner.attributes}
