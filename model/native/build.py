"""Compiles the native backend: `python -m shoal.model.native.build [--sanitize] [--only ISA]`.

Each instruction set gets its own shared library, `libshoal-ISA.so`, made of all the sources in this folder; the
program chooses among them when it runs.  `--only best` builds for this machine's best instruction set alone, which
takes a third of the time: it is meant for those who change the sources.  Only the standard library is used, because
this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OBJECTS = FOLDER / "objects"  # compiled sources, kept so that a change costs seconds

# Without contraction: products and sums are computed as the source says, so that instruction sets have the same bits.
COMMON_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"),
)
RELEASE_FLAGS = ("-O3",)
# More of either, and the blocks of GGUF compile for half an hour.
SANITIZE_FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
X86_64_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": ("-march=x86-64-v4", "-mavx512vnni"),
    "avx2": ("-march=x86-64", "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"),
    "generic": ("-march=x86-64",),
}
# What the compiler defines for a machine that runs such a library.
X86_64_MACROS = {
    "avx512": {f"__AVX512{part}__" for part in ("F", "BW", "CD", "DQ", "VL", "VNNI")},
    "avx2": {"__AVX2__", "__FMA__", "__F16C__"},
}
COMPILERS = ("c++", "g++", "clang++")


def isa_flags() -> dict[str, tuple[str, ...]]:
    """The instruction sets of this kind of machine, best first, with the compiler's flags for each."""
    return X86_64_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {"generic": ()}


def library_path(isa: str, *, sanitize: bool = False) -> Path:
    """The path of the library for an instruction set, which need not be built."""
    return FOLDER / f"libshoal-{isa}{'-sanitized' if sanitize else ''}.so"


def build(isas: Sequence[str], *, sanitize: bool = False) -> list[Path]:
    """Make the libraries of `isas` that are missing or out of date, and print a line about the result.

    A library of another instruction set is removed if it is out of date, and so is one that cannot be made: it may not
    fit the Python side.

    Returns:
        the libraries that are there and up to date, in the order of `isas`.
    """
    libraries = {isa: library_path(isa, sanitize=sanitize) for isa in isas}
    for isa in isa_flags().keys() - libraries.keys():
        if not _is_current(other := library_path(isa, sanitize=sanitize), FOLDER.glob("*.cpp")):
            other.unlink(missing_ok=True)
    stale = [isa for isa, library in libraries.items() if not _is_current(library, FOLDER.glob("*.cpp"))]
    compiler = find_compiler()
    if compiler is None:
        failed = set(stale)
        said = f"found no C++ compiler ($CXX, {', '.join(COMPILERS)})"
    else:
        began = time.monotonic()
        failed = _make(compiler, stale, sanitize)
        said = f"{shlex.join(compiler)} took {time.monotonic() - began:.1f} s"
    for isa in failed:
        libraries.pop(isa).unlink(missing_ok=True)
    if not libraries:
        _say(f"{said}: the native backend is not built, and the torch backend will serve, slower")
    elif stale:
        left_out = f"; left out: {', '.join(sorted(failed))}" if failed else ""
        _say(f"{said}: the native backend is built for {', '.join(libraries)}{left_out}")
    return list(libraries.values())


def find_compiler() -> list[str] | None:
    """The command that `$CXX` gives, else the first compiler on the path; None if there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def best_isa() -> str:
    """The best instruction set of this machine, as the compiler tells it; the plainest one without a compiler."""
    isas, compiler = list(isa_flags()), find_compiler()
    if compiler is None or isas == ["generic"]:
        return isas[-1]
    command = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    macros = set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())
    return next(isa for isa in isas if X86_64_MACROS.get(isa, set()) <= macros)


def _is_current(made: Path, sources: Iterable[Path]) -> bool:
    """Whether a file is there and newer than the sources, all headers, and the flags in this file."""
    made_of = [*sources, *FOLDER.glob("*.h"), Path(__file__)]
    return made.exists() and made.stat().st_mtime_ns > max(path.stat().st_mtime_ns for path in made_of)


def _make(compiler: list[str], isas: list[str], sanitize: bool) -> set[str]:
    """Compile the sources whose objects are out of date for each instruction set, then link; returns what failed.

    All files are dated before the first source is read, so that a change during the build is not missed.
    """
    now = time.time_ns()
    compiling: list[_Command] = []
    linking: list[_Command] = []
    for isa in isas:
        library = library_path(isa, sanitize=sanitize)
        command = [*compiler, *COMMON_FLAGS, *(SANITIZE_FLAGS if sanitize else RELEASE_FLAGS), *isa_flags()[isa]]
        objects = {source: OBJECTS / library.stem / f"{source.stem}.o" for source in sorted(FOLDER.glob("*.cpp"))}
        compiling += [
            _Command(isa, [*command, f"-DSHOAL_ISA_{isa.upper()}=1", "-c", str(source)], made, now)
            for source, made in objects.items()
            if not _is_current(made, [source])
        ]
        linking.append(_Command(isa, [*command, "-shared", *map(str, objects.values())], library, now))
    failed = _run_all(compiling)
    return failed | _run_all([command for command in linking if command.isa not in failed])


@dataclass(frozen=True)
class _Command:
    """A command that makes a file for an instruction set.

    Attributes:
        time: the file is dated by it, in nanoseconds.
    """

    isa: str
    words: list[str]
    made: Path
    time: int

    def run(self) -> subprocess.CompletedProcess[str]:
        """Run the command, and give the file its name only when it is complete.

        So a running server keeps the library that it has mapped, and of two builds at once the last one wins.
        """
        self.made.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.made.with_name(f"{self.made.stem}.{os.getpid()}{self.made.suffix}")
        try:
            done = subprocess.run([*self.words, "-o", str(temporary)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.utime(temporary, ns=(self.time, self.time))
                temporary.replace(self.made)
            return done
        finally:
            temporary.unlink(missing_ok=True)


def _run_all(commands: list[_Command]) -> set[str]:
    """Run them side by side, print their messages, and return the instruction sets for which one failed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(_Command.run, commands))
    for message in dict.fromkeys(one.stderr for one in done):  # a source has the same one for each instruction set
        print(message, end="", file=sys.stderr)
    return {command.isa for command, one in zip(commands, done, strict=True) if one.returncode}


def _say(message: str) -> None:
    print(f"shoal: {message}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the native backend.")
    parser.add_argument("--only", choices=["best", *isa_flags()], help="build for this instruction set alone")
    parser.add_argument("--sanitize", action="store_true", help="build with AddressSanitizer and UBSan, for tests")
    arguments = parser.parse_args()
    only = best_isa() if arguments.only == "best" else arguments.only
    isas = [only] if only else list(isa_flags())
    return 0 if build(isas, sanitize=arguments.sanitize) else 1


if __name__ == "__main__":
    sys.exit(main())
