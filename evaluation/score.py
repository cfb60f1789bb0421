"""Score a run: its records are parsed once, every image is decoded once and handed to all metrics that want it.

A metric subclasses `Metric`. In full, in `evaluation/metrics/brightness.py` or a package of your own:

    class Brightness(Metric):
        numbers = (MetricInfo(name="brightness", title="brightness", digits=1, per_image="brightness"),)
        protocol = "brightness: mean over n_images of the mean pixel value."

        def start(self, run: Snapshot) -> Sequence[Record] | None:
            self.values: dict[Id, float] = {}
            return run.records or None  # whose images `update` is to get; None: does not apply to this run

        def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
            for image, record in zip(images, records, strict=True):
                self.values[record_id(record)] = float(image.mean())

        def compute(self, run: Snapshot) -> Scores:
            return Scores({"brightness": fmean(self.values.values())}, {"brightness": self.values})

A yaml that names it under `metrics:`, as those of conf/evaluation/ do, makes it a choice of `evaluation=`. Everything
else follows from `numbers`: metrics.json, the column of the tables, the CSV, the paired difference to AR, stage=compare.
Settings are keyword arguments of `__init__`; a file or library that may be missing is looked for in `check`. A metric
that needs no images has `compute` alone: metrics/speed.py from records, metrics/geneval.py through a tool.

    metrics.json       flat: n_images, every number under its name, `protocol`
    metrics_info.json  what the metrics declared of their numbers: tables are made where their classes are not installed
    scores.jsonl       values of single images
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from evaluation.run_folder import Id, Record, RunFolder, Snapshot, record_id
from sjd2.files import read_json, read_lines, write_atomically

SCORES_FILE = "scores.jsonl"
INFO_FILE = "metrics_info.json"
FEWEST = 100  # images below which no KID is shown, and no Pareto line drawn: sampling error exceeds most differences
NOTE = ".scored"  # the settings that metrics.json was made with, so that a finished run is not scored again


# --------------------------------------------------------------------------------------------------------- declarations
@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What tables have to know of one number; `name` is its key in metrics.json and its column in the CSV."""

    name: str
    title: str = ""  # heading of its column in tables; "": in the CSV only
    digits: int = 2
    higher_is_better: bool | None = None  # draws the arrow; None: neither
    per_image: str = ""  # the values of single images in scores.jsonl, for paired differences
    spread: str = ""  # key of its standard deviation, written after ±
    source: str = ""  # key of the network that made it, named in the heading where all rows agree
    source_in_cells: bool = True  # names it in each cell where they differ
    group: str = ""  # numbers of one group share one column, titles and cells joined
    of_machine: bool = False  # seconds or bytes, which say nothing beside those of another machine
    biased: bool = False  # its expectation depends on N: values of different N do not compare
    fewest: int = 0  # images below which it is not shown: tables, plots, W&B print a dash and `fewest_why` instead
    fewest_per: str = ""  # what `fewest` is for one of; the metric's protocol counts it, e.g. "on 64 features"
    fewest_why: str = ""  # follows "fewer than N images, "
    detail: bool = False  # its column is in the report, and in tables with columns=all only


@dataclass(frozen=True)
class Scores:
    """What one metric came to: values by name, and {per_image name: {id: value}}; empty where it does not apply."""

    values: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Mapping[Id, float]] = field(default_factory=dict)


class Metric:
    """Base class of everything measured on a run; the hooks do nothing unless overridden."""

    numbers: tuple[MetricInfo, ...] = ()
    details: tuple[str, ...] = ()  # other keys it may write: texts, histograms
    batch_size: int = 32  # images per `update`
    of_parts: bool = True  # whether some of a run's images can be scored alone; not where a tool of its own judges them
    protocol: str = ""  # one sentence on how the values come about; stage=compare takes two runs of equal ones only

    @property
    def needs_images(self) -> bool:
        """Whether it looks at images: if it takes any. One whose tool reads the files overrides this."""
        return type(self).update is not Metric.update

    def check(self) -> None:
        """Raise UserError if a file or library is missing; called before any image is made, so it must be cheap."""

    def check_prompts(self, facts: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError if the prompts of a run lack what the metric needs; facts: what their set knows of each."""

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Begin with a run and return the records whose images are wanted; None where the metric does not apply."""
        return ()

    def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
        """Take the next `batch_size` images wanted, uint8 [H, W, 3] each, in the order of the run's records."""

    def compute(self, run: Snapshot) -> Scores:
        """Return the scores, and let go of networks and images."""
        raise NotImplementedError

    def score(self, run: RunFolder) -> dict[str, Any]:
        """Score a run by this metric alone: keep the values of single images, return the others, write no metrics.json."""
        snapshot = Snapshot(run)
        found = measure(snapshot, {type(self).__name__: self})
        keep_scores(run, {name: values for scores in found.values() for name, values in scores.images.items()})
        return {key: value for scores in found.values() for key, value in scores.values.items()}


# -------------------------------------------------------------------------------------------------------------- scoring
def score(run: RunFolder | Snapshot, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Measure a run; write metrics.json, metrics_info.json and scores.jsonl, and return the first.

    Values of metrics that are not asked for now stay where they are of the same number of images, else they go: one
    file never mixes two N. Raises TypeError for a value that its metric does not declare.
    """
    run = Snapshot(run) if isinstance(run, RunFolder) else run
    (run.path / NOTE).unlink(missing_ok=True)
    n_images, before = len(run.records), run.folder.metrics
    kept = before if before.get("n_images") == n_images else {}
    protocol: dict[str, str] = dict(kept.get("protocol", {}))
    out = {key: value for key, value in kept.items() if key not in ("n_images", "protocol")}
    found = measure(run, metrics)
    for name, metric in metrics.items():
        out = {key: value for key, value in out.items() if key not in _keys(metric)}
        protocol.pop(name, None)
        if name in found and found[name].values:
            out |= found[name].values
            protocol[name] = metric.protocol
    keep_scores(run.folder, {name: values for scores in found.values() for name, values in scores.images.items()})
    _keep_info(run.folder, metrics, protocol.keys())
    result = {"n_images": n_images, **out, "protocol": protocol}
    write_atomically(run.path / "metrics.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


def score_part(run: Snapshot, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Return what metrics.json would hold if the run had no other images than those of the snapshot; writes nothing."""
    metrics = {name: metric for name, metric in metrics.items() if metric.of_parts}
    found = {name: scores for name, scores in measure(run, metrics).items() if scores.values}
    values = {key: value for scores in found.values() for key, value in scores.values.items()}
    protocol = {name: metrics[name].protocol for name in found}
    return {"n_images": len(run.records), **values, "protocol": protocol}


def measure(run: Snapshot, metrics: Mapping[str, Metric]) -> dict[str, Scores]:
    """Stream the images of a run once through all metrics; return the scores of those that apply, by their names.

    Of a run with tokens alone (model.pixels=none) only metrics that need no images. Raises TypeError for a value that its
    metric does not declare.
    """
    metrics = {name: metric for name, metric in metrics.items() if run.drawn or not metric.needs_images}
    wanted = {name: metric.start(run) for name, metric in metrics.items()}
    feeds = [_Feed(metrics[name], records) for name, records in wanted.items() if records]
    for record in run.records:
        takers = [feed for feed in feeds if record_id(record) in feed.wanted]
        if takers:
            (image,) = run.folder.images([record_id(record)])
            for feed in takers:
                feed.add(image, record)
    for feed in feeds:
        feed.flush()
    found = {name: metrics[name].compute(run) for name, records in wanted.items() if records is not None}
    for name, scores in found.items():
        per_image = {info.per_image for info in metrics[name].numbers}
        if foreign := (scores.values.keys() - _keys(metrics[name])) | (scores.images.keys() - per_image):
            raise TypeError(f"metric '{name}' wrote {sorted(foreign)}, which its `numbers` do not declare.")
    return found


class _Feed:
    """Collect the images that one metric wants into its batches."""

    def __init__(self, metric: Metric, records: Iterable[Record]) -> None:
        self.metric, self.wanted = metric, set(map(record_id, records))
        self.images: list[np.ndarray] = []
        self.records: list[Record] = []

    def add(self, image: np.ndarray, record: Record) -> None:
        self.images.append(image)
        self.records.append(record)
        if len(self.images) == self.metric.batch_size:
            self.flush()

    def flush(self) -> None:
        if self.images:
            self.metric.update(self.images, self.records)
        self.images, self.records = [], []


def _keys(metric: Metric) -> set[str]:
    """Return all keys that a metric may write into metrics.json."""
    return {info.name for info in metric.numbers} | set(metric.details)


# ------------------------------------------------------------------------------------- what was declared of the numbers
def read_info(run: RunFolder) -> dict[str, tuple[str, MetricInfo]]:
    """Return (the metric's name under evaluation.metrics, its declaration) of each number, as it was scored.

    {} for a run scored before there was such a file.
    """
    stored = read_json(run.path / INFO_FILE, {})
    fields = MetricInfo.__dataclass_fields__.keys()  # a later release may know more of them
    return {
        name: (entry["metric"], MetricInfo(name=name, **{k: v for k, v in entry.items() if k in fields}))
        for name, entry in stored.items()
    }


def _keep_info(run: RunFolder, metrics: Mapping[str, Metric], scored: Iterable[str]) -> None:
    """Write what `metrics` declare, beside what is there of other metrics whose values stay (`scored`: their names)."""
    others = set(scored) - metrics.keys()
    known = {name: entry for name, entry in read_info(run).items() if entry[0] in others}
    known |= {info.name: (name, info) for name, metric in metrics.items() for info in metric.numbers}
    content = {name: {"metric": metric} | _settings(info) for name, (metric, info) in known.items()}
    write_atomically(run.path / INFO_FILE, (json.dumps(content, indent=1) + "\n").encode())


def _settings(info: MetricInfo) -> dict[str, Any]:
    """Return what a declaration says beyond the defaults."""
    default = asdict(MetricInfo(name=info.name))
    return {key: value for key, value in asdict(info).items() if value != default[key]}


# ---------------------------------------------------------------------------------------------- values of single images
def read_scores(run: RunFolder) -> dict[Id, dict[str, float]]:
    """Read scores.jsonl, one line per image: {id: {"clip": ..., "alignment": ...}}; empty if there is none."""
    rows, _ = read_lines(run.path / SCORES_FILE)
    return {record_id(row): {key: value for key, value in row.items() if key != "id"} for row in rows}


def keep_scores(run: RunFolder, columns: Mapping[str, Mapping[Id, float]]) -> None:
    """Write columns {name: {id: value}} into scores.jsonl, so that two runs can be compared image by image."""
    if not columns:
        return
    rows = read_scores(run)
    for row in rows.values():
        for name in columns:
            row.pop(name, None)
    for name, values in columns.items():
        for key, value in values.items():
            rows.setdefault(key, {})[name] = value
    lines = (json.dumps({"id": list(key), **rows[key]}, allow_nan=False) + "\n" for key in sorted(rows) if rows[key])
    write_atomically(run.path / SCORES_FILE, "".join(lines).encode())
