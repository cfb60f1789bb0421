"""Read run folders: what a run was, and what each of its images cost. Which runs may be compared: comparable.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from yaml import YAMLError

from evaluation.metrics.speed import seconds_per_image, whole_latency
from evaluation.run_folder import Id, Record, RunFolder, Snapshot, record_id, run_folders
from evaluation.timings import newest_timings, retimings
from sjd2.config import instantiate
from sjd2.errors import UserError

if TYPE_CHECKING:
    from sjd2.models.layout import TokenGrid

UNREADABLE = (UserError, LookupError, TypeError, ValueError, OSError, YAMLError)  # what a damaged run folder raises
Machine = tuple[str, int | None]  # (hardware, CPU threads of torch)
Part = tuple[Collection[Id], Mapping[str, Any]]  # some images of a run, and its metrics of these alone


@dataclass(slots=True)
class ImageCost:
    """What one image cost; `machine` is None if its time must not count: not of the newest timing, or unknown hardware."""

    prompt: str
    seed: int
    tokens: int
    forwards: int
    draft_forwards: int
    accepted: np.ndarray  # [passes], tokens committed by each pass
    nll: float | None  # nats over all tokens
    latency: float  # seconds of prefill and decoding of its batch
    cost: float  # seconds per image from prompt to pixels, in a full batch
    batch: tuple[
        int, int
    ]  # (launch, batch) of its timing; the images of a batch are timed together, with refill each image alone
    machine: Machine | None
    launch: int  # that made the image; the launch in `batch` is the one that timed it
    turns: str | None = None  # what the launch that timed it shares with the run it took turns with
    diffusion: float | None = None  # seconds of the diffusion stage of its batch; None where the model has none
    whole: float | None = None  # seconds from prompt to pixels of its batch, where there is a diffusion stage
    prefill: float = 0.0  # seconds of `latency` until the first token; with refill they count as decoding
    drafts: dict[str, Any] | None = None  # what became of its draft tokens (evaluation/acceptance.py)
    energy_j: float | None = None  # joules that the GPU drew for it


@dataclass
class Run:
    """One run folder in memory."""

    folder: RunFolder
    config: dict[str, Any]
    identity: dict[str, Any]
    metrics: dict[str, Any]
    launches: dict[int, dict[str, Any]]
    images: dict[Id, ImageCost]
    in_turns: dict[tuple[str, Id], ImageCost] = field(default_factory=dict)  # every timing taken in turns, by `turns`
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
        """What the decoder declares, except that rule=paper is lossy whatever a yaml declares."""
        decoder = self.identity["decoder"]
        return bool(decoder.get("lossless")) and decoder.get("rule") != "paper"

    @property
    def exact_rule(self) -> bool:
        """Whether this is SJD2 with the exact rule; the papers' SJD2 is rule=paper."""
        return self.identity["decoder"].get("rule") == "exact" and self.decoder != "denoise"  # which verifies nothing

    @property
    def sampling(self) -> tuple[tuple[str, Any], ...]:
        """The sampling parameters that decide the target distribution; `sampler`, how it is drawn from, is not one."""
        return tuple(sorted((key, value) for key, value in self.identity["law"].items() if key != "sampler"))

    @property
    def adapter(self) -> str | None:
        return self.config["model"].get("adapter")

    @property
    def placement(self) -> tuple[str, str]:
        """Where a diffusion stage ran, which decides its seconds and no image."""
        model = self.config["model"]
        return str(model.get("diffusion_device")), str(model.get("diffusion_offload"))

    @property
    def files(self) -> dict[str, str]:
        """The weights' hub ids or paths as the command gave them, without the adapter's."""
        return {key: str(value) for key, value in self.config["model"].items() if str(key).endswith("weights")}

    @property
    def model(self) -> tuple[tuple[str, Any], ...]:
        """The model without a fine-tuned adapter; only the last two parts of paths, since one file has many paths."""
        settings = {
            key: str(value) for key, value in flatten_settings(self.identity["model"]).items() if key != "adapter"
        }
        return tuple(sorted((settings | {key: path_tail(path) for key, path in self.files.items()}).items()))

    @property
    def group(self) -> tuple[Any, ...]:
        """What the runs of one table have in common."""
        return self.model, self.identity["prompts"]["digest"], self.sampling, self.drawn

    @property
    def drawn(self) -> bool:
        """Whether the run has images, not tokens alone (model.pixels=none)."""
        return self.identity.get("pixels") != "none"

    @property
    def layout(self) -> TokenGrid:
        """The layout of the run's tokens on the image."""
        return instantiate(self.folder.config["model"]).layout

    def setting(self, key: str) -> Any:
        """Return a setting that may decide a time (comparable.SPEED_KEYS), or the seed."""
        return {"sampling": self.sampling, "sampler": self.identity["law"].get("sampler")}.get(
            key, self.identity.get(key)
        )

    def timed(self, machine: Machine | None) -> dict[Id, ImageCost]:
        """Return the images that were timed on `machine`."""
        return {key: image for key, image in self.images.items() if machine is not None and image.machine == machine}


def read_run(path: Path) -> Run:
    """Read one run folder; raises UserError if it is not one, or has no identity."""
    folder = RunFolder.open(path)
    config: Any = OmegaConf.to_container(folder.config, resolve=False)
    if "identity" not in config:
        raise UserError(f"{path}/config.yaml has no identity, so the run cannot be compared; make it again.")
    snapshot = Snapshot(folder)
    launches = {entry["launch"]: entry for entry in snapshot.launches}
    refill = bool(folder.identity.get("refill"))

    def cost(record: Record, *, counts: bool, made: int) -> ImageCost:
        return _image(record, launches.get(record["launch"], {}), counts=counts, made=made, refill=refill)

    made = {record_id(record): record["launch"] for record in snapshot.records}
    images = {record_id(record): cost(record, counts=False, made=record["launch"]) for record in snapshot.records}
    timings = [record for session in retimings(snapshot).values() for record in session]
    timings += [record for record in snapshot.records if not folder.traced(record)]
    timed = [cost(record, counts=True, made=made[record_id(record)]) for record in timings]
    in_turns = {
        (image.turns, record_id(record)): image for record, image in zip(timings, timed, strict=True) if image.turns
    }
    for record in newest_timings(snapshot):
        images[record_id(record)] = cost(record, counts=True, made=made[record_id(record)])
    return Run(folder, config, folder.identity, folder.metrics, launches, images, in_turns)


def _image(record: Record, launch: dict[str, Any], *, counts: bool, made: int, refill: bool) -> ImageCost:
    seconds = record["seconds"]
    hardware = launch.get("hardware")
    return ImageCost(
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
        machine=(hardware, launch.get("threads")) if counts and hardware is not None else None,
        launch=made,
        turns=launch.get("turns"),
        diffusion=seconds.get("diffusion"),
        whole=whole_latency(record),
        prefill=seconds["prefill"],
        drafts=record.get("drafts"),
        energy_j=record.get("energy_j"),
    )


def only(run: Run, ids: Collection[Id], metrics: Mapping[str, Any]) -> Run:
    """Return a run as if it had no images but those of `ids`; metrics: of these alone."""
    images = {key: image for key, image in run.images.items() if key in ids}
    turns = {key: image for key, image in run.in_turns.items() if key[1] in ids}
    return replace(run, images=images, in_turns=turns, metrics=dict(metrics))


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read run folders, each once; return those with an image, and (name, reason) of those that cannot be read."""
    runs, unreadable = [], []
    for path in dict.fromkeys(Path(path).resolve() for path in paths):
        try:
            run = read_run(path)
        except UNREADABLE as error:
            text = " ".join(str(error).split())
            reason = (
                text if isinstance(error, UserError) else f"its files cannot be read ({type(error).__name__}: {text})"
            )
            unreadable.append((path.name, reason))
            continue
        if run.images:
            runs.append(run)
    return runs, unreadable


def with_baselines(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among `paths`, and the AR runs beside them with the same prompts and settings."""
    given = [path for path in dict.fromkeys(Path(path).resolve() for path in paths) if _holds_images(path)]
    wanted = {_family(path) for path in given}
    beside = {found.parent for parent in {path.parent for path in given} for found in parent.glob("*/config.yaml")}
    others = sorted(path for path in beside - set(given) if _holds_images(path))
    return given + [path for path in others if _decoder(path) == "ar" and _family(path) in wanted]


def _holds_images(path: Path) -> bool:
    return (path / "config.yaml").is_file() and any(path.glob("samples*.jsonl"))


def _decoder(path: Path) -> str | None:
    return _identity(path).get("decoder", {}).get("name")


def _identity(path: Path) -> dict[str, Any]:
    """Return what decides a run's tokens, {} where its settings cannot be read: a table names the folder and the reason."""
    try:
        return RunFolder(path).identity
    except UNREADABLE:
        return {}


def _family(path: Path) -> str:
    """Return what a run and its baseline share, as text."""
    identity = _identity(path)
    model = {key: value for key, value in identity.get("model", {}).items() if key != "adapter"}
    settings = [identity.get(key) for key in ("law", "prompts", "batch_size", "refill", "dtype", "seed", "pixels")]
    return repr((sorted(model.items(), key=str), settings))


def chosen_folders(runs_dir: str | Path, run_dir: str | Path | None) -> list[Path]:
    """Return `run_dir` and the AR runs beside it, or every run folder of `runs_dir` if it is None.

    Raises UserError if there is no run folder.
    """
    if run_dir is not None:
        return with_baselines([RunFolder.open(run_dir).path])
    if not (found := run_folders(runs_dir)):
        raise UserError(f"no run folder in runs_dir={runs_dir}; make one with: python run.py")
    return found


def torch_versions(launches: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the versions of torch that launches ran with, sorted."""
    return sorted({str(launch["packages"]["torch"]) for launch in launches if "torch" in launch.get("packages", {})})


def flatten_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted keys; `_target_` becomes its class name."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if key == "_target_":
            found[prefix] = str(inner).rpartition(".")[2]
        else:
            found |= flatten_settings(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def path_tail(path: str) -> str:
    """Return the last two parts of a path, enough to tell weights apart wherever they lie."""
    return "/".join(Path(path).parts[-2:])
