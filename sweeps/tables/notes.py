"""The notes below a table: how its numbers were measured, and every reason to doubt a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluation.declared import declared
from evaluation.timings import disturbance
from sweeps.runs import Machine, torch_versions
from sweeps.speedup import TIMINGS
from sweeps.tables.latency import FEWEST
from sweeps.tables.rows import FEWEST_PROMPTS, Row

COUNTS = (
    "Passes are forward passes of the target model, including the prefill, which yields the first tokens. Step "
    "compression is the mean over images of tokens / passes, slightly more than mean tokens / mean passes."
)
FORCED = (
    " Counts include forced tokens (row ends, headers), each a pass of its own for AR; the step compression in "
    "parentheses excludes them."
)
LOSSY = (
    "**lossy**: the decoder does not sample from the model's own distribution (e.g. rule=paper, relaxed or grouped "
    "acceptance), so it trades quality for speed."
)
INTERVALS = (
    "In brackets: 95 % intervals of the difference to AR on the same prompts (paired bootstrap over prompts, not "
    f"corrected for the number of rows), – below {FEWEST_PROMPTS} prompts. ± is the standard error over prompts for "
    "step compression, the standard deviation over subsets for KID; a single FID has no interval."
)
KID = "KID is the mean over random subsets (torchmetrics), here and in stage=compare."
FEW = 16  # images below which a bootstrap over prompts and a standard error are unreliable
STAGES = (
    "AR stage: prefill and decoding of an image's tokens. Diffusion: from the tokens of a batch to its pixels, one image "
    "after the other, the same work for every decoder. Whole image: from prompt to pixels of its batch; its speed-up is "
    "measured as that of the AR stage is."
)
TOKENS_ONLY = (
    "Tokens only: with model.pixels=none no image is decoded from its tokens; images/s counts complete token sequences."
)
SHORT = 3  # up to so many rows a note names them one by one even if it means all
ADAPTER = "† The run has a fine-tuned adapter; its AR baseline is the same model without one."


def notes(rows: Sequence[Row], machine: Machine | None, *, detail: bool = False) -> list[str]:
    """Return the notes below a table, warnings last; detail: of a table with all columns."""
    found = [_times(rows, machine), COUNTS + (FORCED if has_forced_tokens(rows) else "")]
    if any(row.whole_s is not None for row in rows):
        found.append(STAGES)
    if not all(row.run.drawn for row in rows):
        found.append(TOKENS_ONLY)
    if any(not row.run.lossless for row in rows):
        found.append(LOSSY)
    if any(row.nll_difference or row.compression_error or "kid_std" in row.metrics for row in rows):
        found.append(INTERVALS)
    if detail:
        found += _few_timed(rows)
    found += _scores(rows) + withheld_reasons(rows, detail=detail)
    if any(row.other_adapter for row in rows):
        found.append(ADAPTER)
    doubts = [*_doubts_about_n(rows), *_doubts_about_scores(rows), *_doubts_about_times(rows, machine)]
    return found + [f"Warning: {text}" for text in doubts]


def shared_value(rows: Sequence[Row], key: str) -> str:
    """Return the value of a metric that all rows with it share; '' if they differ or none has it."""
    values = {str(row.metrics[key]) for row in rows if key in row.metrics}
    return values.pop() if len(values) == 1 else ""


def has_forced_tokens(rows: Sequence[Row]) -> bool:
    """Return whether excluding forced tokens changes any step compression."""
    return any(row.compression_free is not None and abs(row.compression_free - row.compression) > 1e-9 for row in rows)


def _times(rows: Sequence[Row], machine: Machine | None) -> str:
    if machine is None:
        return "No times: every image was made with trace=, or on hardware that its run does not name."
    hardware, threads = machine
    name = hardware if threads is None or "thread" in hardware else f"{hardware}, {threads} CPU threads"
    dtypes = sorted({str(row.run.setting("dtype")) for row in rows})
    words = [name, *(f"torch {version}" for version in _torch(rows)), *dtypes]
    counts = sorted({row.timings for row in rows if row.timed})
    batches = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    return (
        f"Times: {', '.join(words)}; batches timed per run: {batches}. Latency: median time to an image, prefill and "
        "decoding of its batch, ± the standard deviation over batches. Speed-up: over the AR run with the same "
        "model, sampling parameters, batch size, dtype and hardware, on the images both have; "
        f"{_in_turns(rows)}with its 95 % interval (bootstrap over batches); – where timings do not compare."
    )


def _in_turns(rows: Sequence[Row]) -> str:
    compared = [row.speedup for row in rows if row.speedup is not None and not row.run.is_ar]
    ways = ["the median over batches timed in turns with AR's, "] * any(one.paired for one in compared)
    ways += ["the ratio of the median latencies, "] * any(not one.paired for one in compared)
    return "or ".join(ways)


def _torch(rows: Sequence[Row]) -> list[str]:
    return torch_versions([launch for row in rows for launch in row.run.launches.values()])


def _scores(rows: Sequence[Row]) -> list[str]:
    """Name extractor, reference and model of every score, and the values to read an alignment against."""
    found = []
    for row in rows:
        if row.metrics.keys() & {"fid", "kid"}:
            source, reference = row.metrics.get("fid_extractor"), row.metrics.get("fid_reference")
            found.append(f"FID and KID: features of {source}, reference {reference}; N as in the row. {KID}")
    found += [f"CLIP score: {row.metrics['clip_model']}." for row in rows if "clip_model" in row.metrics]
    known = []
    for key, name in (("alignment_ceiling", "ceiling (VQ reconstructions)"), ("alignment_real", "rendered images")):
        if text := shared_value(rows, key):
            known.append(f"{name} {float(text):.3f}")
    by_chance = sorted(f"{row.metrics['alignment_chance']:.3f}" for row in rows if "alignment_chance" in row.metrics)
    if by_chance:
        known.append(f"chance level on these captions {' to '.join(dict.fromkeys((by_chance[0], by_chance[-1])))}")
    if known:
        found.append(f"Alignment, the share of the caption's attributes found in the image: {', '.join(known)}.")
    return list(dict.fromkeys(found))


def _few_timed(rows: Sequence[Row]) -> list[str]:
    """Return why percentiles of the latency are dashes."""
    fewest = {share: need for share, need in FEWEST.items() if any(0 < row.timed < need for row in rows)}
    named = "; ".join(f"p{share} below {need} timed images" for share, need in fewest.items())
    return [f"– for {named}: it would be the slowest image, or nearly."] if fewest else []


def withheld_reasons(rows: Sequence[Row], *, detail: bool = False) -> list[str]:
    """Return why scores are dashes, once for all runs and for all scores of one reason."""
    reasons: dict[str, list[str]] = {}
    for name, info in declared(row.run.folder for row in rows).items():
        if info.detail and not detail:
            continue
        for why, members in _by_reason(rows, lambda row, name=name: row.withheld.get(name, "")).items():
            who = "" if len(members) == len([row for row in rows if row.scored]) else f" of {_names(members)}"
            reasons.setdefault(f"{info.title}{who}", []).append(why)
    shared: dict[tuple[str, ...], list[str]] = {}
    for what, why in reasons.items():
        shared.setdefault(tuple(why), []).append(what)
    return [
        f"{', '.join(whats)} {'is' if len(whats) == 1 else 'are'} –: {'; '.join(why)}." for why, whats in shared.items()
    ]


# ---- reasons to doubt


def _doubts_about_n(rows: Sequence[Row]) -> list[str]:
    found = []
    if few := [row for row in rows if row.n < FEW]:
        who = "all rows" if len(few) == len(rows) else _names(few)
        found.append(f"intervals and standard errors are too narrow: fewer than {FEW} images ({who}).")
    if len({row.n for row in rows}) == 1:
        return found
    return [
        *found,
        (
            f"runs have different N ({_listed(rows, lambda row: row.n)}): differences and speed-ups use only the images "
            "that both runs have; passes, latency and scores are of each run's own images, and FIDs at different N are not "
            "comparable."
        ),
    ]


def _doubts_about_scores(rows: Sequence[Row]) -> list[str]:
    found = []
    for key, name in (("fid_extractor", "extractors"), ("fid_reference", "references")):
        if len({row.metrics[key] for row in rows if key in row.metrics}) > 1:
            found.append(f"FID and KID with different {name} are not comparable.")
    if len({row.metrics["clip_model"] for row in rows if "clip_model" in row.metrics}) > 1:
        found.append("CLIP scores of different models are not comparable.")
    if unknown := [row for row in rows if row.without_likelihood]:
        counts = _listed(unknown, lambda row: row.without_likelihood)
        found.append(
            f"{_names(unknown)}: no NLL, since that of {counts} images was not finite, and a mean without them says "
            "nothing; sample in bfloat16 or float32."
        )
    if stale := [row for row in rows if row.scored and row.scored != row.n]:
        counts = _listed(stale, lambda row: row.scored)
        found.append(f"{_names(stale)}: scored on only {counts} images; run stage=score on them.")
    for key, name in (("fid_warning", "FID"), ("geneval_warning", "GenEval")):
        for text, members in _by_reason(rows, lambda row, key=key: str(row.metrics.get(key, ""))).items():
            found.append(f"{name}{'' if len(members) == len(rows) else f' of {_names(members)}'}: {text}")
    return found


def _doubts_about_times(rows: Sequence[Row], machine: Machine | None) -> list[str]:
    found = []
    if partly := [row for row in rows if machine is not None and row.timed < row.n]:
        counts = _listed(partly, lambda row: row.timed)
        found.append(
            f"timings of {_names(partly)} cover {counts} images: the others were made elsewhere, with trace= or were not "
            "timed again."
        )
    for what, members in _by_reason(rows, _disturbed).items():
        found.append(f"timings of {_names(members)} are inflated: the process {what}.")
    faster = {row.run.label: row.speedup for row in rows if row.speedup is not None and not row.run.is_ar}
    if few := {label: speedup.timings for label, speedup in faster.items() if speedup.timings < TIMINGS}:
        counts = ", ".join(map(str, sorted(set(few.values()))))
        found.append(f"speed-ups of {', '.join(few)} rest on {counts} timings each: indicative only.")
    if apart := [label for label, speedup in faster.items() if not speedup.paired]:
        found.append(
            f"{', '.join(apart)} and AR were not timed in turns: the intervals of the speed-ups leave out how the machine "
            "changed in between; retime=true in the command that made them times them again, in turns."
        )
    for reason, members in _by_reason(rows, lambda row: row.speedup_missing).items():
        others = [row for row in rows if not row.run.is_ar]
        who = f"any of the {len(others)} decoders" if len(members) == len(others) > SHORT else _names(members)
        found.append(f"no speed-up for {who}: {reason}.")
    if len(_torch(rows)) > 1:
        found.append("runs were made with different versions of torch.")
    return found


def _disturbed(row: Row) -> str:
    """Return what disturbed the launches that took the times of a row; '' if nothing is known to have."""
    used = {image.batch[0] for image in row.run.images.values() if image.machine is not None}
    return disturbance([launch for number, launch in row.run.launches.items() if number in used])


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
