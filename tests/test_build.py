"""Building the native backend, on a small stand-in for its sources, and packages that carry it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shoal.model.backends.native_library import supported_isas
from shoal.model.native.build import X86_64_MACROS, best_isa, isa_flags

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ["avx512", "avx2", "generic"] if IS_X86_64 else ["generic"]
SOURCE = """
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() {
#if SHOAL_ISA_AVX512
#if !(__AVX512F__ && __AVX512BW__ && __AVX512VL__ && __AVX512VNNI__)
#error "no AVX-512"
#endif
    return 512 + ANSWER;
#elif SHOAL_ISA_AVX2
#if !(__AVX2__ && __FMA__ && __F16C__ && __BMI__ && __BMI2__) || __AVX512F__
#error "not just AVX2"
#endif
    return 2 + ANSWER;
#elif SHOAL_ISA_GENERIC
#if __AVX__
#error "not generic"
#endif
    return ANSWER;
#endif
}
int hidden() { return 0; }
"""

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the path")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source tree of which only the files that make a package are real."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    for room in ("scheduler", "model", "server", "clients", "cluster", "loadtest", "model/native"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    shutil.copytree(ROOT / "src", tmp_path / "src", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    native = tmp_path / "model" / "native"
    shutil.copy(ROOT / "model/native/build.py", native)
    (native / "answer.cpp").write_text(SOURCE)
    (native / "answer.h").write_text("#define ANSWER 1000\n")
    return native


@pytest.fixture(autouse=True)
def no_chosen_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)


def run_build(folder: Path, *args: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(folder / "build.py"), *args],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def library(folder: Path, isa: str) -> Path:
    return folder / f"libshoal-{isa}.so"


def answer(path: Path) -> int:
    """What the library at the path answers; through a link, for the loader remembers what it loaded by name."""
    link = path.with_suffix(f".{path.stat().st_ino}")
    os.link(path, link)
    value: int = ctypes.CDLL(str(link)).answer()
    link.unlink()
    return value


def libraries(folder: Path) -> list[str]:
    """All shared objects in the folder, temporary ones too."""
    return sorted(path.name for path in folder.iterdir() if ".so" in path.name)


def script(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_compiler
def test_this_tree_is_built() -> None:
    """Otherwise the tests of the native backend would be skipped silently."""
    assert supported_isas()[0] == best_isa()


@needs_compiler
def test_each_instruction_set_gets_its_library(folder: Path) -> None:
    code, printed = run_build(folder)
    assert code == 0, printed
    assert printed.splitlines()[-1].endswith(f"the native backend is built for {', '.join(ISAS)}")
    assert libraries(folder) == sorted(library(folder, isa).name for isa in ISAS)
    assert [answer(library(folder, isa)) for isa in ISAS] == [1512, 1002, 1000][-len(ISAS) :]
    assert not hasattr(ctypes.CDLL(str(library(folder, "generic"))), "_Z6hiddenv")


@needs_compiler
def test_only_what_is_older_than_its_sources_is_compiled(folder: Path) -> None:
    path = library(folder, "generic")
    assert run_build(folder, "--only", "generic")[0] == 0
    first = path.stat()
    assert run_build(folder, "--only", "generic") == (0, "")
    assert path.stat() == first
    (folder / "other.cpp").write_text("int other() { return 1; }\n")
    calls = script(folder, "calls", f'echo "$@" >> {folder}/calls.log; exec {COMPILER} "$@"')
    assert run_build(folder, "--only", "generic", CXX=str(calls))[0] == 0
    compiling, linking = (folder / "calls.log").read_text().splitlines()
    assert ("other.cpp" in compiling, "answer.cpp" in compiling, "-shared" in linking) == (True, False, True)
    for changed, text, expected in (
        ("answer.h", "#define ANSWER 7\n", 7),
        ("answer.cpp", SOURCE.replace("ANSWER", "8"), 8),
        ("build.py", (folder / "build.py").read_text(), 8),
    ):
        (folder / changed).write_text(text)
        before = path.stat()
        assert run_build(folder, "--only", "generic")[0] == 0
        assert path.stat().st_mtime_ns > before.st_mtime_ns, changed
        assert answer(path) == expected


@needs_compiler
@pytest.mark.skipif(not IS_X86_64, reason="there is but one instruction set here")
@pytest.mark.parametrize(
    ("macros", "best"),
    [
        ("__AVX2__ __FMA__ __F16C__ __AVX512F__ __AVX512BW__ __AVX512CD__ __AVX512DQ__ __AVX512VL__", "avx2"),
        ("__AVX2__ __FMA__", "generic"),
        ("__AVX2__ __FMA__ __F16C__ " + " ".join(sorted(X86_64_MACROS["avx512"])), "avx512"),
    ],
)
def test_a_change_of_a_source_compiles_the_best_instruction_set_alone(folder: Path, macros: str, best: str) -> None:
    """And no library of the old sources stays."""
    machine = f'case "$*" in *-dM*) echo "{macros}"; exit;; esac'
    compiler = str(script(folder, "machine", f'{machine}\nexec {COMPILER} "$@"'))
    assert run_build(folder, CXX=compiler)[0] == 0
    assert run_build(folder, "--only", "best", CXX=compiler) == (0, "")
    assert libraries(folder) == sorted(library(folder, isa).name for isa in ISAS)
    (folder / "answer.h").write_text("#define ANSWER 7\n")
    assert run_build(folder, "--only", "best", CXX=compiler)[1].endswith(f"the native backend is built for {best}\n")
    assert libraries(folder) == [library(folder, best).name]
    assert answer(library(folder, best)) == 7 + {"avx512": 512, "avx2": 2, "generic": 0}[best]


@needs_compiler
def test_a_library_in_use_is_not_written_over(folder: Path) -> None:
    path = library(folder, "generic")
    assert run_build(folder, "--only", "generic")[0] == 0
    with path.open("rb") as opened:
        before = opened.read()
        (folder / "answer.h").write_text("#define ANSWER 7\n")
        assert run_build(folder, "--only", "generic")[0] == 0
        opened.seek(0)
        assert opened.read() == before != path.read_bytes()
    assert libraries(folder) == [path.name]


@needs_compiler
def test_a_change_while_the_compiler_runs_is_not_missed(folder: Path) -> None:
    change = f'case "$*" in *" -c "*) echo "#define ANSWER 7" > {folder}/answer.h;; esac'
    slow = script(folder, "slow", f'{COMPILER} "$@" && {change}')
    assert run_build(folder, "--only", "generic", CXX=str(slow))[0] == 0
    assert answer(library(folder, "generic")) == 1000
    assert run_build(folder, "--only", "generic")[0] == 0
    assert answer(library(folder, "generic")) == 7


@needs_compiler
def test_two_builds_at_once(folder: Path) -> None:
    builds = [
        subprocess.Popen([sys.executable, str(folder / "build.py"), "--only", "generic"], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [build.communicate() and build.returncode for build in builds] == [0, 0]
    assert libraries(folder) == ["libshoal-generic.so"]
    assert answer(library(folder, "generic")) == 1000


@needs_compiler
@pytest.mark.skipif(not IS_X86_64, reason="there is but one instruction set here")
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(folder: Path) -> None:
    library(folder, "avx512").touch()
    os.utime(library(folder, "avx512"), (0, 0))
    refuse = 'for flag; do case $flag in -mavx512*) echo "unknown flag $flag" >&2; exit 1;; esac; done'
    code, printed = run_build(folder, CXX=str(script(folder, "old", f'{refuse}\nexec {COMPILER} "$@"')))
    assert code == 0
    assert "unknown flag -mavx512vnni" in printed
    assert printed.splitlines()[-1].endswith("the native backend is built for avx2, generic; left out: avx512")
    assert libraries(folder) == ["libshoal-avx2.so", "libshoal-generic.so"]


@needs_compiler
def test_a_fault_in_a_source(folder: Path) -> None:
    """It is shown once, and a library of older sources does not stay: it may not fit the rest of the program."""
    assert run_build(folder, "--only", "generic")[0] == 0
    (folder / "answer.cpp").write_text("int answer() { return 1 }")
    code, printed = run_build(folder)
    assert code == 1
    assert printed.count("error:") == 1
    assert printed.splitlines()[-1].endswith("is not built, and the torch backend will serve, slower")
    assert libraries(folder) == []


def test_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    expected = (
        "shoal: found no C++ compiler ($CXX, c++, g++, clang++): "
        "the native backend is not built, and the torch backend will serve, slower\n"
    )
    assert run_build(folder, PATH=str(tmp_path / "empty")) == (1, expected)
    assert run_build(folder, CXX="no-such-compiler -O2") == (1, expected)
    assert libraries(folder) == []


@needs_compiler
def test_without_a_compiler_what_is_built_stays(folder: Path, tmp_path: Path) -> None:
    assert run_build(folder, "--only", "generic")[0] == 0
    assert run_build(folder, "--only", "generic", PATH=str(tmp_path)) == (0, "")
    assert libraries(folder) == ["libshoal-generic.so"]


@needs_compiler
def test_the_sanitized_library_is_another_one(folder: Path) -> None:
    assert run_build(folder, "--only", "generic", "--sanitize")[0] == 0
    assert libraries(folder) == ["libshoal-generic-sanitized.so"]
    assert b"__asan_init" in (folder / "libshoal-generic-sanitized.so").read_bytes()


def build_wheel(tree: Path, kind: str, **environment: str) -> tuple[str, set[str]]:
    """Build a wheel as installers do; its file name and what it holds."""
    code = f"import hatchling.build as backend; print(backend.{kind}('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    name = done.stdout.splitlines()[-1]
    with zipfile.ZipFile(tree / "dist" / name) as wheel:
        return name, set(wheel.namelist())


@needs_compiler
def test_a_wheel_carries_the_libraries(folder: Path) -> None:
    name, files = build_wheel(folder.parents[1], "build_wheel")
    assert {f"shoal/model/native/libshoal-{isa}.so" for isa in ISAS} <= files
    assert not name.endswith("-none-any.whl")


@needs_compiler
def test_an_editable_installation_builds_for_this_machine(folder: Path) -> None:
    build_wheel(folder.parents[1], "build_editable")
    assert libraries(folder) == [library(folder, best_isa()).name]


def test_a_wheel_without_a_compiler_is_pure(folder: Path, tmp_path: Path) -> None:
    name, files = build_wheel(folder.parents[1], "build_wheel", PATH=str(tmp_path))
    assert name.endswith("-py3-none-any.whl")
    assert "shoal/model/native/answer.cpp" in files
    assert not any(file.endswith(".so") for file in files)


@pytest.mark.parametrize(
    ("machine", "isas"),
    [
        ("x86_64", ["avx512", "avx2", "generic"]),
        ("AMD64", ["avx512", "avx2", "generic"]),
        ("arm64", ["generic"]),
        ("riscv64", ["generic"]),
    ],
)
def test_the_instruction_sets_of_a_machine(monkeypatch: pytest.MonkeyPatch, machine: str, isas: list[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert list(isa_flags()) == isas
