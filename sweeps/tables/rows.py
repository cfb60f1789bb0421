"""Turn runs into the numbers of one table row each; every comparison is made on the images that both runs have.

A value is None where it does not exist or would be unfair: no speed-up across machines, batch sizes, dtypes or sampling
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.acceptance import accept_length, accept_rate
from evaluation.bootstrap import t_quantile
from evaluation.declared import declared, shown, withheld
from evaluation.run_folder import Id
from evaluation.score import MetricInfo, read_scores
from sweeps.comparable import quality_reference, same_weights
from sweeps.runs import ImageCost, Machine, Run
from sweeps.speedup import SpeedUp, speed_up_over_ar, whole
from sweeps.tables.latency import first_row, percentiles

if TYPE_CHECKING:
    from evaluation.statistics import Difference

FEWEST_PROMPTS = 4  # below them a bootstrap over prompts has too few resamples for an interval worth showing


@dataclass
class Row:
    """The numbers of one run; its scored metrics stay in `metrics`, under the names of metrics.json."""

    run: Run
    passes: float  # target-model passes per image
    draft_passes: float
    compression: float  # tokens per pass, mean over images
    compression_error: float | None  # standard error over prompts
    latency_s: float | None  # median over the images timed on the table's machine
    latency_error_s: float | None  # standard deviation over separate timings
    latency_percentiles: Mapping[int, float]  # {95: seconds, 99: ...}; {} where none was timed
    first_row_s: float | None  # median time to the first row of an image
    energy_j: float | None  # mean joules of the GPU per image
    images_per_s: float | None
    timed: int
    timings: int  # the number of separate timings: images of one batch are timed together
    speedup: SpeedUp | None
    speedup_missing: str  # why there is no speed-up; empty where there is one, or where the run is AR itself
    diffusion_s: float | None  # median seconds of the diffusion stage of a batch; None where the model has none
    whole_s: float | None  # median seconds from prompt to pixels of a batch, where there is a diffusion stage
    whole_speedup: SpeedUp | None
    other_adapter: bool  # the AR run beside it has no adapter
    nll_per_token: float | None
    nll_difference: Difference | None
    differences: dict[str, Difference] = field(default_factory=dict)  # to AR, by name in metrics.json
    reference_images: int = 0  # images in common with the AR run of the differences

    @property
    def n(self) -> int:
        return len(self.run.images)

    @property
    def without_likelihood(self) -> int:
        """Number of images whose likelihood was not finite."""
        return sum(image.nll is None for image in self.run.images.values())

    @property
    def compression_free(self) -> float | None:
        """Free tokens per pass that committed one, mean over images; None before these images were scored."""
        return self.run.metrics.get("step_compression_free") if self.scored == self.n else None

    @property
    def compression_all(self) -> float:
        """Tokens per pass with the passes of a draft network counted too, mean over images."""
        return float(np.mean(list(self._compressions_all.values())))

    @property
    def compression_all_error(self) -> float | None:
        """Half the 95 % interval of `compression_all`, over prompts; None for one prompt."""
        error, prompts = standard_error(self._compressions_all), len({key[0] for key in self.run.images})
        return None if error is None else t_quantile(prompts) * error

    @property
    def _compressions_all(self) -> dict[Id, float]:
        return {key: image.tokens / (image.forwards + image.draft_forwards) for key, image in self.run.images.items()}

    @property
    def drafts(self) -> Sequence[Mapping[str, Any]]:
        """What became of the draft tokens of each image; () where nothing is drafted, or older records do not say."""
        found = [image.drafts for image in self.run.images.values()]
        return [image for image in found if image is not None] if None not in found else ()

    @property
    def accept_rate(self) -> float | None:
        """Share of the tested draft tokens that were accepted."""
        return accept_rate(self.drafts)

    @property
    def accept_length(self) -> float | None:
        """1 + accepted draft tokens / passes that draft (EAGLE, vLLM, NeMo)."""
        return (
            accept_length(self.drafts, [image.forwards for image in self.run.images.values()]) if self.drafts else None
        )

    @property
    def scored(self) -> int:
        """Number of images in metrics.json, 0 before the run was scored."""
        return int(self.run.metrics.get("n_images", 0))

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """The numbers of metrics.json, without those that rest on too few images to be shown."""
        return shown(self.run.metrics, self._declared)

    @cached_property
    def withheld(self) -> Mapping[str, str]:
        """{name: why not} of the numbers of metrics.json that are not shown."""
        return withheld(self.run.metrics, self._declared)

    @cached_property
    def _declared(self) -> Mapping[str, MetricInfo]:
        return declared([self.run.folder])


def make_rows(runs: Sequence[Run], machine: Machine | None) -> list[Row]:
    """Return one row per run of a table."""
    return [_row(run, runs, machine) for run in runs]


def _row(run: Run, runs: Sequence[Run], machine: Machine | None) -> Row:
    images = list(run.images.values())
    timed = run.timed(machine)
    latencies = [image.latency for image in timed.values()]
    likely = likelihoods(run)
    row = Row(
        run=run,
        passes=float(np.mean([image.forwards for image in images])),
        draft_passes=float(np.mean([image.draft_forwards for image in images])),
        compression=float(np.mean([image.tokens / image.forwards for image in images])),
        compression_error=standard_error({key: image.tokens / image.forwards for key, image in run.images.items()}),
        latency_s=float(np.median(latencies)) if latencies else None,
        latency_error_s=_spread(timed.values()),
        latency_percentiles=percentiles(timed),
        first_row_s=first_row(run, timed),
        energy_j=_energy(timed.values()),
        images_per_s=1 / float(np.mean([image.cost for image in timed.values()])) if timed else None,
        timed=len(timed),
        timings=len({image.batch for image in timed.values()}),
        speedup=None,
        speedup_missing="",
        diffusion_s=_median([image.diffusion for image in timed.values()]),
        whole_s=_median([image.whole for image in timed.values()]),
        whole_speedup=None,
        other_adapter=False,
        nll_per_token=float(np.mean(list(likely.values()))) if likely else None,
        nll_difference=None,
    )
    _add_speedup(row, runs, machine)
    _add_differences(row, runs, likely)
    return row


def _energy(images: Iterable[ImageCost]) -> float | None:
    """Return the mean joules per image; None unless all of them were measured."""
    found = [image.energy_j for image in images]
    return float(np.mean([joules for joules in found if joules is not None])) if found and None not in found else None


def likelihoods(run: Run) -> dict[Id, float]:
    """Return nats per token of each image; {} if any image has none, since a mean over the others would hide that."""
    if any(image.nll is None for image in run.images.values()):
        return {}
    return {key: image.nll / image.tokens for key, image in run.images.items() if image.nll is not None}


def _median(seconds: Sequence[float | None]) -> float | None:
    """Return the median; None if there is no value, or one is missing."""
    known = [value for value in seconds if value is not None]
    return float(np.median(known)) if known and len(known) == len(seconds) else None


def _spread(images: Iterable[ImageCost]) -> float | None:
    """Return the standard deviation of the latencies of separate timings; None for fewer than two."""
    latencies = {image.batch: image.latency for image in images}
    return float(np.std(list(latencies.values()), ddof=1)) if len(latencies) > 1 else None


def standard_error(values: Mapping[Id, float]) -> float | None:
    """Return the standard error of the mean over prompts (repeats of a prompt are one value); None for one prompt."""
    prompts: dict[int, list[float]] = {}
    for key, value in values.items():
        prompts.setdefault(key[0], []).append(value)
    means = [float(np.mean(group)) for group in prompts.values()]
    return float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None


def _add_speedup(row: Row, runs: Sequence[Run], machine: Machine | None) -> None:
    row.speedup, reference, row.speedup_missing = speed_up_over_ar(row.run, runs, machine)
    if row.whole_s is not None:
        row.whole_speedup, _, _ = speed_up_over_ar(row.run, runs, machine, whole)
    row.other_adapter = row.speedup is not None and reference is not None and not same_weights(row.run, reference)


def _add_differences(row: Row, runs: Sequence[Run], likely: Mapping[Id, float]) -> None:
    reference = None if row.run.is_ar else quality_reference(row.run, runs)
    if reference is None:
        return
    row.reference_images = len(row.run.images.keys() & reference.images.keys())
    row.other_adapter = row.other_adapter or not same_weights(row.run, reference)
    theirs = likelihoods(reference)
    row.nll_difference = _paired(theirs, likely)
    folders = [reference.folder, row.run.folder]
    pair = [read_scores(folder) for folder in folders]
    for info in declared(folders).values():
        column = info.per_image
        theirs, ours = (
            {key: float(values[column]) for key, values in side.items() if column in values and key in run.images}
            for side, run in zip(pair, (reference, row.run), strict=True)
        )
        if (difference := _paired(theirs, ours)) is not None:
            row.differences[info.name] = difference


def _paired(theirs: Mapping[Id, float], ours: Mapping[Id, float]) -> Difference | None:
    """Return ours minus theirs with its interval; None where fewer than two prompts are in both."""
    if len({key[0] for key in theirs.keys() & ours.keys()}) < 2:
        return None
    from evaluation.statistics import paired

    return paired(theirs, ours)
