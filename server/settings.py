"""The settings: what may be set, section by section.  `server/sources.py` says where the values come from.

A section is made of the frozen configurations that scheduler, policies, backend, cache and speculation take; each
setting is declared in one of them and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from shoal.model.backends.config import BackendConfig, CacheConfig
from shoal.model.speculation.config import SpeculationConfig
from shoal.scheduler.config import Config, SchedulerLimits, check_setting, setting
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.policies import POLICIES, find_policy
from shoal.server.faults import FaultsConfig


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Config):
    """HTTP, and what the server says of itself."""

    host: str = setting("127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
    port: int = setting(8000, at_least=0, at_most=65535, help="Port to listen on; 0 takes a free one.")
    served_model_name: tuple[str, ...] = setting(
        (), help="Names of the model in the API, of which answers have the first; that of the checkpoint if not set."
    )
    api_keys: tuple[str, ...] = setting((), help="If any are given, requests must carry one of them as a bearer token.")
    api_keys_file: Path | None = setting(None, help="File with further keys, one a line, read at the start.")
    ssl_certfile: Path | None = setting(
        None, help="PEM file of a certificate, and those that lead to its root; with it the server speaks HTTPS alone."
    )
    ssl_keyfile: Path | None = setting(None, help="PEM file of the certificate's key, if that is not in ssl_certfile.")
    cors_origins: tuple[str, ...] = setting(
        (), help="Origins of pages that may use the server from a browser, such as http://localhost:3000; * is all."
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), help="Further names of a server that listens on a local address, as a proxy before it passes them on."
    )
    max_queue_seconds: float = setting(
        2.0, at_least=0, help="A request that would wait longer for its turn is refused with HTTP 429; 0 is no limit."
    )
    max_queue_tokens: int | None = setting(
        1_048_576, at_least=1, help="Most prompt tokens that wait for a first token; more are refused with HTTP 429."
    )
    key_max_requests: int | None = setting(
        None, at_least=1, help="Most unfinished requests of an API key; of all together if there are no keys."
    )
    key_requests_per_minute: int | None = setting(
        None, at_least=1, help="Most requests of an API key in a minute; of all together if there are no keys."
    )
    key_tokens_per_minute: int | None = setting(
        None, at_least=1, help="Most tokens of an API key in a minute, of prompts and outputs; likewise."
    )
    any_model: bool = setting(False, help="Whether requests may name any model, and get the one that is served.")
    unknown_fields: Literal["ignore", "refuse"] = setting(
        "ignore", help="ignore names them in a header of the answer; refuse answers with HTTP 400."
    )
    tool_format: Literal[
        "auto",
        "hermes",
        "qwen_xml",
        "llama3",
        "mistral",
        "mistral_args",
        "deepseek",
        "deepseek_v31",
        "json",
    ] = setting("auto", help="How the model writes calls of tools; auto is what its chat template says.")
    reasoning_format: Literal["auto", "none"] = setting(
        "auto", help="auto gives thoughts as reasoning_content if the chat template has them; none leaves them as text."
    )
    data_folder: Path = setting(
        Path("shoal-data"), help="Folder for files and batches, made when the first of them comes."
    )
    page: bool = setting(
        True, help="Whether there is a page at /, and what it lives from: the engine's events and loads."
    )
    page_policies: bool = setting(
        True, help="Whether a load that is started from the page may be run under another policy, while all else rests."
    )
    max_body_bytes: int = setting(
        4 * 1024 * 1024, at_least=1, help="Largest request body that is read, uploaded files excepted."
    )
    client_timeout_seconds: int = setting(
        60, at_least=1, help="A client that takes nothing of what is sent to it for this long is cut off."
    )
    drain_seconds: float = setting(
        30.0, at_least=0, help="After SIGTERM, how long unfinished requests may go on before they end with an error."
    )
    resume_grace_seconds: float = setting(
        30.0, at_least=0, help="How long an answer is held for a client that left and asked to resume; 0 holds none."
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", help="Least severe messages to log.")
    log_format: Literal["text", "json"] = setting("text", help="Lines for people, or one JSON object a line.")
    access_log: bool = setting(True, help="Whether each HTTP request is logged.")
    otlp_endpoint: str | None = setting(
        None,
        pattern=r"https?://\S+",
        help="OpenTelemetry collector for traces of requests, such as http://localhost:4318.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.api_keys):
            raise ConfigError("api_keys must not hold an empty key", param="api_keys")

    def all_api_keys(self) -> tuple[str, ...]:
        """Return the keys that are given, and those of the file.

        Raises:
            ConfigError: the file cannot be read, or holds no key.
        """
        if self.api_keys_file is None:
            return self.api_keys
        try:
            keys = self.api_keys_file.read_text("utf-8").split()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"api_keys_file: {self.api_keys_file}: {error}", param="api_keys_file") from error
        if not keys:
            raise ConfigError(f"api_keys_file: {self.api_keys_file} holds no key", param="api_keys_file")
        return (*self.api_keys, *keys)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(BackendConfig):
    """The engine: what computes the model, and where."""

    max_model_len: int | None = setting(
        None, at_least=1, help="Most tokens of a request, prompt and output together; the model's own limit if not set."
    )
    engines: int = setting(
        1,
        at_least=1,
        help="Engine processes, which share the cores and of which each has the model and a KV cache; a request goes "
        "to the one that knows its prefix, and on in another one if that dies.",
    )
    standby: bool = setting(False, help="Whether a second engine stays loaded, to take over from one that dies.")
    hang_seconds: float = setting(
        60.0, at_least=0.5, help="An engine that completes no step for this long, though it has work, is replaced."
    )
    trace: Path | None = setting(
        None, help="File, begun anew, for each step as a Chrome trace, which https://ui.perfetto.dev opens."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pin_threads and self.engines > 1:
            raise ConfigError(f"pin_threads is for one engine, not for engines = {self.engines}", param="pin_threads")


@dataclass(frozen=True, kw_only=True)
class SchedulerSection(SchedulerLimits):
    """What runs in a step, and in which order."""

    policy: str = setting("fcfs", help="Scheduling policy; `shoal policies` lists them.")

    def __post_init__(self) -> None:
        super().__post_init__()
        find_policy(self.policy)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, resolved.

    Attributes:
        model: checkpoint folder, GGUF file, or the name of a model.
        knobs: the knobs of each policy, by its name; in a file they stand in the section `scheduler`.
    """

    model: str
    server: ServerConfig
    engine: EngineConfig
    cache: CacheConfig
    scheduler: SchedulerSection
    knobs: Mapping[str, Config]
    speculation: SpeculationConfig
    faults: FaultsConfig

    def sections(self) -> dict[str, Any]:
        """The settings as a file holds them; `resolve` makes the same settings of it.  Secrets are not left out."""
        sections = {name: asdict(getattr(self, name)) for name in _SECTIONS}
        for knobs in self.knobs.values():
            sections["scheduler"] |= asdict(knobs)
        return {"model": self.model, **sections}


@dataclass(frozen=True)
class Declared:
    """A setting as it is declared: its section, its field, and its type."""

    section: str
    field: Field[Any]
    type: Any

    @property
    def path(self) -> str:
        return f"{self.section}.{self.field.name}"


_SECTIONS: dict[str, type[Config]] = {
    "server": ServerConfig,
    "engine": EngineConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerSection,
    "speculation": SpeculationConfig,
    "faults": FaultsConfig,
}
DEFAULT_MODEL = "shoal-moe"
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


@cache
def declared() -> dict[str, dict[str, Declared]]:
    """Every setting by section and name.  No name stands in two sections, so that each is an option of its own."""
    found: dict[str, dict[str, Declared]] = {}
    for section, kind in _SECTIONS.items():
        kinds = [kind, *(policy.Knobs for policy in POLICIES.values())] if section == "scheduler" else [kind]
        found[section] = {one.field.name: one for each in kinds for one in _fields(section, each)}
    return found


def resolve(values: Mapping[str, Any]) -> Settings:
    """Make settings of what a file, the environment and the command line say together; the rest has its default.

    Args:
        values: `model`, and by section the values of its settings; numbers and flags may be text.

    Raises:
        ConfigError: a line for each setting that is unknown, of another type, or out of range.
    """
    faults: list[ConfigError] = []
    known = declared()
    taken: dict[str, dict[str, Any]] = {section: {} for section in known}
    model = values.get("model", DEFAULT_MODEL)
    if not isinstance(model, str):
        faults.append(ConfigError(f"model must be text, not {model!r}", param="model"))
    for section, given in values.items():
        if section in known and isinstance(given, Mapping):
            for name, value in given.items():
                try:
                    taken[section][name] = _convert(section, name, value)
                except ConfigError as error:
                    faults.append(error)
        elif section in known:
            faults.append(ConfigError(f"{section} must be a section, not {given!r}", param=section))
        elif section != "model":
            faults.append(_unknown(section, [*known, "model"]))
    if not faults:
        try:
            return _build(str(model), taken)
        except ConfigError as error:
            faults.append(error)
    raise ConfigError("\n".join(fault.message for fault in faults), param=faults[0].param)


def _build(model: str, taken: Mapping[str, Mapping[str, Any]]) -> Settings:
    made: dict[str, Any] = {section: kind.select(taken[section]) for section, kind in _SECTIONS.items()}
    knobs = {name: policy.Knobs.select(taken["scheduler"]) for name, policy in POLICIES.items()}
    return Settings(model=model, knobs=knobs, **made)


def _convert(section: str, name: str, value: Any) -> Any:
    """The value in the setting's type, within its range.

    Raises:
        ConfigError: it cannot be; or there is no such setting.
    """
    known = declared()[section]
    if name not in known:
        raise _unknown(f"{section}.{name}", known)
    one = known[name]
    try:
        converted = msgspec.convert(value, one.type, strict=False, dec_hook=lambda kind, text: kind(text))
    except (msgspec.ValidationError, TypeError):
        raise ConfigError(f"{one.path} must be {describe(one.type)}, not {value!r}", param=one.path) from None
    try:
        check_setting(one.field, one.type, converted)
    except ConfigError as error:
        raise ConfigError(f"{section}.{error.message}", param=one.path) from None
    return converted


def describe(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is tuple:
        return "a list of texts"
    return " or ".join(_KINDS[kind] for kind in (get_args(hint) or (hint,)) if kind in _KINDS)


def _fields(section: str, kind: type[Config]) -> Iterator[Declared]:
    hints = get_type_hints(kind)
    return (Declared(section, each, hints[each.name]) for each in fields(kind))


def _unknown(path: str, known: Mapping[str, Any] | list[str]) -> ConfigError:
    near = difflib.get_close_matches(path.rpartition(".")[2], list(known), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"{path}: unknown setting{hint}", param=path)
