"""Builds the native backend when the package is installed, editable or not; without a compiler the wheel stays pure."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "src/shoal/model/native"


class NativeBuildHook(BuildHookInterface[Any]):
    """A wheel that carries libraries is tagged for the platform they were compiled on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(self.root) / "src"))  # what is being built is not installed yet
        build = import_module("shoal.model.native.build")
        # Who works in a clone wants to begin; `make test` and others build for the other instruction sets.
        libraries = build.build([build.best_isa()] if version == "editable" else list(build.isa_flags()))
        if libraries:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["artifacts"] += [f"{FOLDER}/{library.name}" for library in libraries]
