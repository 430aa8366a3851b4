"""HTTPS with a certificate of our own, and clients that verify it."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import PATIENCE, Server, run_shoal
from tests.e2e.test_startup import refusal
from tests.server.test_tls import make_certificate

OPENAI = """\
import sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="unused")
model = client.models.list().data[0].id
print(client.completions.create(model=model, prompt="a", max_tokens=3).usage.completion_tokens)
"""


def test_clients_that_verify(start: StartServer, tmp_path: Path) -> None:
    authority, key = make_certificate(tmp_path, "one")
    server = start("--ssl-certfile", str(authority), "--ssl-keyfile", str(key))
    server.until("the server is ready", lambda: server.check() or f"https://127.0.0.1:{server.port}" in server.log)
    url, trusted = f"https://127.0.0.1:{server.port}", {"SSL_CERT_FILE": str(authority)}

    with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=authority), timeout=PATIENCE) as client:
        assert client.get("/health").status_code == 200
        body = {"prompt": "a", "max_tokens": 4, "stream": True}
        assert client.post("/v1/completions", json=body).text.rstrip().endswith("data: [DONE]")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{url}/health", trust_env=False)

    openai = subprocess.run(
        [sys.executable, "-c", OPENAI, f"{url}/v1"], env=trusted, capture_output=True, text=True, check=False
    )
    assert openai.stdout == "3\n", openai.stderr
    code, printed = run_shoal(tmp_path, "complete", "a", "--max-tokens", "3", "--json", "--url", url, **trusted)
    assert (code, json.loads(printed)["usage"]["num_output_tokens"]) == (0, 3)
    code, printed = run_shoal(tmp_path, "complete", "a", "--url", url)
    assert code == 1 and "CERTIFICATE_VERIFY_FAILED" in printed

    malformed_and_gone(server, authority)


def malformed_and_gone(server: Server, authority: Path) -> None:
    """What is no HTTP gets an answer, and a client that leaves in the middle ends its request."""
    context = ssl.create_default_context(cafile=authority)
    with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=context, timeout=PATIENCE) as client:
        server.http.close()
        server.http = client
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 4000, "stream": True}) as one:
            assert next(one.iter_lines())
        server.wait_idle()
        assert client.get("/health", headers={"x": "y" * 9000}).status_code == 431
    assert "Traceback" not in server.log


def test_a_certificate_that_cannot_be_used(tmp_path: Path) -> None:
    """It is refused before the model is looked for."""
    certificate, _ = make_certificate(tmp_path, "one")
    said = refusal(tmp_path, "--model", "nowhere", "--ssl-certfile", str(certificate))
    assert said.startswith(f"ssl_certfile: {certificate}: it holds no private key")
