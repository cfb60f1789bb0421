"""Decoders, models and metrics of somebody's own package: by entry point, or by --config-dir."""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import hydra.utils
import pytest

import sjd2
from harness.help import help_text
from sjd2 import config
from sjd2.errors import UserError
from tests.helpers.cli import ROOT, TOY, Cli
from tests.helpers.plugin import write_plugin


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the package; its entry point is not there."""
    conf = write_plugin(tmp_path / "site")
    (tmp_path / "site" / "halves-1.0.dist-info" / "entry_points.txt").rename(tmp_path / "entry_points.txt")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    config.plugins.cache_clear()
    importlib.invalidate_caches()
    yield conf
    config.plugins.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "halves"]:
        del sys.modules[name]


@pytest.fixture
def plugin(package: Path, tmp_path: Path) -> Path:
    """The same package, installed: with its entry point."""
    (tmp_path / "entry_points.txt").rename(tmp_path / "site" / "halves-1.0.dist-info" / "entry_points.txt")
    importlib.invalidate_caches()
    config.plugins.cache_clear()
    return package


def test_a_plugin_is_one_of_the_choices(plugin: Path, cli: Cli) -> None:
    assert "halves" in sjd2.list_decoders()
    assert "fives" in sjd2.list_models()
    assert "halves" in help_text()
    assert cli("decoder=halve") == 1
    assert "did you mean 'halves'? Valid: ar, " in cli.err
    with pytest.raises(UserError, match="did you mean 'halves'"):
        sjd2.decoder("halve")


def test_python_uses_a_plugin(plugin: Path) -> None:
    model = sjd2.load("fives")
    result = sjd2.generate(model, "a large red circle on a plain teal background", decoder="halves", window=6)
    assert result.decoder == "halves"
    assert max(result.accepted[0]) <= 3


@pytest.mark.usefixtures("plain")
def test_a_command_uses_a_plugin(plugin: Path, cli: Cli) -> None:
    assert cli("decoder=halves", "decoder.window=8", "evaluation=darkness", "limit=4") == 0, cli.err
    run = cli.run("halves")
    assert 0 < run.metrics["darkness"] < 255
    assert "darkness" in cli.out
    assert "halves" in cli.out


@pytest.mark.usefixtures("plain")
def test_a_folder_of_yaml_files_with_targets_in_a_package(
    package: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "tests" / "conf" / "model" / "toy.yaml", package / "model")
    monkeypatch.setattr("tests.helpers.cli.TOY", ("--config-dir", str(package), *TOY[2:]))
    assert "halves" not in sjd2.list_decoders()
    assert cli("decoder=halve") == 1
    assert "did you mean 'halves'" in cli.err
    assert cli("decoder=halves", "decoder.window=8", "limit=4") == 0, cli.err
    assert len(cli.run("halves").records()) == 4
    assert len(cli.run("ar").records()) == 4


@pytest.mark.parametrize("flag", ["--config-dir {}", "--config-dir={}", "-cd {}"])
def test_help_lists_the_choices_of_a_folder(package: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sjd2", "--help", *flag.format(package).split()])
    assert "halves" in help_text()


def test_newer_hydra_may_call_the_targets_of_a_plugin(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    real = hydra.utils.instantiate

    def newer(node: object, *, _convert_: str, _execution_whitelist_: list[str], **extra: object) -> object:
        asked.append(_execution_whitelist_)
        return real(node, _convert_=_convert_, **extra)

    assert "_execution_whitelist_" in inspect.signature(newer).parameters
    monkeypatch.setattr(hydra.utils, "instantiate", newer)
    sjd2.decoder("halves")
    assert {"halves.*", "sjd2.*", "baselines.*"} <= set(asked[0])
    assert "tests.*" not in asked[0]


def test_a_plugin_without_yaml_files_is_reported(plugin: Path) -> None:
    for file in sorted(plugin.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    plugin.rmdir()
    config.plugins.cache_clear()
    with pytest.raises(UserError, match="plug-in 'halves' names the package halves, which has no conf/ folder"):
        sjd2.list_decoders()
