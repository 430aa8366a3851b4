"""What a server computes with, in a few letters: the same ones mean the same tokens for the same request."""

from __future__ import annotations

from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from shoal.server.settings import Settings

WHOLE_BYTES = 8 * 2**20  # of a file up to which all of it counts
NUM_SAMPLES, SAMPLE_BYTES = 128, 64 * 2**10  # of a larger one
NUM_DIGITS = 16
# Settings by which other numbers are computed.
_NUMERIC = {"engine": ("backend", "device", "dtype", "quantization"), "cache": ("kv_cache_dtype",)}


def fingerprint(checkpoint: Path, settings: Settings) -> str:
    """The fingerprint of a checkpoint, a folder or a file, under these settings.

    Of a large file its length counts, and samples from its beginning to its end: it is read in milliseconds.
    """
    digest = _sampled(checkpoint)
    digest.update(repr(list(numeric_settings(settings).values())).encode())
    if settings.engine.dtype == "bfloat16":
        from shoal.model.backends.native_library import has_bfloat16  # noqa: PLC0415 (few ask, and it takes time)

        digest.update(repr(has_bfloat16()).encode())  # where a processor lacks it, float32 computes
    return f"fp_{digest.hexdigest()[:NUM_DIGITS]}"


def model_hash(checkpoint: Path) -> str:
    """The fingerprint whatever the settings."""
    digits: str = _sampled(checkpoint).hexdigest()[:NUM_DIGITS]
    return digits


def content_sha256(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint's names and whole content, whatever the settings; large files take seconds."""
    digest = sha256()
    for file in _files(checkpoint):
        digest.update(f"{file.name if checkpoint.is_dir() else ''} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            digest.update(file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def numeric_settings(settings: Settings) -> dict[str, Any]:
    """The settings by which other numbers are computed."""
    sections = settings.sections()
    return {name: sections[section][name] for section, names in _NUMERIC.items() for name in names}


def _sampled(checkpoint: Path) -> Any:
    """The SHA-256 of a checkpoint's names, sizes and samples, which can be added to."""
    digest = sha256()
    for file in _files(checkpoint):
        digest.update(f"{file.name if checkpoint.is_dir() else ''} {file.stat().st_size}\n".encode())
        for sample in _samples(file):
            digest.update(sample)
    return digest


def _files(checkpoint: Path) -> list[Path]:
    return sorted(one for one in checkpoint.iterdir() if one.is_file()) if checkpoint.is_dir() else [checkpoint]


def _samples(file: Path) -> list[bytes]:
    size = file.stat().st_size
    if size <= WHOLE_BYTES:
        return [file.read_bytes()]
    with file.open("rb") as opened:
        samples = []
        for index in range(NUM_SAMPLES):
            opened.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
            samples.append(opened.read(SAMPLE_BYTES))
        return samples
