"""Where the corpus comes from: the sources in pinned wheels, and the library and reference of the running Python.

Wheels are downloaded with pip, checked against the hashes in `corpus.txt`, and read as the zip archives they are;
nothing is installed or run.
"""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

from shoal.scheduler.errors import ConfigError

CORPUS_FILE = Path(__file__).parent / "corpus.txt"
STDLIB = "python-stdlib"

_PIN = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")
_PIP_DOWNLOAD = [
    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"),
    # Pure-Python wheels only, so that every machine trains on the same bytes.
    *("--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none", "--python-version=3.11"),
]
_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF)\b")
# Tests repeat what they test; vendored packages have other licences; the rest is data in the form of Python.
_SKIPPED_FOLDERS = re.compile(
    r"(^|/)(tests?|testing|testsuite|_?vendor(ed)?|locales?|migrations|unicode_data|lib2to3|idlelib|turtledemo"
    r"|ensurepip|pydoc_data|encodings|site-packages|dist-packages|typeshed|node_modules)/"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned package of the corpus."""

    name: str
    version: str
    sha256: str

    def check(self, path: Path) -> None:
        """Refuse a file that is not the pinned one; ConfigError with both hashes."""
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 != self.sha256:
            raise ConfigError(
                f"corpus package {self.name}=={self.version}: {path.name} has sha256 {sha256}, pinned is {self.sha256}",
                param=self.name,
            )


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A text of the corpus, with its package and its path there."""

    package: str
    path: str
    text: str


def read_pins(path: Path = CORPUS_FILE) -> list[Package]:
    """The packages in a requirements file of `name==version --hash=sha256:...` lines; ConfigError for another line."""
    packages = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _PIN.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}: not a package pinned by hash: {line!r}", param=path.name)
        packages.append(Package(*match.groups()))
    return packages


def download(wheels: Path, pins: Path = CORPUS_FILE) -> None:
    """Download what `pins` lists into the folder `wheels`; ConfigError with pip's message if that fails."""
    wheels.mkdir(parents=True, exist_ok=True)
    command = [*_PIP_DOWNLOAD, f"--dest={wheels}", f"--requirement={pins}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError(f"the corpus could not be downloaded: {result.stderr.strip()}", param=pins.name)


def verify(wheels: Path, packages: list[Package]) -> dict[str, Path]:
    """The wheel of each package by name; ConfigError that names a package which is missing or has another hash."""
    found = {tuple(path.name.lower().split("-")[:2]): path for path in wheels.glob("*.whl")}
    checked = {}
    for package in packages:
        path = found.get((package.name.replace("-", "_"), package.version))
        if path is None:
            raise ConfigError(
                f"corpus package {package.name}=={package.version} is missing from {wheels}", param=package.name
            )
        package.check(path)
        checked[package.name] = path
    return checked


def read_wheel(package: str, wheel: Path) -> Iterator[SourceFile]:
    """The Python files in a wheel, tests and vendored packages left out."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and not _SKIPPED_FOLDERS.search(name):
                yield SourceFile(package, name, archive.read(name).decode("utf-8", errors="replace"))


def read_licence(wheel: Path) -> str:
    """A wheel's licence as its own metadata states it: the SPDX expression, else the classifiers, else the field.

    ConfigError if it is not a permissive one.
    """
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(archive.read(name))
    classifiers = metadata.get_all("Classifier", [])
    licences = [line.rsplit(" :: ", 1)[1] for line in classifiers if line.startswith("License :: ")]
    licence = metadata["License-Expression"] or ", ".join(licences) or (metadata["License"] or "none").split("\n")[0]
    if not _PERMISSIVE.search(licence) or "GPL" in licence:
        raise ConfigError(f"{wheel.name}: its licence ({licence}) is not known to be permissive", param=wheel.name)
    return str(licence)


def read_stdlib() -> Iterator[SourceFile]:
    """The running Python's library, and its language reference as `help()` shows it."""
    from pydoc_data import topics  # noqa: PLC0415  (half a megabyte that only this function needs)

    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not _SKIPPED_FOLDERS.search(name):
            yield SourceFile(STDLIB, name, path.read_text("utf-8", errors="replace"))
    for topic, text in sorted(topics.topics.items()):
        yield SourceFile(STDLIB, f"topics/{topic}.txt", text)


def stdlib_licence() -> str:
    """The licence line of the running Python, for the model card."""
    return f"PSF-2.0 (CPython {platform.python_version()})"
