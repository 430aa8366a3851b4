"""The corpus: verified packages, clean documents, no duplicates, and sets that share no file."""

import ast
import hashlib
import io
import re
import shutil
import tarfile
import textwrap
import zipfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.model.training import corpus, documentation, sources
from shoal.model.training.corpus import build, clean, without_duplicates
from shoal.model.training.instructions import bare_functions, instruction_pairs
from shoal.model.training.sources import SourceFile
from shoal.scheduler.errors import ConfigError


def function(name: str, other: object = "other") -> str:
    lines = "\n".join(f"    value_{i} = items[{i}] + more_{other}" for i in range(8))
    return f'def {name}(items):\n    """Add up the things called {name}."""\n{lines}\n    return value_7\n'


def wheel(folder: Path, *, metadata: str = "License-Expression: MIT\n") -> tuple[Path, str]:
    path = folder / "some_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_thing/a.py", "x = 1\n")
        archive.writestr("some_thing/tests/test_a.py", "x = 2\n")
        archive.writestr("some_thing/_vendor/other.py", "x = 3\n")
        archive.writestr("some_thing-1.0.dist-info/METADATA", f"Metadata-Version: 2.4\nName: some-thing\n{metadata}\n")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_gives_its_own_sources_and_its_licence(tmp_path: Path) -> None:
    path, sha256 = wheel(tmp_path)
    package = sources.Package("some-thing", "1.0", sha256)
    assert sources.verify(tmp_path, [package]) == {"some-thing": path}
    assert [file.path for file in sources.read_wheel("some-thing", path)] == ["some_thing/a.py"]
    assert sources.read_licence(path) == "MIT"


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: see file\n", "BSD License"),
        ("License: Apache 2.0\n", "Apache 2.0"),
    ],
)
def test_a_licence_is_read_where_older_wheels_state_it(tmp_path: Path, metadata: str, licence: str) -> None:
    assert sources.read_licence(wheel(tmp_path, metadata=metadata)[0]) == licence


@pytest.mark.parametrize("licence", ["GPL-3.0-or-later", "LGPL-2.1-only OR MIT", "", "Proprietary"])
def test_a_package_that_is_not_permissive_is_refused_by_name(tmp_path: Path, licence: str) -> None:
    path, _ = wheel(tmp_path, metadata=f"License-Expression: {licence}\n" if licence else "")
    with pytest.raises(ConfigError, match="not known to be permissive") as error:
        sources.read_licence(path)
    assert error.value.param == path.name


def test_a_missing_package_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some-thing==1\.0 is missing") as error:
        sources.verify(tmp_path, [sources.Package("some-thing", "1.0", "0" * 64)])
    assert error.value.param == "some-thing"


def test_a_package_with_another_hash_is_refused_by_name(tmp_path: Path) -> None:
    wheel(tmp_path)
    with pytest.raises(ConfigError, match=r"some-thing==1\.0: .* pinned is 000") as error:
        sources.verify(tmp_path, [sources.Package("some-thing", "1.0", "0" * 64)])
    assert error.value.param == "some-thing"


def debian_package(path: Path) -> None:
    """A .deb as deb(5) says: an `ar` archive of a version, control files, and the files in a tar archive."""
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w:xz") as archive:
        for name in ("_sources/library/a.rst.txt", "_sources/notes.txt", "library/a.html"):
            entry = tarfile.TarInfo(f"./usr/share/doc/python3.11/html/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": files.getvalue()}
    members = [
        f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data for name, data in parts.items()
    ]
    path.write_bytes(b"!<arch>\n" + b"".join(member + b"\n" * (len(member) % 2) for member in members))


def test_documentation_is_read_from_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = documentation.archive_path(tmp_path)
    debian_package(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=rf"{documentation.PIN.name}=.* has sha256 {sha256}"):
        documentation.verify(tmp_path)
    monkeypatch.setattr(documentation, "PIN", replace(documentation.PIN, sha256=sha256))
    documentation.download(tmp_path)  # it is there
    pages = list(documentation.read(documentation.verify(tmp_path)))
    assert pages == [SourceFile("python-docs", "library/a.rst", "_sources/library/a.rst.txt")]


def test_documentation_that_is_missing_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"corpus package python3\.11-doc=.* is missing") as error:
        documentation.verify(tmp_path)
    assert error.value.param == "python3.11-doc"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Debian's apt-get; without it, put python3\.11-doc_.*_all\.deb"):
        documentation.download(tmp_path)


def test_a_package_without_a_hash_is_refused(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("# a comment\nsome-thing==1.0\n")
    with pytest.raises(ConfigError, match=r"not a package pinned by hash: 'some-thing==1\.0'"):
        sources.read_pins(pins)


def test_the_shipped_pins_can_be_read() -> None:
    names = [package.name for package in sources.read_pins()]
    assert len(names) == len(set(names)) > 50


@given(st.text())
def test_cleaning_a_clean_text_changes_nothing(text: str) -> None:
    assert clean(clean(text)) == clean(text)


def test_cleaning_takes_the_licence_header_and_nothing_else() -> None:
    assert clean("# Copyright 1999 X\n# All rights\n\nx = 1 \t\r\n# kept\n") == "x = 1\n# kept\n"
    assert clean("# About x.\nx = 1\n") == "# About x.\nx = 1\n"


@pytest.mark.parametrize(
    "text",
    [
        "x = (\n" * 100,
        '"""Generated by a tool, do not edit."""\n' + function("f"),
        "DATA = [\n" + "    1234567890, 1234567890,\n" * 20 + "]\n",
        "x = '" + "a" * 500 + "'\n",
        "NAMES = {\n" + "".join(f'    "{c}": "a name of {c}",\n' for c in "abcdefghijklmnopqrst") + "}\n",
    ],
    ids=["does not parse", "generated", "data", "one long line", "a table"],
)
def test_generated_files_are_left_out(text: str) -> None:
    assert corpus.is_worth_reading(SourceFile("p", "a.py", function("f")))
    assert not corpus.is_worth_reading(SourceFile("p", "a.py", text))


def test_exact_and_near_duplicates_are_dropped() -> None:
    first = SourceFile("p", "a.py", "".join(function(f"f{i}", i) for i in range(9)))
    same = SourceFile("q", "b.py", first.text)
    near = SourceFile("q", "c.py", first.text.replace("f3", "renamed"))
    other = SourceFile("q", "d.py", "".join(function(f"f{i}", i) for i in range(50, 59)))
    assert list(without_duplicates([first, same, near, other])) == [first, other]


def test_no_package_exceeds_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PACKAGE_CAP", 1000)
    files = [SourceFile(package, f"{i}.py", "x" * 300) for package in "pq" for i in range(9)]
    kept = corpus.capped(files)
    assert sorted(file.package for file in kept) == ["p"] * 3 + ["q"] * 3
    assert corpus.capped(files[::-1]) == kept


def test_the_sets_share_no_file_and_no_pair_crosses_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "VALIDATION_PER_MILLE", 200)
    names = ["".join(letters) for letters in product("abcd", repeat=3)]
    files = [SourceFile("p", f"{name}.py", function(f"make_{name}", name)) for name in names]
    train, validation = build(files)
    assert validation
    origins = [{re.split("[#@]", document.path)[0] for document in documents} for documents in (train, validation)]
    assert not origins[0] & origins[1]
    assert origins[0] | origins[1] == {file.path for file in files}
    assert any(len(document.turns) == 2 for document in train)
    assert any("@" in document.path for document in train)


def test_documents_survive_the_file(tmp_path: Path) -> None:
    documents = [corpus.Document("p", "a.py", ("x\u2028y\n",)), corpus.Document("p", "a.py#0", ("q", "a"))]
    corpus.write_documents(documents, tmp_path / "d.jsonl")
    assert corpus.read_documents(tmp_path / "d.jsonl") == documents
    with pytest.raises(ConfigError, match="make the corpus first"):
        corpus.read_documents(tmp_path / "other.jsonl")


def test_the_code_that_answers_parses_and_its_docstring_asked() -> None:
    source = "class C:\n" + "".join(textwrap.indent(function(f"f{i}", i), "    ") for i in range(40))
    pairs = list(instruction_pairs(source))
    assert len(pairs) == 40
    for turns in pairs:
        question, answer = turns[-2:]
        code = (question if question.endswith("```") and not answer.endswith("```") else answer).split("```")[1]
        (node,) = ast.parse(code.removeprefix("python\n")).body
        assert isinstance(node, ast.FunctionDef)
        assert ast.get_docstring(node) is None
        assert f"Add up the things called {node.name}." in (question, answer) or node.name in question
    assert {len(turns) for turns in pairs} == {2, 3}
    assert pairs == list(instruction_pairs(source))


@pytest.mark.parametrize(
    "source",
    [
        "def f(): 'A docstring on the same line as the function.'; return 1\n",
        'def f():\n    """A docstring and nothing beside it at all."""\n',
        "def f():\n    return 1\n",
        'def f():\n    """Long enough a docstring."""\n' + "    x = 1\n" * 41,
    ],
    ids=["one line", "no body", "no docstring", "too long"],
)
def test_a_function_that_makes_no_pair(source: str) -> None:
    assert list(instruction_pairs(source)) == []


def test_bare_functions_are_those_of_the_top_level_whole_and_of_moderate_length() -> None:
    wanted = "@decorated\n" + function("f")
    inner = "class C:\n" + textwrap.indent(function("method"), "    ")
    source = (
        "import a\n\n" + wanted + "\n" + inner + "\n\ndef short():\n    return 1\n" + "def g():\n" + "    x = 1\n" * 60
    )
    assert list(bare_functions(source)) == [(wanted,), (inner,)]
