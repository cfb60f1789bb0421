"""Say below a table how its numbers came about, and every reason to doubt a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sweeps.runs import Machine
from sweeps.tables.rows import Row

COUNTS = (
    "Passes are passes of the target model, the prefill included, since it yields the first token. Step compression is "
    "the mean over images of tokens / passes, so it lies a little above tokens over mean passes. Counts include "
    "forced tokens (row ends, headers), each its own pass for AR; "
)
FREE = "the step compression in parentheses leaves them out."
NO_FORCED = "step_compression_free in the CSV leaves them out."
LOSSY = (
    "**lossy**: the decoder does not sample from the model's own law (rule=paper, relaxed or grouped acceptance), so "
    "its speed is bought with quality."
)
INTERVALS = (
    "In brackets: 95 % intervals of the difference to AR on the same prompts (paired bootstrap over prompts, not "
    "corrected for the number of rows). ± after a step compression is the standard error over prompts, after a KID the "
    "standard deviation over its subsets; a single FID has no interval."
)
FEW = 16  # images from which a bootstrap over prompts and a standard error mean something
TIMINGS = 4  # separate timings below which a speed-up is a hint
STARVED = 0.8  # of the CPU time that a run wanted, below which its seconds say little
SHORT = 3  # rows up to which a note names them where all are meant
ADAPTER = "† The run has a fine-tuned adapter; the AR run beside it is the same model without one."


def notes(rows: Sequence[Row], machine: Machine | None) -> list[str]:
    """Return what stands below a table, warnings last."""
    found = [_times(rows, machine), COUNTS + (FREE if has_forced_tokens(rows) else NO_FORCED)]
    if any(not row.run.lossless for row in rows):
        found.append(LOSSY)
    if any(row.nll_difference or row.compression_error or "kid_std" in row.metrics for row in rows):
        found.append(INTERVALS)
    found += _scores(rows)
    if any(row.other_adapter for row in rows):
        found.append(ADAPTER)
    doubts = [*_doubts_about_n(rows), *_doubts_about_scores(rows), *_doubts_about_times(rows, machine)]
    return found + [f"Warning: {text}" for text in doubts]


def agreed(rows: Sequence[Row], key: str) -> str:
    """Return the one value of a metric that all rows with it agree on, '' where they differ or none has it."""
    values = {str(row.metrics[key]) for row in rows if key in row.metrics}
    return values.pop() if len(values) == 1 else ""


def has_forced_tokens(rows: Sequence[Row]) -> bool:
    """Say whether leaving forced tokens out makes any difference to a step compression."""
    return any(row.compression_free is not None and abs(row.compression_free - row.compression) > 1e-9 for row in rows)


def _times(rows: Sequence[Row], machine: Machine | None) -> str:
    if machine is None:
        return "No times: every image was made under trace=, or on hardware that its run does not name."
    hardware, threads = machine
    name = hardware if threads is None or "thread" in hardware else f"{hardware}, {threads} CPU threads"
    dtypes = sorted({str(row.run.setting("dtype")) for row in rows})
    words = [name, *(f"torch {version}" for version in _torch(rows)), *dtypes]
    counts = sorted({row.timings for row in rows if row.timed})
    batches = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    return (
        f"Times: {', '.join(words)}; batches timed per run: {batches}. Latency: median of what one waits for an image, "
        "prefill and decoding of its batch. Speed-up: against the AR run of equal model, law, batch size, dtype and "
        "hardware, on the images both have; else blank."
    )


def _torch(rows: Sequence[Row]) -> list[str]:
    launches = [launch for row in rows for launch in row.run.launches.values()]
    return sorted({str(launch["packages"]["torch"]) for launch in launches if "torch" in launch.get("packages", {})})


def _scores(rows: Sequence[Row]) -> list[str]:
    """Name extractor, reference and model of every score, and the lines beside which an alignment is read."""
    found = []
    for row in rows:
        if "fid" in row.metrics:
            source, reference = row.metrics.get("fid_extractor"), row.metrics.get("fid_reference")
            found.append(f"FID and KID: features of {source}, reference {reference}; N as in the row.")
    found += [f"CLIP score: {row.metrics['clip_model']}." for row in rows if "clip_model" in row.metrics]
    known = []
    for key, name in (("alignment_ceiling", "ceiling (VQ reconstructions)"), ("alignment_real", "rendered pictures")):
        if text := agreed(rows, key):
            known.append(f"{name} {float(text):.3f}")
    chances = sorted(f"{row.metrics['alignment_chance']:.3f}" for row in rows if "alignment_chance" in row.metrics)
    if chances:
        known.append(f"chance {' to '.join(dict.fromkeys((chances[0], chances[-1])))}")
    if known:
        found.append(f"Alignment, the share of the caption's attributes found in the picture: {', '.join(known)}.")
    return list(dict.fromkeys(found))


# ---- reasons to doubt


def _doubts_about_n(rows: Sequence[Row]) -> list[str]:
    found = []
    if few := [row for row in rows if row.n < FEW]:
        who = "all rows" if len(few) == len(rows) else _names(few)
        found.append(f"{who}: with fewer than {FEW} images, intervals and standard errors are too narrow to trust.")
    if len({row.n for row in rows}) == 1:
        return found
    return [
        *found,
        f"runs have different N ({_listed(rows, lambda row: row.n)}): differences and speed-ups use only the images "
        "that both runs have; passes, latency and scores are of each run's own images, and FID does not compare "
        "between N.",
    ]


def _doubts_about_scores(rows: Sequence[Row]) -> list[str]:
    found = []
    for key, name in (("fid_extractor", "extractors"), ("fid_reference", "references")):
        if len({row.metrics[key] for row in rows if key in row.metrics}) > 1:
            found.append(f"FID and KID of different {name} do not compare.")
    if len({row.metrics["clip_model"] for row in rows if "clip_model" in row.metrics}) > 1:
        found.append("CLIP scores of different models do not compare.")
    if stale := [row for row in rows if row.scored and row.scored != row.n]:
        counts = _listed(stale, lambda row: row.scored)
        found.append(f"{_names(stale)}: scored on {counts} images only; run stage=score on them.")
    for key, name in (("fid_warning", "FID"), ("geneval_warning", "GenEval")):
        for text, members in _by_reason(rows, lambda row, key=key: str(row.metrics.get(key, ""))).items():
            found.append(f"{name}{'' if len(members) == len(rows) else f' of {_names(members)}'}: {text}")
    return found


def _doubts_about_times(rows: Sequence[Row], machine: Machine | None) -> list[str]:
    found = []
    if partly := [row for row in rows if machine is not None and row.timed < row.n]:
        counts = _listed(partly, lambda row: row.timed)
        found.append(
            f"times of {_names(partly)} are of {counts} images: the others were made elsewhere or under trace=."
        )
    for share, members in _by_reason(rows, _starved).items():
        found.append(
            f"times of {_names(members)} are too long: other work had the CPU, they got {share} of their time."
        )
    if few := [row for row in rows if row.speedup is not None and not row.run.is_ar and row.timings < TIMINGS]:
        counts = _listed(few, lambda row: row.timings)
        found.append(f"speed-ups of {_names(few)} rest on {counts} timings each: no more than a hint.")
    for reason, members in _by_reason(rows, lambda row: row.speedup_missing).items():
        why = reason if reason.startswith("no AR") else f"the nearest AR run differs in {reason}"
        others = [row for row in rows if not row.run.is_ar]
        who = f"any of the {len(others)} decoders" if len(members) == len(others) > SHORT else _names(members)
        found.append(f"no speed-up for {who}: {why}.")
    if len(_torch(rows)) > 1:
        found.append("runs were made with different versions of torch.")
    return found


def _starved(row: Row) -> str:
    """Return the least share of the CPU time it wanted that a launch behind the times got, '' where it had enough."""
    shares = [launch["cpu_share"] for launch in row.run.launches.values() if "cpu_share" in launch]
    return f"{100 * min(shares):.0f} %" if shares and row.timed and min(shares) < STARVED else ""


def _by_reason(rows: Sequence[Row], reason: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if reason(row):
            found.setdefault(reason(row), []).append(row)
    return found


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(row.run.label for row in rows)


def _listed(rows: Sequence[Row], value: Callable[[Row], int]) -> str:
    return ", ".join(map(str, sorted({value(row) for row in rows})))
