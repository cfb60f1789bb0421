"""A baseline in a file: everything of a run that stage=compare against=FILE holds later runs to.

`python run.py stage=compare run_dir=RUN save_baseline=FILE`. The file is JSON, a few hundred bytes per image, and needs
neither the run folder nor its images.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.declared import declared, shown
from evaluation.run_folder import Id
from evaluation.score import read_info, read_scores
from evaluation.timings import disturbance
from sjd2.errors import UserError, first_line
from sjd2.files import read_text, write_atomically
from sweeps.comparable import table_machine
from sweeps.runs import Machine, Run, torch_versions
from sweeps.speedup import SpeedUp, separate_timings, speed_up_over_ar

FORMAT = 1  # of the file


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What one image of a baseline is held to: its tokens by hash, target-model passes, nats, and the metrics' values."""

    tokens_sha256: str
    tokens: int
    forwards: int
    nll: float | None
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as its baseline file has it, or as it is now.

    made_on: hardware of the launches that made images, torch: versions; machine, timings [seconds, images] and what
    disturbed them: of those that timed them; speedup: over AR, None without one; metrics: metrics.json as tables show it;
    protocols: of the values of single images.
    """

    name: str
    identity: dict[str, Any]
    made_on: list[str]
    torch: list[str]
    machine: Machine | None
    timings: list[tuple[float, int]]
    disturbed: str
    speedup: SpeedUp | None
    images: dict[Id, ImageResult]
    metrics: dict[str, Any]
    protocols: dict[str, str]


def take(run: Run, others: list[Run]) -> SavedRun:
    """Return what a run is held to, or holds others to; others: where its AR run may be."""
    machine = table_machine([run])
    timed = run.timed(machine)
    scores = read_scores(run.folder)
    digests = {(r["id"][0], r["id"][1]): r["tokens_sha256"] for r in run.folder.records()}
    images = {
        key: ImageResult(
            tokens_sha256=digests[key],
            tokens=image.tokens,
            forwards=image.forwards,
            nll=image.nll,
            scores=scores.get(key, {}),
        )
        for key, image in run.images.items()
    }
    launches = [run.launches.get(number, {}) for number in sorted({image.launch for image in run.images.values()})]
    protocol = run.metrics.get("protocol", {})
    return SavedRun(
        name=run.path.name,
        identity=run.identity,
        made_on=sorted({str(launch.get("hardware")) for launch in launches}),
        torch=torch_versions(launches),
        machine=machine,
        timings=separate_timings(timed.values(), run),
        disturbed=disturbance([run.launches.get(n, {}) for n in {image.batch[0] for image in timed.values()}]),
        speedup=None if run.is_ar else speed_up_over_ar(run, others, machine)[0],
        images=images,
        metrics=shown(run.metrics, declared([run.folder])),
        protocols={
            info.per_image: str(protocol.get(metric))
            for metric, info in read_info(run.folder).values()
            if info.per_image
        },
    )


def write_baseline(saved: SavedRun, path: Path) -> None:
    """Write a baseline file."""
    content = {"sjd2_baseline": FORMAT, "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | asdict(saved)
    content["images"] = [{"id": list(key), **asdict(saved.images[key])} for key in sorted(saved.images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_baseline(path: Path) -> SavedRun:
    """Read a baseline file; raises UserError if it is missing or none."""
    made = "python run.py stage=compare run_dir=RUN save_baseline=FILE"
    if not path.is_file():
        raise UserError(f"against={path} is neither a run folder nor a baseline file; save one with: {made}")
    try:
        content = json.loads(read_text(path, "baseline file"))
        if content["sjd2_baseline"] != FORMAT:
            raise UserError(f"{path} was saved by another release; save it again: {made}")
        images = {(i["id"][0], i["id"][1]): {k: v for k, v in i.items() if k != "id"} for i in content["images"]}
        saved = SavedRun(
            **{
                key: content[key]
                for key in ("name", "identity", "made_on", "torch", "disturbed", "metrics", "protocols")
            },
            machine=content["machine"] and (content["machine"][0], content["machine"][1]),
            timings=[(seconds, count) for seconds, count in content["timings"]],
            speedup=content["speedup"] and SpeedUp(**content["speedup"]),
            images={key: ImageResult(**image) for key, image in images.items()},
        )
        _check_values(saved)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no baseline file ({first_line(error)}); save one with: {made}") from error
    return saved


def _check_values(saved: SavedRun) -> None:
    """Raise an error of Python's if a number is none, or the settings name no prompts."""
    if not all(isinstance(part, dict) for part in (saved.metrics, saved.protocols)):
        raise ValueError("its metrics are no mapping")
    if not saved.identity["prompts"]["digest"]:
        raise ValueError("it names no prompts")
    for image in saved.images.values():
        values = (image.tokens, image.forwards, image.nll or 0.0, *image.scores.values())
        if min(image.tokens, image.forwards) < 1 or not all(map(math.isfinite, values)):
            raise ValueError("an image has no tokens, no passes, or a number that is not finite")
    if not all(seconds > 0 and images > 0 for seconds, images in saved.timings):
        raise ValueError("a timing is not positive")
