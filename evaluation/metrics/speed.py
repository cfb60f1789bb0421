"""Speed and likelihood of a run, computed from its records alone.

Tokens per pass hold on any machine; seconds hold on one, so they come from the launches of one hardware only. A forced
token (row end, header) counts as a token and, for AR, as a pass, as in the papers of the SJD family;
`step_compression_free` leaves forced tokens out.

# N image-phase tokens of one image
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from evaluation.acceptance import accept_length, accept_rate, depth_counts
from evaluation.run_folder import Record, RunFolder, Snapshot
from evaluation.score import Metric, MetricInfo, Scores
from evaluation.timings import newest_timings
from sjd2.config import instantiate
from sjd2.errors import UserError

# from prompt to pixels; the last two are both from tokens to pixels, by an image tokeniser or by a diffusion stage, and
# neither is there with model.pixels=none
PARTS = ("encode", "prefill", "decode", "image", "diffusion")


def step_compression(record: Record) -> float:
    """Return tokens / target-model passes of one image, forced tokens included; AR has exactly 1."""
    return record["tokens"] / record["forwards"]


def step_compression_free(record: Record, free: np.ndarray) -> float:
    """Return free tokens / passes that committed at least one free token, for one image.

    free: [N] bool, the positions that the model really chooses. Passes that committed forced tokens alone leave the
    denominator, as the forced tokens leave the numerator; so AR, whose every forced token is a pass of its own, has
    exactly 1 again. A pass that commits a run of both counts as one pass for its free tokens.
    """
    ends = np.cumsum(record["accepted"])
    before = np.concatenate([[0], np.cumsum(free)])  # free tokens before each position
    per_pass = before[ends] - before[ends - record["accepted"]]
    return float(per_pass.sum() / (per_pass > 0).sum())


def free_positions(run: RunFolder) -> np.ndarray | None:
    """Return which of the N positions the model really chooses, bool [N]; None where the run's settings do not say."""
    try:
        return np.asarray(instantiate(run.config.model).layout.free)
    except (UserError, AttributeError, FileNotFoundError):
        return None


def seconds_per_image(record: Record, *, refill: bool) -> float:
    """Return the wall time that one image of a full batch costs.

    A fixed batch shares all its parts. With refill a row's own time overlaps the other rows' (Little's law: divide by
    the rows), while its pixels are made one image at a time.
    """
    parts, rows = record["seconds"], record["batch_rows"]
    together = parts["encode"] + parts["prefill"] + parts["decode"]
    pixels = parts.get("image", 0.0) + parts.get("diffusion", 0.0)
    return together / rows + pixels / (1 if refill else rows)


def whole_latency(record: Record) -> float | None:
    """Return what one waits for an image that a diffusion stage draws: all parts of its batch; None without such a stage.

    Of other models the pixels are a small part, and `latency` is that of the tokens.
    """
    return sum(record["seconds"].values()) if "diffusion" in record["seconds"] else None


def accepted_histogram(records: Iterable[Record]) -> dict[str, int]:
    """Count the passes by the tokens they committed: {"1": passes, "2": ...}; the prefill is one of them."""
    counts = Counter(tokens for record in records for tokens in record["accepted"])
    return {str(tokens): counts[tokens] for tokens in sorted(counts)}


def _acceptance(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of draft tokens; by depth: the acceptance probability given that the depth was reached."""
    drafts = [record["drafts"] for record in records]
    tests, accepts = depth_counts(drafts)
    values = {
        "accept_rate": accept_rate(drafts),
        "accept_length": accept_length(drafts, [record["forwards"] for record in records]),
        "accept_rate_by_depth": [int(a) / int(t) if t else None for a, t in zip(accepts, tests, strict=True)],
    }
    return {key: value for key, value in values.items() if value is not None}


def one_machine(records: Sequence[Record], launches: Sequence[dict[str, Any]]) -> tuple[list[Record], list[dict]]:
    """Return the records and launches of the hardware and threads that made most images; the first of equals."""
    kinds = {launch["launch"]: (launch.get("hardware"), launch.get("threads")) for launch in launches}
    counts = Counter(kinds.get(record["launch"]) for record in records)
    if not counts:
        return [], []
    kind = counts.most_common(1)[0][0]
    chosen = [record for record in records if kinds.get(record["launch"]) == kind]
    return chosen, [launch for launch in launches if kinds[launch["launch"]] == kind]


class Speed(Metric):
    """Passes, seconds, memory and negative log-likelihood; needs neither images nor a network."""

    # no titles: tables make their columns of these from the records, on one machine and beside AR
    numbers = (
        MetricInfo(name="forwards_mean", digits=1, higher_is_better=False),
        MetricInfo(name="draft_forwards_mean", digits=1, higher_is_better=False),
        MetricInfo(name="step_compression", higher_is_better=True),
        MetricInfo(name="step_compression_free", higher_is_better=True),
        MetricInfo(name="accept_rate", digits=3, higher_is_better=True),
        MetricInfo(name="accept_length", higher_is_better=True),
        MetricInfo(name="nll_per_token", digits=3, higher_is_better=False),
        MetricInfo(name="n_timed", digits=0),
        *(
            MetricInfo(name=name, digits=3, higher_is_better=False, of_machine=True)
            for name in (
                "latency_s_median",
                "latency_s_p95",
                "whole_latency_s_median",
                *(f"seconds_{part}_mean" for part in PARTS),
            )
        ),
        MetricInfo(name="images_per_s", digits=3, higher_is_better=True, of_machine=True),
        MetricInfo(name="peak_memory_gb", digits=1, higher_is_better=False, of_machine=True),
        MetricInfo(name="gflops_per_token", higher_is_better=False),
    )
    details = ("accepted_per_forward_hist", "accept_rate_by_depth", "nll_missing", "hardware", "dtype")
    # as it stands in run folders, word for word
    protocol = (
        "step_compression: mean over images of tokens / target-model passes, the prefill counted as the pass of the "
        "first token, forced tokens included; step_compression_free: free tokens / passes that committed one; "
        "nll_per_token: under the target law (guidance, temperature, top-k, top-p), nats, forced tokens cost nothing; "
        "latency: prefill + decode of an image's batch, device-synchronised after a warm-up, traced images left out; "
        "images_per_s: all four parts; peak_memory_gb: of the GPU, or the process's resident set on a CPU (1e9 bytes); "
        "gflops_per_token: counted over one image (runtime.flops), matrix products and attention, both guidance branches."
    )

    def compute(self, run: Snapshot) -> Scores:
        """Compute all values; times are absent where every image was traced."""
        return Scores(self._passes(run) | self._times(run)) if run.records else Scores()

    def _passes(self, run: Snapshot) -> dict[str, Any]:
        records = run.records
        out: dict[str, Any] = {
            "forwards_mean": fmean(record["forwards"] for record in records),
            "draft_forwards_mean": fmean(record["draft_forwards"] for record in records),
            "step_compression": fmean(map(step_compression, records)),
            "accepted_per_forward_hist": accepted_histogram(records),
        }
        if (dtype := run.folder.identity.get("dtype")) is not None:
            out["dtype"] = dtype  # the resolved one: `auto` and a model's own differ by device
        if missing := sum("nll" not in record for record in records):
            out["nll_missing"] = missing  # they were not finite: no mean without them
        else:
            out["nll_per_token"] = fmean(record["nll"] / record["tokens"] for record in records)
        free = free_positions(run.folder)
        if free is not None and all(record["tokens"] == len(free) for record in records):
            out["step_compression_free"] = fmean(step_compression_free(record, free) for record in records)
        if all("drafts" in record for record in records):  # absent where nothing is drafted, and in older records
            out |= _acceptance(records)
        if counts := [launch["gflops_per_token"] for launch in run.launches if "gflops_per_token" in launch]:
            out["gflops_per_token"] = counts[-1]
        return out

    def _times(self, run: Snapshot) -> dict[str, Any]:
        timed, launches = one_machine(newest_timings(run), run.launches)
        if not timed:
            return {}
        refill = bool(run.folder.config.get("refill", False))
        latency = [record["seconds"]["prefill"] + record["seconds"]["decode"] for record in timed]
        out: dict[str, Any] = {
            "n_timed": len(timed),
            "latency_s_median": float(np.median(latency)),
            "latency_s_p95": float(np.quantile(latency, 0.95)),
            "images_per_s": 1 / fmean(seconds_per_image(record, refill=refill) for record in timed),
        }
        wholes = [whole for record in timed if (whole := whole_latency(record)) is not None]
        if len(wholes) == len(timed):
            out["whole_latency_s_median"] = float(np.median(wholes))
        for part in PARTS:
            if all(part in record["seconds"] for record in timed):
                out[f"seconds_{part}_mean"] = fmean(record["seconds"][part] for record in timed)
        if peaks := [launch["peak_memory_gb"] for launch in launches if "peak_memory_gb" in launch]:
            out["peak_memory_gb"] = max(peaks)
        if launches and launches[0].get("hardware"):
            out["hardware"] = launches[0]["hardware"]
        return out
