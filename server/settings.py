"""The settings: defaults < shoal.toml < environment < command line, resolved once and never written again.

This is the only module that reads the environment.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from shoal.model.speculation.length import MOST_SPEC_TOKENS
from shoal.scheduler.errors import ConfigError

ENV_PREFIX = "SHOAL_"
# Read by the terminal client, whose settings are not the server's.
CLIENT_ENVIRONMENT = {"SHOAL_URL", "SHOAL_API_KEY"}

Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ServerSection(_Section):
    """How the server meets the world."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    served_model_name: str | None = None
    """Name of the model in the API; the checkpoint folder's name if not set."""
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """If any are given, requests must carry one of them as a bearer token."""
    max_body_bytes: Positive = 4 * 1024 * 1024
    """Largest request body that is read."""
    drain_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """After SIGTERM, how long unfinished requests may go on before they end with an error."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log messages that are printed."""
    access_log: bool = False
    """Whether each request is logged."""


class EngineSection(_Section):
    """What computes the model, and where."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    """Where the model runs: cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the computation; auto is float32 on the CPU, the checkpoint's own on a GPU."""
    backend: Literal["auto", "native", "torch"] = "auto"
    """What computes: native is ours in C++, for the CPU in float32; torch runs anywhere.  auto is native where it can
    be, and says why where it cannot."""
    quantization: Literal["none", "int8"] = "none"
    """How weights are kept: none keeps them in dtype; int8, which only native has, takes a quarter of the memory."""
    threads: Positive | None = None
    """CPU threads that compute; one per core if not set."""
    pin_threads: bool | None = None
    """Whether each compute thread of native stays on a core of its own; decided by itself if not set."""
    max_model_len: Positive | None = None
    """Most tokens of a request, prompt and output together; the model's own limit if not set."""
    trace: Path | None = None
    """File, begun anew, to which the engine writes each step as a Chrome trace, which https://ui.perfetto.dev opens."""


class CacheSection(_Section):
    """The paged KV cache."""

    block_size: Positive = 16
    """Tokens per block; native needs a multiple of 16."""
    num_blocks: Positive | None = None
    """Blocks in all; if not set, as many as `memory_mib` holds."""
    memory_mib: Positive | None = None
    """Memory for the KV cache; if not set, what max_num_seqs requests of max_model_len tokens need, but at most a
    quarter of the memory that is free."""
    kv_cache_dtype: Literal["auto", "float32", "float16"] = "auto"
    """Number format of the KV cache; auto is that of the computation.  float16, which only native has, takes half the
    memory of float32."""
    enable_prefix_caching: bool = True
    """Whether prompts that start alike share their blocks."""


class SchedulerSection(_Section):
    """What runs in a step."""

    policy: str = "fcfs"
    """Scheduling policy; `shoal policies` lists them."""
    max_num_seqs: Positive = 64
    """Most requests in one step."""
    max_num_batched_tokens: Positive = 512
    """Most tokens in one step, over all requests."""
    max_chunk_tokens: Positive = 512
    """Most tokens of one request in one step."""
    max_num_waiting: int = Field(default=1024, ge=0)
    """Most unfinished requests beyond max_num_seqs; more get HTTP 429."""
    ageing_seconds: Amount = 10.0
    """For priority: waiting time that makes up for one level of priority."""
    ageing_tokens: Amount = 20.0
    """For sjf: tokens of predicted work that a second of waiting makes up for."""
    predictor: Literal["max_tokens", "learned"] = "learned"
    """For sjf: what foretells the length of an output: max_tokens takes the request at its word, learned learns from
    the requests that end."""
    prompt_weight: Amount = 1.0
    """For fair: what a token of a prompt counts as service."""
    output_weight: Amount = 2.0
    """For fair: what an output token counts as service."""
    fair_lead: Amount = 256.0
    """For fair: service by which a client may be ahead of another in the batch before it sits out.  A client that comes
    back may catch up on twice as much of what it missed."""
    ttft_slo_ms: Amount = 1000.0
    """For deadline: time to the first token that is wanted of requests that do not say it."""
    tpot_slo_ms: Amount = 100.0
    """For deadline: time for each further token that is wanted of requests that do not say it."""
    static_timeout_seconds: float = Field(default=0.1, gt=0, le=3600)
    """For static and static-nopad: longest time that a request waits for a batch to become full."""


class SpeculationSection(_Section):
    """Speculative decoding: guessing the next tokens, and verifying the guesses in one step."""

    method: Literal["off", "draft", "ngram", "self"] = "off"
    """What guesses: a draft model, n-grams of the request's own text, the first layers of the model itself, or nothing.
    On the command line also --speculation."""
    num_spec_tokens: int | None = Field(default=None, ge=1, le=MOST_SPEC_TOKENS)
    """Tokens of each guess; if not set, as many for each request and step as pay, which may be none."""
    draft_model: str = "shoal-draft"
    """Checkpoint folder, or the name of a bundled model, of the draft model; it must have the model's tokenizer."""
    draft_layers: Positive | None = None
    """Layers that self guesses with; a third of the model's if not set."""
    verification: Literal["coupled", "rejection"] = "coupled"
    """coupled accepts a guess that is what the model chooses, so that every text is the one without speculation;
    rejection accepts more, and keeps the distribution of texts but not each text."""


class Settings(BaseSettings):
    """Serve a model over HTTP, with the interface of OpenAI's API.

    Each option can also stand in shoal.toml (as a key of its section) or in the environment (as
    SHOAL_SECTION__KEY); the command line wins over the environment, and that over the file.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        cli_prog_name="shoal serve",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
    )

    model: str = "shoal-moe"
    """Checkpoint folder, or the name of a bundled model."""
    config: Path | None = None
    """TOML file to read instead of ./shoal.toml."""
    server: ServerSection = ServerSection()
    engine: EngineSection = EngineSection()
    cache: CacheSection = CacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    speculation: SpeculationSection = SpeculationSection()


def _shortcuts() -> dict[str, str | list[str]]:
    """`--port` for `--server.port`, and so on: the sections' keys are unique, so each is an option of its own."""
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {
        f"{section}.{key}".replace("_", "-"): key.replace("_", "-")
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, _Section)
        for key in model.model_fields
    }


def load_settings(args: list[str]) -> Settings:
    """Resolve the settings from command-line arguments, environment and file.

    Raises:
        ConfigError: a key is unknown or a value wrong; the message names each of them.
        SystemExit: after `--help`.
    """
    args = [re.sub(r"^--speculation(?=$|=)", "--speculation.method", arg) for arg in args]
    toml_file = _toml_file(args)
    _refuse_unknown_environment()

    class Resolved(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            command_line: CliSettingsSource[Any] = CliSettingsSource(
                settings_cls, cli_parse_args=args, cli_shortcuts=_shortcuts()
            )
            return command_line, env_settings, TomlConfigSettingsSource(settings_cls, toml_file)

    Resolved.__doc__ = inspect.getdoc(Settings)
    try:
        return Resolved()
    except ValidationError as error:
        raise ConfigError(_describe(error), param=_location(error.errors()[0])) from error
    except SettingsError as error:  # an unknown option, or an environment variable that is not JSON where it must be
        raise ConfigError(f"{error}; see shoal serve --help") from error
    except ValueError as error:  # malformed TOML
        raise ConfigError(f"{toml_file}: {error}", param="config") from error


def _toml_file(args: list[str]) -> Path | None:
    """The file to read: it must be known before the rest is parsed."""
    chosen = os.environ.get(f"{ENV_PREFIX}CONFIG")
    for index, arg in enumerate(args):
        if arg == "--config" and index + 1 < len(args):
            chosen = args[index + 1]
        elif arg.startswith("--config="):
            chosen = arg.partition("=")[2]
    if chosen is None:
        default = Path("shoal.toml")
        return default if default.exists() else None
    if not Path(chosen).is_file():
        raise ConfigError(f"config: no such file: {chosen}", param="config")
    return Path(chosen)


def _refuse_unknown_environment() -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name in os.environ:
        is_ours = name.upper().startswith(ENV_PREFIX) and name.upper() not in CLIENT_ENVIRONMENT
        if is_ours and name.upper().partition("__")[0] not in known:
            raise ConfigError(f"unknown environment variable {name}", param=name)


def _location(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"]) or "settings"


def _describe(error: ValidationError) -> str:
    """One line a fault: the key, what is wrong, and what was given."""
    lines = []
    for one in error.errors():
        if one["type"] == "extra_forbidden":
            lines.append(f"{_location(one)}: unknown setting")
        else:
            given = "" if "api_keys" in one["loc"] else f" (got {one['input']!r})"  # a log is no place for a key
            lines.append(f"{_location(one)}: {one['msg'][0].lower()}{one['msg'][1:]}{given}")
    return "\n".join(lines)
