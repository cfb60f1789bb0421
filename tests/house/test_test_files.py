"""The tests' own order: what tests share lies in tests/helpers, and no file grows past what one reads in a sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sjd2.files import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
LONGEST = 500


def imported(source: str, package: str) -> set[str]:
    """Return the full names of all modules, and of what is taken from them, in a file of `package`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def among_tests(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.startswith("tests.") and ".test_" in name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_test_imports_another_and_files_are_short(file: Path) -> None:
    source = file.read_text()
    assert among_tests(imported(source, ".".join(file.relative_to(ROOT).parent.parts))) == []
    assert len(source.splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "source",
    [
        "from tests.sweeps.test_group import make",
        "import tests.sweeps.test_group",
        "from tests.sweeps import test_group",
        "from .test_group import make",
        "from . import test_group",
        "from ..sweeps.test_group import make",
    ],
)
def test_an_import_of_a_test_is_found(source: str) -> None:
    assert among_tests(imported(source, "tests.sweeps"))
