"""Where results are written: benchmarks/results/ of the checkout, or of the working folder for an installed package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sjd2.config import INSTALLED
from sjd2.files import ROOT


def result_file(hardware: str, *words: str) -> Path:
    """Return the JSON file of a measurement, named after the hardware and `words`."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in hardware.lower()).split())
    return (Path() if INSTALLED else ROOT) / "benchmarks" / "results" / f"{'-'.join([slug, *words])}.json"


def write_result(result: dict[str, Any], out: Path | None, *words: str) -> Path:
    """Write a measurement to `out`, None for its `result_file`, say where, and return that."""
    out = out or result_file(result["hardware"], *words)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")
    return out
