"""The certificate by which the server speaks HTTPS, checked before anything slow begins."""

from __future__ import annotations

import ssl
from pathlib import Path

from shoal.scheduler.errors import ConfigError
from shoal.server.settings import ServerConfig

_NO_PASSWORD = ""  # without any, OpenSSL would ask the terminal for one and wait


def check_certificate(config: ServerConfig) -> None:
    """Raise ConfigError, naming the setting, unless the certificate and its key can be used, or there is none."""
    certificate, key = config.ssl_certfile, config.ssl_keyfile
    if certificate is None:
        if key is not None:
            raise _error("ssl_keyfile", key, "there is no ssl_certfile that it belongs to")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = _read("ssl_certfile", certificate)
    key_name, key_pem = ("ssl_certfile", pem) if key is None else ("ssl_keyfile", _read("ssl_keyfile", key))
    if "-----BEGIN CERTIFICATE-----" not in pem:
        raise _error("ssl_certfile", certificate, "it holds no certificate in PEM format")
    if "PRIVATE KEY-----" not in key_pem:
        advice = "; ssl_keyfile names one that stands elsewhere" if key is None else ""
        raise _error(key_name, key or certificate, f"it holds no private key in PEM format{advice}")
    if "ENCRYPTED" in key_pem:
        raise _error(key_name, key or certificate, "its key is encrypted; write it without: openssl pkey -in FILE")
    try:
        context.load_cert_chain(certificate, key, password=_NO_PASSWORD)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _error(key_name, key or certificate, f"it is not the key of {certificate}") from error
        raise _error("ssl_certfile", certificate, f"it cannot be used, or its key: {error.reason or error}") from error


def _read(name: str, path: Path) -> str:
    try:
        return path.read_text("ascii", errors="replace")
    except OSError as error:
        raise _error(name, path, f"cannot be read: {error.strerror}") from error


def _error(name: str, path: Path, message: str) -> ConfigError:
    return ConfigError(f"{name}: {path}: {message}"[:300], param=name)
