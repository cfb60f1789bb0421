"""Scores of single images by packages that cannot live beside transformers 5: each runs in an interpreter of its own.

The interpreter is asked for the package before any image is made, and called once for all images (reward_worker.py). None
of these packages has been run here with its published weights.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluation.metrics.batches import check_weights, device_for
from evaluation.run_folder import Record, Snapshot
from evaluation.score import Metric, Scores
from sjd2.errors import UserError
from sjd2.files import find

WORKER = Path(__file__).with_name("reward_worker.py")


class PackageReward(Metric):
    """The mean of what a package of another Python environment gives each image under its prompt.

    name: of the score and of its settings; title: in words; modules: that the package has; install: what pip is given.
    python: the environment's interpreter; null: this one, if it has the package. files: settings that name files.
    """

    of_parts = False
    name: str
    title: str
    package: str
    modules: tuple[str, ...]
    install: str

    def __init__(
        self, *, python: str | None, device: str | None, files: dict[str, str | None], **options: str | None
    ) -> None:
        self.python, self.device = python or sys.executable, device
        self.files, self.options = files, options

    @property
    def needs_images(self) -> bool:
        """Return True: the other interpreter reads the files."""
        return True

    @property
    def protocol(self) -> str:
        """How the value comes about."""
        settings = "".join(f", {key} {value}" for key, value in self.options.items() if value is not None)
        return (
            f"{self.name}: mean over n_images of the score that the package {self.package} gives an image under its "
            f"prompt{settings}."
        )

    def check(self) -> None:
        """Raise UserError if interpreter, package or files are missing; asks the interpreter, imports nothing heavy."""
        key = f"evaluation.metrics.{self.name}"
        for name, path in self.files.items():
            if path is not None and not find(path).is_file():
                raise UserError(f"{key}.{name}={path} is no file; null lets the package fetch its own.")
        if (weights := self.files.get("weights")) is not None:
            check_weights(find(weights))
        if shutil.which(self.python) is None:
            raise UserError(f"{key}.python={self.python} is no interpreter; give the python of an environment.")
        code = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in {self.modules}))"
        if subprocess.run([self.python, "-c", code], capture_output=True, check=False).returncode:
            others = f" with {', '.join(self.modules[1:])}" if len(self.modules) > 1 else ""
            raise UserError(
                f"{self.python} has no package {self.package}{others}: make an environment of its own, pip install "
                f"{self.install}, and give its interpreter: {key}.python=ENVIRONMENT/bin/python."
            )

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want no image: the other interpreter reads the files itself."""
        return () if run.records else None

    def compute(self, run: Snapshot) -> Scores:
        """Score all images in one call of the other interpreter; raises UserError with its last line if that fails."""
        records = run.records
        pairs = [{"image": str((run.path / r["image"]).absolute()), "prompt": r["prompt"]} for r in records]
        options: dict[str, Any] = {
            key: str(find(path).absolute()) if path else None for key, path in self.files.items()
        }
        options |= self.options | {"device": str(device_for(self.device))}
        with tempfile.TemporaryDirectory() as folder:
            given, out = Path(folder, "pairs.jsonl"), Path(folder, "scores.txt")
            given.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
            run_tool(
                [self.python, str(WORKER), self.name, str(given), str(out), json.dumps(options)],
                self.title,
            )
            values = [float(line) for line in out.read_text(encoding="utf-8").split()]
        if len(values) != len(records) or not all(map(math.isfinite, values)):
            raise UserError(f"{self.title} gave {len(values)} numbers for {len(records)} images, or no finite ones.")
        return Scores({self.name: fmean(values)}, {self.name: dict(zip(run.ids, values, strict=True))})


def run_tool(command: list[str], name: str) -> None:
    """Run a program to its end, its output passed through; raises UserError if it cannot start or fails."""
    try:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise UserError(f"{name} does not start ({error.strerror}: {command[0]}).") from error
    if code:
        raise UserError(
            f"{name} ended with exit code {code}, its reason stands above; nothing is lost, the command was: "
            f"{shlex.join(command)}"
        )
