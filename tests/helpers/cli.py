"""Run commands of the harness: in this process (quick), or in one of their own (to be killed)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from evaluation.run_folder import RunFolder, run_folders
from harness.cli import main
from sjd2.files import ROOT
from tests.helpers.process_state import restored

TOY = ("--config-dir", str(ROOT / "tests" / "conf"), "model=toy", "evaluation=none", "batch_size=4", "logger=none")


class Cli:
    """Commands on the toy model with a runs_dir of the test's own; `out` and `err` hold what the last one printed."""

    def __init__(self, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs_dir, self.capfd, self.monkeypatch = tmp_path / "runs", capfd, monkeypatch
        self.out = self.err = ""
        monkeypatch.chdir(tmp_path)  # nothing may be written outside runs_dir

    def __call__(self, *arguments: str) -> int:
        """Run one command in this process and return its exit code."""
        from sweeps.multirun.callback import Tables

        Tables.failed = 0
        GlobalHydra.instance().clear()
        self.monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        self.monkeypatch.setenv("SJD2_TRACE", "")
        self.monkeypatch.setattr(sys, "argv", self.arguments(*arguments))
        self.capfd.readouterr()
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        self.out, self.err = self.capfd.readouterr()
        return code

    def arguments(self, *arguments: str) -> list[str]:
        """Return the whole command line: the toy's settings first, so that `arguments` win."""
        names = {a.partition("=")[0] for a in arguments}
        toy = [a for a in TOY if a.partition("=")[0] not in names]
        flags = [a for a in arguments if a.startswith("-")]  # argparse takes no flag between the settings
        return ["run.py", *flags, *toy, f"runs_dir={self.runs_dir}", *(a for a in arguments if a not in flags)]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start one command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *self.arguments(*arguments)[1:]],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, decoder: str) -> RunFolder:
        """Return the one run folder of this decoder."""
        (found,) = [path for path in run_folders(self.runs_dir) if path.name.startswith(f"toy-{decoder}-")]
        return RunFolder(found)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out images and plots, which other tests look at: they are most of a small command's time."""
    from harness import job
    from sweeps.tables import figures

    monkeypatch.setattr(job, "draw_grids", lambda *_: None)
    monkeypatch.setattr(figures, "draw_plots", lambda *_, **__: figures.Plots())


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    with restored():
        yield Cli(tmp_path, capfd, monkeypatch)
