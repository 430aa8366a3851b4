"""Certificates that cannot be used, and servers that everybody may use."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from shoal.scheduler.errors import ConfigError
from shoal.server.serve import warn_of_strangers
from shoal.server.settings import ServerConfig
from shoal.server.tls import check_certificate


def make_certificate(folder: Path, name: str, *options: str) -> tuple[Path, Path]:
    """A self-signed certificate for this machine, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    protection = options or ("-nodes",)
    subprocess.run(
        [*command, *names, *protection, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    return certificate, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    folder = tmp_path_factory.mktemp("certificates")
    make_certificate(folder, "one")
    make_certificate(folder, "other")
    make_certificate(folder, "locked", "-passout", "pass:secret")
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    return folder


def test_a_certificate_that_can_be_used(certificates: Path) -> None:
    check_certificate(ServerConfig())
    check_certificate(ServerConfig(ssl_certfile=certificates / "one.pem", ssl_keyfile=certificates / "one-key.pem"))
    both = certificates / "both.pem"
    both.write_text("".join((certificates / name).read_text() for name in ("one.pem", "one-key.pem")))
    check_certificate(ServerConfig(ssl_certfile=both))


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("gone.pem", None, "ssl_certfile: {}/gone.pem: cannot be read: No such file or directory"),
        ("one.pem", None, "ssl_certfile: {}/one.pem: it holds no private key"),
        ("one.pem", "other-key.pem", "ssl_keyfile: {}/other-key.pem: it is not the key of {}/one.pem"),
        ("one.pem", "one.pem", "ssl_keyfile: {}/one.pem: it holds no private key"),
        ("one-key.pem", "one-key.pem", "ssl_certfile: {}/one-key.pem: it holds no certificate"),
        ("locked.pem", "locked-key.pem", "ssl_keyfile: {}/locked-key.pem: its key is encrypted"),
        ("broken.pem", "one-key.pem", "ssl_certfile: {}/broken.pem: it cannot be used"),
        (None, "one-key.pem", "ssl_keyfile: {}/one-key.pem: there is no ssl_certfile"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_said_by_setting(
    certificates: Path, certificate: str | None, key: str | None, said: str
) -> None:
    files = {"ssl_certfile": certificate, "ssl_keyfile": key}
    config = ServerConfig(**{name: certificates / file if file else None for name, file in files.items()})
    with pytest.raises(ConfigError) as raised:
        check_certificate(config)
    assert raised.value.message.startswith(said.replace("{}", str(certificates)))
    assert raised.value.param == said.partition(":")[0]
    assert len(raised.value.message) <= 300


@pytest.mark.parametrize(
    ("host", "api_keys", "is_warned"),
    [
        ("0.0.0.0", (), True),
        ("::", (), True),
        ("10.1.2.3", (), True),
        ("fish.example", (), True),
        ("0.0.0.0", ("secret",), False),
        ("127.0.0.1", (), False),
        ("localhost", (), False),
        ("::1", (), False),
    ],
)
def test_a_server_that_everybody_may_use_says_so(
    host: str, api_keys: tuple[str, ...], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_strangers(host, api_keys)
    assert [f"host {host} without API keys" in line for line in caplog.messages] == [True] * is_warned
