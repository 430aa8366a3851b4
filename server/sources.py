"""Where settings come from: defaults < shoal.toml < environment < command line.

This is the only module of the server that reads the environment.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from shoal.scheduler.errors import ConfigError
from shoal.server.settings import DEFAULT_MODEL, Declared, Settings, declared, resolve
from shoal.terminal import ColourContext

ENV_PREFIX = "SHOAL_"
CLIENT_ENVIRONMENT = {"SHOAL_URL", "SHOAL_API_KEY"}  # read by the terminal client
# What Kubernetes sets in every container for a Service named shoal.
_KUBERNETES = re.compile(r"SHOAL_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_ALIASES = {"speculation.method": "--speculation"}
_TITLES = {
    "server": "Server ([server] in shoal.toml)",
    "engine": "Engine ([engine])",
    "cache": "KV cache ([cache])",
    "scheduler": "Scheduler and policies ([scheduler])",
    "speculation": "Speculation ([speculation])",
    "faults": "Faults on purpose, for tests of programs ([faults])",
}
_HELP = "Serve a model over HTTP, with the interface of OpenAI's API."
_EPILOG = """\
Examples:
  shoal serve --model smollm2-135m --port 9000
  shoal serve --model ./model.gguf --quantization int8
  shoal serve --policy fair --max-num-seqs 16 --api-keys key-a,key-b
  SHOAL_SERVER__PORT=9000 shoal serve --config /etc/shoal.toml

Each option can also stand in shoal.toml, as a key of its section, or in the environment, as SHOAL_SECTION__KEY.
The command line wins over the environment, and the environment over the file."""


def load_settings(args: list[str]) -> Settings:
    """Resolve the settings from command-line arguments, environment and file.

    Raises:
        ConfigError: a key is unknown or a value wrong; the message names each of them.
        SystemExit: after `--help`.
    """
    try:
        given = SettingsCommand("shoal serve").make_context("shoal serve", list(args)).params
        if given.pop("as_json"):
            given["server.log_format"] = "json"
    except click.exceptions.Exit as end:
        raise SystemExit(end.exit_code) from None
    except click.UsageError as error:
        raise ConfigError(f"{error.format_message()} See shoal serve --help.") from None
    values = _merge(_of_environment(os.environ), _of_options(given))
    return resolve(_merge(_of_file(values.pop("config", None)), values))


def hub_cache() -> Path:
    """Where Hugging Face's tools keep what they download, by their own rules."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    return Path(os.path.expandvars(cache)).expanduser()


class SettingsCommand(click.Command):
    """A command with an option for each setting, in groups as in the file; any function may be its callback."""

    context_class = ColourContext

    def __init__(self, name: str) -> None:
        options = [
            click.Option(["--model"], metavar="MODEL"),
            click.Option(["--config"], metavar="FILE"),
            click.Option(["--json", "as_json"], is_flag=True),
            *(_option(one) for section in declared().values() for one in section.values()),
        ]
        super().__init__(name, params=[*options], help=_HELP, context_settings={"max_content_width": 110})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Model"):
            model = "A checkpoint folder, a .gguf file, or a name: shoal-moe, smollm2-135m."
            file = "TOML file to read instead of ./shoal.toml."
            log = "As --log-format json, and faults of the start as JSON too."
            rows = [("--model MODEL", f"{model}  [{DEFAULT_MODEL}]"), ("--config FILE", file), ("--json", log)]
            formatter.write_dl(rows)
        for section, settings in declared().items():
            with formatter.section(_TITLES[section]):
                formatter.write_dl([(_usage(one), _help(one)) for one in settings.values()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{_EPILOG}\n")


def _option(one: Declared) -> click.Option:
    """`--port`, and `--server.port` for those who spell it out."""
    names = [_flag(one), f"--{one.section}.{one.field.name}".replace("_", "-")]
    names += [_ALIASES[one.path]] if one.path in _ALIASES else []
    if bool in (one.type, *get_args(one.type)):
        names = [f"{name}/{name.replace('--', '--no-', 1)}" for name in names]
    values = [*map(str, get_args(one.type))] if get_origin(one.type) is Literal else []
    option = click.Option(
        names,
        multiple=_is_list(one),
        default=None,
        shell_complete=lambda _ctx, _param, begun: [value for value in values if value.startswith(begun)],
    )
    option.name = one.path
    return option


def _flag(one: Declared) -> str:
    return f"--{one.field.name}".replace("_", "-")


def _is_list(one: Declared) -> bool:
    return bool(one.type == tuple[str, ...])


def _usage(one: Declared) -> str:
    name = _ALIASES.get(one.path, _flag(one))
    kinds = [kind for kind in get_args(one.type) or (one.type,) if kind is not type(None)]
    if bool in kinds:
        return f"{name} / --no-{name[2:]}"
    words = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "FILE"}
    metavar = "TEXT,..." if _is_list(one) else "|".join(words.get(kind) or str(kind) for kind in kinds)
    return f"{name} {metavar}"


def _help(one: Declared) -> str:
    default = one.field.default
    shown = "" if default in (None, ()) else f"  [{str(default).lower() if isinstance(default, bool) else default}]"
    return f"{one.field.metadata['help']}{shown}"


# -- the sources -------------------------------------------------------------------------------------------------------


def _of_file(chosen: str | None) -> dict[str, Any]:
    path = Path(chosen or "shoal.toml")
    if chosen is None and not path.exists():
        return {}
    if not path.is_file():
        raise ConfigError(f"config: no such file: {path}", param="config")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # malformed, or no text at all
        raise ConfigError(f"{path}: {error}", param="config") from error


def _of_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """SHOAL_MODEL, SHOAL_CONFIG, and SHOAL_SECTION__KEY for each setting."""
    found: dict[str, Any] = defaultdict(dict)
    for variable, value in environment.items():
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or name in CLIENT_ENVIRONMENT or _is_of_kubernetes(name, value):
            continue
        section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if not key and section in ("model", "config"):
            found[section] = value
        elif key and section in declared():
            one = declared()[section].get(key)
            found[section][key] = _split(value) if one and _is_list(one) else value
        else:
            raise ConfigError(f"unknown environment variable {variable}{_hint(section)}", param=variable)
    return found


def _is_of_kubernetes(name: str, value: str) -> bool:
    return bool(_KUBERNETES.fullmatch(name)) or (name == "SHOAL_PORT" and "://" in value)


def _hint(name: str) -> str:
    """How a setting is spelt in the environment, where only its section was left out."""
    homes = [section for section, settings in declared().items() if name in settings]
    return f"; did you mean {ENV_PREFIX}{homes[0].upper()}__{name.upper()}?" if homes else ""


def _of_options(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = defaultdict(dict)
    for path, value in given.items():
        if value is None or value == ():
            continue
        section, _, key = path.partition(".")
        if not key:
            found[section] = value
        elif isinstance(value, tuple):
            found[section][key] = [part for text in value for part in _split(text)]
        else:
            found[section][key] = value
    return found


def _split(text: str) -> list[str]:
    """A list as text: JSON, or words with commas between them."""
    if text.startswith("["):
        try:
            items = json.loads(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not a JSON list") from None
        return [str(item) for item in items]
    return text.split(",")


def _merge(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Later sources win, key by key within a section."""
    merged: dict[str, Any] = {}
    for source in sources:
        for section, value in source.items():
            known = merged.get(section)
            merged[section] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
