"""Read run folders for comparison: what a run was, what each of its images cost, and which runs may be compared.

Two runs stand in one table if they answered one prompt list under one sampling law with one model. A speed-up needs
more: all that decides a time must be equal (`SPEED_KEYS`, hardware and threads).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from evaluation.metrics.speed import seconds_per_image
from evaluation.run_folder import Id, RunFolder, name, run_folders
from sjd2.errors import UserError
from sweeps.labels import flatten, set_labels, tail

SPEED_KEYS = ("law", "sampler", "batch_size", "refill", "dtype")  # beside model, hardware and threads
Machine = tuple[str, int | None]  # (hardware, CPU threads of torch)


@dataclass(slots=True)
class Image:
    """What one image cost; `machine` is None where its time must not count: under `trace=`, or on unknown hardware."""

    prompt: str
    seed: int
    tokens: int
    forwards: int
    draft_forwards: int
    accepted: np.ndarray  # tokens committed at each pass
    nll: float | None  # nats over all tokens
    latency: float  # seconds of prefill and decoding of its batch
    cost: float  # seconds from prompt to pixels that one image of a full batch costs
    batch: tuple[int, int]  # (launch, batch): images of one batch were timed together; with refill each is one alone
    machine: Machine | None


@dataclass
class Run:
    """One run folder, read."""

    folder: RunFolder
    config: dict[str, Any]
    identity: dict[str, Any]
    metrics: dict[str, Any]
    launches: dict[int, dict[str, Any]]
    images: dict[Id, Image]
    label: str = field(default="")

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def decoder(self) -> str:
        return str(self.identity["decoder"]["name"])

    @property
    def is_ar(self) -> bool:
        return self.decoder == "ar"

    @property
    def lossless(self) -> bool:
        """What the decoder says of itself, except that rule=paper is lossy whatever a yaml says."""
        decoder = self.identity["decoder"]
        return bool(decoder.get("lossless")) and decoder.get("rule") != "paper"

    @property
    def law(self) -> tuple[tuple[str, Any], ...]:
        """The law that tokens are drawn from; how they are drawn from it (`sampler`) is no part of it."""
        return tuple(sorted((key, value) for key, value in self.identity["law"].items() if key != "sampler"))

    @property
    def adapter(self) -> str | None:
        return self.config["model"].get("adapter")

    @property
    def files(self) -> dict[str, str]:
        """The weights' hub ids or paths as the command gave them, the adapter's left out."""
        return {key: str(value) for key, value in self.config["model"].items() if str(key).endswith("weights")}

    @property
    def model(self) -> tuple[tuple[str, Any], ...]:
        """The model without a fine-tuned adapter; of paths the last two parts, since the same file has many paths."""
        settings = {key: str(value) for key, value in flatten(self.identity["model"]).items() if key != "adapter"}
        return tuple(sorted((settings | {key: tail(path) for key, path in self.files.items()}).items()))

    @property
    def group(self) -> tuple[Any, ...]:
        """What runs of one table have in common."""
        return self.model, self.identity["prompts"]["digest"], self.law

    def setting(self, key: str) -> Any:
        """Return one of SPEED_KEYS."""
        return {"law": self.law, "sampler": self.identity["law"].get("sampler")}.get(key, self.identity.get(key))

    def timed(self, machine: Machine | None) -> dict[Id, Image]:
        """Return the images whose time was taken on `machine`."""
        return {key: image for key, image in self.images.items() if machine is not None and image.machine == machine}


def read_run(path: Path) -> Run:
    """Read one run folder; raises UserError if it is none, or has no identity."""
    folder = RunFolder.open(path)
    config = OmegaConf.to_container(folder.config, resolve=False)
    if "identity" not in config:
        raise UserError(f"{path}/config.yaml has no identity, so nothing can be compared with it; make the run again.")
    launches = {entry["launch"]: entry for entry in folder.provenance()}
    traces = {file.stem for file in (folder.path / "traces").glob("*.json")}
    images = {}
    refill = bool(folder.identity.get("refill"))
    for record in folder.records():
        launch, traced = launches.get(record["launch"], {}), name(record["id"]) in traces
        images[(record["id"][0], record["id"][1])] = _image(record, launch, traced=traced, refill=refill)
    return Run(folder, config, folder.identity, folder.metrics, launches, images)


def _image(record: dict[str, Any], launch: dict[str, Any], *, traced: bool, refill: bool) -> Image:
    seconds = record["seconds"]
    hardware = launch.get("hardware")
    return Image(
        prompt=record["prompt"],
        seed=record["seed"],
        tokens=record["tokens"],
        forwards=record["forwards"],
        draft_forwards=record.get("draft_forwards", 0),
        accepted=np.asarray(record["accepted"], np.int32),
        nll=record.get("nll"),
        latency=seconds["prefill"] + seconds["decode"],
        batch=(record["launch"], record["batch"]),
        cost=seconds_per_image(record, refill=refill),
        machine=None if traced or hardware is None else (hardware, launch.get("threads")),
    )


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read run folders, each once: those with an image, and (name, reason) of those that cannot be read."""
    runs, unreadable = [], []
    for path in dict.fromkeys(Path(path).resolve() for path in paths):
        try:
            run = read_run(path)
        except UserError as error:
            unreadable.append((path.name, str(error)))
            continue
        if run.images:
            runs.append(run)
    return runs, unreadable


def with_baselines(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among `paths`, and the AR runs beside them with the same prompts, law and settings."""
    given = [path for path in dict.fromkeys(Path(path).resolve() for path in paths) if _holds_images(path)]
    wanted = {_family(path) for path in given}
    beside = {found.parent for parent in {path.parent for path in given} for found in parent.glob("*/config.yaml")}
    others = sorted(path for path in beside - set(given) if _holds_images(path))
    return given + [path for path in others if _decoder(path) == "ar" and _family(path) in wanted]


def _holds_images(path: Path) -> bool:
    return (path / "config.yaml").is_file() and any(path.glob("samples*.jsonl"))


def _decoder(path: Path) -> str | None:
    return RunFolder(path).identity.get("decoder", {}).get("name")


def _family(path: Path) -> str:
    """Return what a run and its baseline share, as text."""
    identity = RunFolder(path).identity
    model = {key: value for key, value in identity.get("model", {}).items() if key != "adapter"}
    settings = [identity.get(key) for key in ("law", "prompts", "batch_size", "refill", "dtype", "seed")]
    return repr((sorted(model.items(), key=str), settings))


def groups(runs: Iterable[Run], named: Collection[str] = ()) -> list[list[Run]]:
    """Split runs into tables: one model, one prompt list, one law each; labelled, AR first, lossless before lossy.

    named: decoder settings that labels always show, e.g. those that jobs without a run had too.
    """
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    for members in found.values():
        set_labels(members, named)
        members.sort(key=lambda run: (not run.is_ar, not run.lossless, run.decoder, _natural(run.label)))
    return list(found.values())


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sort window=8 before window=16."""
    parts = re.findall(r"\d+\.?\d*|\D+", text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


# ---- what may be compared


def same_model(run: Run, other: Run) -> bool:
    """Say whether two runs of a table have the very same weights, adapter included."""
    return run.identity.get("digest") == other.identity.get("digest")


def same_but_adapter(run: Run, other: Run) -> bool:
    """Say whether `other` is `run`'s model without its adapter."""
    alone = run.adapter is not None and other.adapter is None
    return alone and run.model == other.model and run.files == other.files


def obstacles(run: Run, other: Run, machine: Machine | None) -> list[str]:
    """Name what forbids to compare the times of two runs; empty where nothing does."""
    named = [key for key in SPEED_KEYS if run.setting(key) != other.setting(key)]
    if not (same_model(run, other) or same_but_adapter(run, other)):
        named.append("model weights")
    if not run.timed(machine).keys() & other.timed(machine).keys():
        named.append("hardware, threads or images")
    return named


def baseline(run: Run, runs: Iterable[Run], machine: Machine | None) -> tuple[Run | None, list[str]]:
    """Return the AR run of equal settings; where there is none, None and what the nearest AR run differs in."""
    ranked = sorted(
        ((obstacles(run, other, machine), not same_model(run, other), -len(other.images), index, other)
         for index, other in enumerate(runs) if other.is_ar),
        key=lambda entry: (len(entry[0]), *entry[1:4]),
    )  # fmt: skip
    if not ranked:
        return None, ["no AR run is there"]
    return (ranked[0][4], []) if not ranked[0][0] else (None, ranked[0][0])


def quality_reference(run: Run, runs: Iterable[Run]) -> Run | None:
    """Return the AR run that a difference in quality refers to: the same model, the nearest settings, most images."""
    fit = [r for r in runs if r.is_ar and r is not run and (same_model(run, r) or same_but_adapter(run, r))]
    fit = [r for r in fit if len({key[0] for key in r.images.keys() & run.images.keys()}) > 1]
    keys = (*SPEED_KEYS, "seed")
    return min(
        fit,
        key=lambda r: (not same_model(run, r), sum(run.setting(k) != r.setting(k) for k in keys), -len(r.images)),
        default=None,
    )


def table_machine(runs: Iterable[Run]) -> Machine | None:
    """Return the machine whose times a table shows: that of most runs (AR counts double), then of most images."""
    weight: Counter[Machine] = Counter()
    images: Counter[Machine] = Counter()
    for run in runs:
        timed = Counter(image.machine for image in run.images.values() if image.machine is not None)
        images.update(timed)
        weight.update(dict.fromkeys(timed, 2 if run.is_ar else 1))
    return max(weight, key=lambda machine: (weight[machine], images[machine]), default=None)


def common_ids(runs: Sequence[Run]) -> list[Id]:
    """Return the ids of the images that all runs have."""
    return sorted(set.intersection(*(set(run.images) for run in runs))) if runs else []


def common_prompts(run: Run, other: Run) -> int:
    """Return the number of prompts of the images that both runs have."""
    return len({key[0] for key in run.images.keys() & other.images.keys()})


def chosen_folders(runs_dir: str | Path, run_dir: str | Path | None) -> list[Path]:
    """Return `run_dir` and the AR runs beside it, or where it is None every run folder of `runs_dir`.

    Raises UserError if there is no such folder.
    """
    if run_dir is not None:
        return with_baselines([RunFolder.open(run_dir).path])
    if not (found := run_folders(runs_dir)):
        raise UserError(f"no run folder in runs_dir={runs_dir}; make one with: python run.py")
    return found
