"""CPython's documentation, from the sources in Debian's package of it.

The package is downloaded with apt, or put into the wheels' folder by hand where there is no apt; its hash is pinned.
A .deb is an `ar` archive (deb(5)) that holds the files in a tar archive, so that it is read without being installed.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from shoal.scheduler.errors import ConfigError

from .sources import Package, SourceFile

DOCUMENTATION = "python-docs"
LICENCE = "PSF-2.0"
PIN = Package("python3.11-doc", "3.11.2-6+deb12u8", "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b")

_SOURCES = re.compile(r"\./usr/share/doc/python3\.11/html/_sources/(.+\.rst)\.txt")
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


def archive_path(folder: Path) -> Path:
    """The path of the package in `folder`, under the name that apt gives it."""
    return folder / f"{PIN.name}_{PIN.version}_all.deb"


def download(folder: Path) -> None:
    """Have apt download the package into `folder` unless it is there; ConfigError with apt's message if it fails."""
    path = archive_path(folder)
    if path.exists():
        return
    pin = f"{PIN.name}={PIN.version}"
    by_hand = f"put {path.name} (from snapshot.debian.org) into {folder}"
    if shutil.which("apt-get") is None:
        raise ConfigError(f"corpus package {pin} needs Debian's apt-get; without it, {by_hand}", param=PIN.name)
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(["apt-get", "download", pin], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError(
            f"corpus package {pin} could not be downloaded ({result.stderr.strip()}); {by_hand}", param=PIN.name
        )


def verify(folder: Path) -> Path:
    """The package's path; ConfigError that names it if it is missing or has another hash."""
    path = archive_path(folder)
    if not path.exists():
        raise ConfigError(f"corpus package {PIN.name}={PIN.version} is missing from {folder}", param=PIN.name)
    PIN.check(path)
    return path


def read(path: Path) -> Iterator[SourceFile]:
    """The reStructuredText sources in the package, by their path in the documentation."""
    with tarfile.open(fileobj=io.BytesIO(_member(path.read_bytes(), "data.tar")), mode="r:*") as archive:
        for entry in archive:
            match = _SOURCES.fullmatch(entry.name)
            content = archive.extractfile(entry) if match and entry.isfile() else None
            if match and content:
                yield SourceFile(DOCUMENTATION, match[1], content.read().decode("utf-8", errors="replace"))


def _member(archive: bytes, prefix: str) -> bytes:
    """The content of the member of an `ar` archive whose name begins with `prefix`."""
    if not archive.startswith(_AR_MAGIC):
        raise ConfigError(f"{PIN.name} is not a Debian package", param=PIN.name)
    start = len(_AR_MAGIC)
    while start < len(archive):
        header = archive[start : start + _AR_HEADER]
        size = int(header[48:58])
        start += _AR_HEADER
        if header.startswith(prefix.encode()):
            return archive[start : start + size]
        start += size + size % 2  # members begin at even offsets
    raise ConfigError(f"{PIN.name} has no {prefix}", param=PIN.name)
