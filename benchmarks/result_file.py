"""Where results are written: benchmarks/results/, named after the hardware."""

from __future__ import annotations

from pathlib import Path

from sjd2.files import ROOT


def result_file(hardware: str, *words: str) -> Path:
    """Return the JSON file of a measurement, named after the hardware and `words`."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in hardware.lower()).split())
    return ROOT / "benchmarks" / "results" / f"{'-'.join([slug, *words])}.json"
