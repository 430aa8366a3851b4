from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import msgspec
import pytest

from shoal.scheduler.errors import ConfigError
from shoal.scheduler.policies import POLICIES
from shoal.server.settings import Settings, declared, resolve
from shoal.server.sources import load_settings


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
    assert settings == resolve({})
    assert (settings.model, settings.server.host, settings.server.port) == ("shoal-moe", "127.0.0.1", 8000)
    assert settings.server.api_keys == ()


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
    assert load_settings(["--model", "of-command-line"]).model == "of-command-line"


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
    args = ["--port", "0", "--api-keys", "a,b", "--no-enable-prefix-caching", "--no-access-log", "--memory-mib=64"]
    settings = load_settings([*args, "--served-model-name", "fish", "--drain-seconds", "0.5"])
    assert (settings.server.port, settings.server.api_keys, settings.server.access_log) == (0, ("a", "b"), False)
    assert (settings.cache.enable_prefix_caching, settings.cache.memory_mib) == (False, 64)
    assert (settings.server.served_model_name, settings.server.drain_seconds) == (("fish",), 0.5)
    assert load_settings(["--api-keys", "a", "--api-keys", "b"]).server.api_keys == ("a", "b")


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


def test_speculation_has_a_short_name() -> None:
    for args in (["--speculation", "suffix"], ["--method", "suffix"], ["--speculation.method=suffix"]):
        assert load_settings(args).speculation.method == "suffix"


def test_the_knobs_of_the_policies_are_settings(empty_folder: Path) -> None:
    settings = load_settings([])
    assert {name: type(knobs) for name, knobs in settings.knobs.items()} == {
        name: policy.Knobs for name, policy in POLICIES.items()
    }
    (empty_folder / "shoal.toml").write_text("[scheduler]\nageing_seconds = 3\nfair_lead = 100\n")
    args = ["--policy", "sjf", "--predictor", "max_tokens", "--ageing-tokens=5"]
    settings = load_settings([*args, "--static-timeout-seconds", "0.5"])
    assert settings.scheduler.policy == "sjf"
    assert settings.knobs["sjf"] == POLICIES["sjf"].Knobs(predictor="max_tokens", ageing_tokens=5.0)  # type: ignore[call-arg]
    scheduler = settings.sections()["scheduler"]
    assert (scheduler["static_timeout_seconds"], scheduler["fair_lead"], scheduler["ageing_seconds"]) == (0.5, 100, 3)


def test_no_name_stands_for_two_settings() -> None:
    names = [name for settings in declared().values() for name in settings]
    assert len(set(names)) == len(names) == sum(len(settings) for settings in declared().values())
    knobs = [each.name for policy in dict.fromkeys(p.Knobs for p in POLICIES.values()) for each in fields(policy)]
    assert len(set(knobs)) == len(knobs)


def test_settings_cross_to_another_process() -> None:
    settings = load_settings(
        ["--trace", "a.json", "--api-keys", "k", "--policy", "fair", "--fair-lead", "9", "--threads=2"]
    )
    assert resolve(msgspec.json.decode(msgspec.json.encode(settings.sections(), enc_hook=str))) == settings


def test_lists_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ('["a", "b"]', "a,b"):
        monkeypatch.setenv("SHOAL_SERVER__API_KEYS", text)
        assert load_settings([]).server.api_keys == ("a", "b")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "70000"], "server.port must be at most 65535, not 70000"),
        (["--port", "http"], "server.port must be an integer, not 'http'"),
        (["--port"], "Option '--port' requires an argument."),
        (["--prot", "1"], "No such option '--prot'."),
        (["extra"], "Got unexpected extra argument (extra)"),
        (["--max-num-seqs", "0"], "scheduler.max_num_seqs must be at least 1, not 0"),
        (["--drain-seconds", "nan"], "server.drain_seconds must be a finite number, not nan"),
        (["--drain-seconds", "-1"], "server.drain_seconds must be at least 0, not -1.0"),
        (["--dtype", "float8"], "engine.dtype must be one of auto, float32, bfloat16, not 'float8'"),
        (["--device", "abacus"], "engine.device must be text like cpu|cuda"),
        (["--backend", "cuda"], "engine.backend must be one of auto, native, torch, not 'cuda'"),
        (["--quantization", "int2"], "engine.quantization must be one of none, int8, int4, not 'int2'"),
        (
            ["--kv-cache-dtype", "bfloat16"],
            "cache.kv_cache_dtype must be one of auto, float32, float16, int8, not 'bfloat16'",
        ),
        (["--predictor", "oracle"], "scheduler.predictor must be one of max_tokens, learned, not 'oracle'"),
        (["--policy", "lifo"], "unknown policy 'lifo'; known are "),
        (["--ageing-seconds", "0"], "scheduler.ageing_seconds must be above 0, not 0.0"),
        (["--ageing-tokens", "inf"], "scheduler.ageing_tokens must be a finite number"),
        (["--prompt-weight", "-1"], "scheduler.prompt_weight must be above 0"),
        (["--ttft-slo-ms", "fast"], "scheduler.ttft_slo_ms must be a number, not 'fast'"),
        (["--static-timeout-seconds", "4000"], "scheduler.static_timeout_seconds must be at most 3600"),
        (["--pin-threads", "2"], "Got unexpected extra argument (2)"),
        (["--log-level", "loud"], "server.log_level must be one of debug, info, warning, error, not 'loud'"),
        (["--api-keys", ""], "api_keys must not hold an empty key"),
        (["--max-num-batched-tokens", "8"], "max_num_batched_tokens (8) must be at least max_num_seqs (64)"),
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
        ("[server]\nprot = 1\n", "server.prot: unknown setting; did you mean port?"),
        ("[sever]\nport = 1\n", "sever: unknown setting; did you mean server?"),
        ("[server]\nport = 'x'\n", "server.port must be an integer, not 'x'"),
        ("[server]\nport = 0\nhost = 1\n[cache]\nblock_size = 0\n", "server.host must be text, not 1"),
        ("[server]\nport = 0\nhost = 1\n[cache]\nblock_size = 0\n", "cache.block_size must be at least 1, not 0"),
        ("server = 1\n", "server must be a section, not 1"),
        ("model = 1\n", "model must be text, not 1"),
    ],
)
def test_a_wrong_file(empty_folder: Path, text: str, message: str) -> None:
    (empty_folder / "shoal.toml").write_text(text)
    assert message in fault().splitlines() or message in fault()


def test_a_file_that_is_no_text(empty_folder: Path) -> None:
    (empty_folder / "shoal.toml").write_bytes(b"\xff\xfe")
    assert fault().startswith("shoal.toml: ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SHOAL_PORT", "1", "unknown environment variable SHOAL_PORT; did you mean SHOAL_SERVER__PORT?"),
        ("SHOAL_SERVER__PROT", "1", "server.prot: unknown setting"),
        ("SHOAL_SERVER__PORT", "x", "server.port must be an integer, not 'x'"),
        ("SHOAL_SERVER", "{x", "unknown environment variable SHOAL_SERVER"),
        ("SHOAL_SERVER__API_KEYS", "[x", "'[x' is not a JSON list"),
        ("SHOAL_WHATEVER", "1", "unknown environment variable SHOAL_WHATEVER"),
    ],
)
def test_a_wrong_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    assert message in fault()


def test_the_environment_of_others_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the terminal client, and those that Kubernetes sets for a Service named shoal."""
    for name, value in {
        "SHOAL_URL": "http://elsewhere",
        "SHOAL_API_KEY": "secret",
        "SHOAL_SERVICE_HOST": "10.0.0.1",
        "SHOAL_SERVICE_PORT": "80",
        "SHOAL_SERVICE_PORT_HTTP": "80",
        "SHOAL_PORT": "tcp://10.0.0.1:80",
        "SHOAL_PORT_80_TCP": "tcp://10.0.0.1:80",
        "SHOAL_PORT_80_TCP_PROTO": "tcp",
        "SHOAL_PORT_80_TCP_PORT": "80",
        "SHOAL_PORT_80_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_settings([]) == resolve({})


def test_settings_are_never_written_again() -> None:
    settings: Settings = load_settings([])
    with pytest.raises(FrozenInstanceError):
        settings.model = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        settings.server.port = 1  # type: ignore[misc]


def test_every_setting_is_documented() -> None:
    for settings in declared().values():
        for one in settings.values():
            assert one.field.metadata["help"].endswith("."), one.path


def test_keys_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\ntwo\n", "utf-8")
    server = load_settings(["--api-keys-file", str(file), "--api-keys", "zero"]).server
    assert server.all_api_keys() == ("zero", "one", "two")
    file.write_text("\n", "utf-8")
    with pytest.raises(ConfigError, match="holds no key"):
        server.all_api_keys()
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        server.all_api_keys()
