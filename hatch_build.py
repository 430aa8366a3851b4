"""Builds the native backend when the package is installed, editable or not; without a compiler the wheel stays pure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "src/shoal/model/native"


class NativeBuildHook(BuildHookInterface[Any]):
    """A wheel that carries libraries is tagged for the platform they were compiled on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = _load(Path(self.root) / FOLDER / "build.py")
        libraries = build.build(list(build.isa_flags()))
        if libraries:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["artifacts"] += [f"{FOLDER}/{library.name}" for library in libraries]


def _load(path: Path) -> ModuleType:
    """The module at the path: the packages that are being built cannot be imported yet."""
    spec = importlib.util.spec_from_file_location("shoal_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
