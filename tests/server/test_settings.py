from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pydantic
import pytest

from shoal.scheduler.errors import ConfigError
from shoal.scheduler.policies import POLICIES
from shoal.server.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No file, no environment."""
    for name in os.environ:
        if name.startswith("SHOAL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fault(*args: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(list(args))
    return caught.value.message


def test_the_defaults() -> None:
    settings = load_settings([])
    assert settings.model_dump() == Settings.model_construct().model_dump()
    assert (settings.server.host, settings.server.port, settings.server.api_keys) == ("127.0.0.1", 8000, ())


def test_each_source_wins_over_the_one_before(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    (empty_folder / "shoal.toml").write_text(
        'model = "of-file"\n[server]\nhost = "0.0.0.1"\nport = 1\n[scheduler]\nmax_num_seqs = 3\n'
    )
    assert (load_settings([]).server.host, load_settings([]).server.port) == ("0.0.0.1", 1)
    monkeypatch.setenv("SHOAL_SERVER__PORT", "2")
    monkeypatch.setenv("SHOAL_MODEL", "of-environment")
    assert load_settings([]).server.port == 2
    settings = load_settings(["--server.port", "3"])
    assert (settings.model, settings.server.host, settings.server.port) == ("of-environment", "0.0.0.1", 3)
    assert settings.scheduler.max_num_seqs == 3
    assert settings.cache.block_size == 16


def test_another_file(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    for name in ("shoal", "first", "second"):
        (empty_folder / f"{name}.toml").write_text(f'model = "{name}"\n')
    assert load_settings([]).model == "shoal"
    monkeypatch.setenv("SHOAL_CONFIG", "first.toml")
    assert load_settings([]).model == "first"
    assert load_settings(["--config", "second.toml"]).model == "second"
    assert load_settings(["--config=second.toml"]).model == "second"
    assert "no such file: third.toml" in fault("--config", "third.toml")


def test_the_command_line() -> None:
    args = ["--port", "0", "--api-keys", "a,b", "--no-enable-prefix-caching", "--access-log", "--memory-mib=64"]
    settings = load_settings([*args, "--served-model-name", "fish", "--drain-seconds", "0.5"])
    assert (settings.server.port, settings.server.api_keys, settings.server.access_log) == (0, ("a", "b"), True)
    assert (settings.cache.enable_prefix_caching, settings.cache.memory_mib) == (False, 64)
    assert (settings.server.served_model_name, settings.server.drain_seconds) == ("fish", 0.5)


def test_the_backend_on_the_command_line() -> None:
    engine, cache = load_settings([]).engine, load_settings([]).cache
    assert (engine.backend, engine.quantization, engine.pin_threads) == ("auto", "none", None)
    assert cache.kv_cache_dtype == "auto"
    args = ["--backend", "native", "--quantization=int8", "--kv-cache-dtype", "float16", "--threads", "3"]
    settings = load_settings([*args, "--no-pin-threads"])
    assert settings.engine.backend == "native"
    assert (settings.engine.quantization, settings.cache.kv_cache_dtype) == ("int8", "float16")
    assert (settings.engine.threads, settings.engine.pin_threads) == (3, False)
    assert load_settings(["--pin-threads"]).engine.pin_threads is True


def test_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings([]).engine.trace is None
    monkeypatch.setenv("SHOAL_ENGINE__TRACE", "a.json")
    assert load_settings([]).engine.trace == Path("a.json")
    assert load_settings(["--trace", "folder/b.json"]).engine.trace == Path("folder/b.json")


def test_the_knobs_of_the_policies_are_settings() -> None:
    """Their defaults stand here, too, so that `--help` shows them."""
    scheduler = load_settings([]).scheduler
    for policy in POLICIES.values():
        for name, default in asdict(policy.Knobs()).items():
            assert getattr(scheduler, name) == default, name
    args = ["--policy", "sjf", "--predictor", "max_tokens", "--ageing-tokens=5", "--static-timeout-seconds", "0.5"]
    scheduler = load_settings(args).scheduler
    assert (scheduler.policy, scheduler.predictor) == ("sjf", "max_tokens")
    assert (scheduler.ageing_tokens, scheduler.static_timeout_seconds) == (5.0, 0.5)


def test_lists_in_the_environment_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_SERVER__API_KEYS", '["a", "b"]')
    assert load_settings([]).server.api_keys == ("a", "b")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "70000"], "server.port: input should be less than or equal to 65535 (got '70000')"),
        (["--port", "http"], "server.port: input should be a valid integer"),
        (["--port"], "--port: expected one argument"),
        (["--prot", "1"], "unrecognized arguments: --prot"),
        (["extra"], "unrecognized arguments: extra"),
        (["--max-num-seqs", "0"], "scheduler.max_num_seqs: input should be greater than or equal to 1"),
        (["--drain-seconds", "nan"], "server.drain_seconds: input should be a finite number"),
        (["--drain-seconds", "-1"], "server.drain_seconds: input should be greater than or equal to 0"),
        (["--dtype", "float8"], "engine.dtype: input should be 'auto', 'float32' or 'bfloat16'"),
        (["--device", "abacus"], "engine.device: "),
        (["--backend", "cuda"], "engine.backend: input should be 'auto', 'native' or 'torch'"),
        (["--quantization", "int4"], "engine.quantization: input should be 'none' or 'int8'"),
        (["--kv-cache-dtype", "bfloat16"], "cache.kv_cache_dtype: input should be 'auto', 'float32' or 'float16'"),
        (["--predictor", "oracle"], "scheduler.predictor: input should be 'max_tokens' or 'learned'"),
        (["--ageing-seconds", "0"], "scheduler.ageing_seconds: input should be greater than 0"),
        (["--ageing-tokens", "inf"], "scheduler.ageing_tokens: input should be a finite number"),
        (["--prompt-weight", "-1"], "scheduler.prompt_weight: input should be greater than 0"),
        (["--ttft-slo-ms", "fast"], "scheduler.ttft_slo_ms: input should be a valid number"),
        (["--static-timeout-seconds", "4000"], "scheduler.static_timeout_seconds: input should be less than or equal"),
        (["--pin-threads", "2"], "unrecognized arguments: 2"),
        (["--log-level", "loud"], "server.log_level: "),
        (["--api-keys", ""], "server.api_keys.0: string should have at least 1 character"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line(args: list[str], message: str) -> None:
    assert message in fault(*args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server\n", "shoal.toml: "),
        ("port = 1\n", "port: unknown setting"),
        ("[server]\nprot = 1\n", "server.prot: unknown setting"),
        ("[sever]\nport = 1\n", "sever: unknown setting"),
        ("[server]\nport = 'x'\n", "server.port: input should be a valid integer"),
        ("[server]\nport = 0\nhost = 1\n[cache]\nblock_size = 0\n", "server.host: "),
        ("[server]\nport = 0\nhost = 1\n[cache]\nblock_size = 0\n", "cache.block_size: "),
        ("server = 1\n", "server: "),
    ],
)
def test_a_wrong_file(empty_folder: Path, text: str, message: str) -> None:
    (empty_folder / "shoal.toml").write_text(text)
    assert message in fault()


def test_a_file_that_is_no_text(empty_folder: Path) -> None:
    (empty_folder / "shoal.toml").write_bytes(b"\xff\xfe")
    assert fault().startswith("shoal.toml: ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SHOAL_PORT", "1", "unknown environment variable SHOAL_PORT"),
        ("SHOAL_SERVER__PROT", "1", "server.prot: unknown setting"),
        ("SHOAL_SERVER__PORT", "x", "server.port: input should be a valid integer"),
        ("SHOAL_SERVER", "{x", "server"),
    ],
)
def test_a_wrong_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    assert message in fault()


def test_the_clients_environment_is_none_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_URL", "http://elsewhere")
    monkeypatch.setenv("SHOAL_API_KEY", "secret")
    load_settings([])


def test_settings_are_never_written_again() -> None:
    settings = load_settings([])
    with pytest.raises(pydantic.ValidationError):
        settings.model = "other"
    with pytest.raises(pydantic.ValidationError):
        settings.server.port = 1


def test_every_setting_is_documented() -> None:
    for name, field in Settings.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {name: field}).items():
            assert inner.description, key
