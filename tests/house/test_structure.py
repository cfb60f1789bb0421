"""The structure of the code: imports run downwards only, and no file or public class name means two things."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from sjd2.files import ROOT
from tests.helpers.process_state import restored

PACKAGES = ("sjd2", "baselines", "evaluation", "harness", "sweeps", "benchmarks")


def modules() -> Iterator[Path]:
    return (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))


def twice(named: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: places for name, places in named.items() if len(places) > 1}


def lint(config: Path) -> int:
    with restored():  # import-linter is a command that owns its process: it switches off all loggers there are
        return lint_imports(config_filename=str(config), cache_dir=None, no_cache=True)


def test_imports_run_downwards_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    assert lint(ROOT / ".importlinter") == 0, capsys.readouterr().out


def test_an_import_upwards_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / ".importlinter").read_text()
    upside_down = text.replace("    sweeps | benchmarks\n    harness\n", "    harness\n    sweeps | benchmarks\n")
    assert upside_down != text
    (tmp_path / "contracts.ini").write_text(upside_down)
    assert lint(tmp_path / "contracts.ini") == 1
    assert "is not allowed to import harness" in capsys.readouterr().out


def test_no_file_name_stands_for_two_things() -> None:
    named = defaultdict(list)
    for file in modules():
        if file.name != "__init__.py":
            named[file.name].append(str(file.relative_to(ROOT)))
    assert twice(named) == {}


def test_no_public_class_name_stands_for_two_things() -> None:
    named = defaultdict(list)
    for file in modules():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named[node.name].append(str(file.relative_to(ROOT)))
    assert twice(named) == {}


def test_no_text_is_split_at_more_than_newlines() -> None:
    """A caption with U+2028 is one line; sjd2.files has split_lines and read_lines."""
    scripts = [ROOT / "run.py", *sorted((ROOT / "docs").glob("*.py"))]
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in [*modules(), *scripts]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("splitlines", "readlines", "readline")
    ]
    assert found == []
