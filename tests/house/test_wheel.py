"""The wheel carries every file that the packages read; `.ci/wheel` installs one and uses it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools

from sjd2.files import ROOT

MEASURED = "benchmarks/results/"  # what machines measured: read by people, not by the code


def settings(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Return what setup.py hands to setuptools."""
    found: dict = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **given: found.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def data_files(given: dict) -> set[Path]:
    """Return the files that package_data adds to the packages."""
    found = set()
    for package, patterns in given["package_data"].items():
        for name in [package] if package else given["packages"]:
            folder = ROOT / given["package_dir"].get(name, name.replace(".", "/"))
            found |= {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return found


def present(folder: str) -> set[Path]:
    files = (file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file for file in files if file.suffix != ".py" and MEASURED not in file.as_posix()}


def test_every_data_file_is_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(monkeypatch)
    for folder in (*(name for name in given["packages"] if "." not in name), "conf"):
        assert not present(folder) - data_files(given)


def test_every_module_is_in_the_wheel_and_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = set(settings(monkeypatch)["packages"])
    for top in sorted(name for name in packages if "." not in name):
        for file in (ROOT / top).rglob("*.py"):
            assert ".".join(file.parent.relative_to(ROOT).parts) in packages, file
    assert not [name for name in packages if name.split(".")[0] in ("tests", "docs", "examples")]
