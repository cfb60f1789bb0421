"""Where results are written: benchmarks/results/ of the checkout, or of the working folder for an installed package."""

from __future__ import annotations

from pathlib import Path

from sjd2.config import INSTALLED
from sjd2.files import ROOT


def result_file(hardware: str, *words: str) -> Path:
    """Return the JSON file of a measurement, named after the hardware and `words`."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in hardware.lower()).split())
    return (Path() if INSTALLED else ROOT) / "benchmarks" / "results" / f"{'-'.join([slug, *words])}.json"
