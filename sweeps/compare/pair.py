"""Compare two run folders: settings, tokens, the paired results of every image, and what they ran on.

`python run.py stage=compare run_dir=A against=B`. Every difference is B minus A on the images of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.run_folder import Id
from evaluation.run_folder import name as image_name
from evaluation.score import read_info, read_scores
from evaluation.statistics import ALPHA, Difference, paired
from sjd2.errors import UserError
from sjd2.files import write_atomically
from sweeps.comparable import groups, same_but_adapter, same_weights, table_machine
from sweeps.compare.distances import DistanceGaps
from sweeps.runs import Run, flatten_settings, read_run
from sweeps.speedup import SpeedUp, comparable_timings, has_stages, speed_up, whole
from sweeps.tables.formats import Table, markdown
from sweeps.tables.notes import FEW
from sweeps.tables.rows import likelihoods
from sweeps.tables.table import speedup_numbers

NOT_PROVENANCE = (
    "launch",
    "run",
    "time",
    "ended",
    "peak_memory_gb",
    "turns",
    "retime",
    "retimed",
)  # keys of a launch that do not describe where it ran
EXAMPLES = 3  # values of one key shown in a cell
LATENCY = "latency, s"
UNTESTED = f"not tested, which needs {FEW} common prompts"


def enough(gap: Difference) -> bool:
    """Return whether a difference is of enough prompts for an interval and a p-value."""
    return gap.prompts >= FEW


def gap_numbers(gap: Difference) -> dict[str, Any]:
    """Return the numbers of a difference by name, without interval and p-value if it is of too few prompts."""
    known = asdict(gap)
    return known if enough(gap) else {key: known[key] for key in ("mean", "prompts", "images")}


@dataclass(frozen=True)
class TokenMatch:
    """How many of the common `images` have exactly the same tokens; `first`: (image, position) of the first mismatch."""

    images: int
    equal: int
    first: tuple[Id, int] | None


@dataclass(frozen=True)
class Measure:
    """One value of both runs on their common images, and its paired difference."""

    name: str
    values: tuple[float | None, float | None]  # None for KID and FID, which are of a whole run
    gap: Difference
    digits: int

    @property
    def tested(self) -> bool:
        """Whether there are enough prompts for an interval and a p-value."""
        return enough(self.gap)


@dataclass
class PairComparison:
    """Everything compared between two runs; `skipped` lists what could not be compared, and why."""

    runs: tuple[Run, Run]
    settings: dict[str, tuple[str, str]]
    provenance: dict[str, tuple[list[str], list[str]]]
    tests: int = 0  # the number that intervals and p-values are corrected for
    tokens: TokenMatch | None = None
    speedup: SpeedUp | None = None  # of the second run over the first
    whole_speedup: SpeedUp | None = None  # of the whole image, where a diffusion stage follows the tokens
    measures: list[Measure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def compare_two(first: Run, second: Run, metric: Mapping[str, Any] | None = None) -> PairComparison:
    """Compare two runs; metric: settings of a FeatureDistance, tried before those in the runs' folders."""
    found = PairComparison((first, second), _settings(first, second), _unequal(_where(first), _where(second), []))
    common = sorted(first.images.keys() & second.images.keys())
    if first.identity["prompts"]["digest"] != second.identity["prompts"]["digest"]:
        found.skipped.append("images: the prompts differ")
    elif not common:
        found.skipped.append("images: the runs have none in common")
    else:
        if _canvas(first) == _canvas(second):
            found.tokens = _tokens(first, second, set(common))
        else:
            found.skipped.append("tokens: the models differ")
        _measure(found, metric)
    return found


def _settings(first: Run, second: Run) -> dict[str, tuple[str, str]]:
    """Return the settings that decide tokens and differ; weights by digest, not by path."""
    a, b = (
        flatten_settings({key: value for key, value in run.identity.items() if key != "id"}) for run in (first, second)
    )
    return _unequal({key: str(value) for key, value in a.items()}, {key: str(value) for key, value in b.items()}, "")


def _where(run: Run) -> dict[str, list[str]]:
    """Return what the launches of a run ran on: {key: its values in the order of the launches}."""
    values: dict[str, dict[str, None]] = {}
    for launch in run.launches.values():
        shown = {key: value for key, value in launch.items() if key not in NOT_PROVENANCE}
        if isinstance(shown.get("command"), list):
            shown["command"] = " ".join(map(str, shown["command"]))
        for key, value in flatten_settings(shown).items():
            values.setdefault(key, {})[str(value)] = None
    return {key: list(found) for key, found in values.items()}


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any], nothing: Any) -> dict[str, tuple[Any, Any]]:
    keys = sorted(first.keys() | second.keys())
    pairs = {key: (first.get(key, nothing), second.get(key, nothing)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _canvas(run: Run) -> tuple[Any, ...]:
    return tuple(run.identity["model"].get(key) for key in ("name", "size", "rows", "columns", "vocabulary"))


def _tokens(first: Run, second: Run, common: set[Id]) -> TokenMatch:
    """Compare tokens by their digest; only the tokens of the first image that differs are read."""
    records = [{(r["id"][0], r["id"][1]): r for r in run.folder.records()} for run in (first, second)]
    other = sorted(key for key in common if len({side[key]["tokens_sha256"] for side in records}) > 1)
    if not other:
        return TokenMatch(len(common), len(common), None)
    try:
        ours, theirs = (run.folder.tokens(side[other[0]]) for run, side in zip((first, second), records, strict=True))
    except OSError:  # a folder copied without its tokens; the digests suffice
        return TokenMatch(len(common), len(common) - len(other), None)
    least = min(len(ours), len(theirs))
    places = np.flatnonzero(ours[:least] != theirs[:least])
    return TokenMatch(len(common), len(common) - len(other), (other[0], int(places[0]) if places.size else least))


# ---- values of the images


def _values(found: PairComparison) -> Iterator[tuple[str, int, list[dict[Id, float]]]]:
    """Yield (name, digits, [{image: value} of either run]) of every value per image."""
    runs = found.runs
    yield "passes per image", 2, [{k: float(i.forwards) for k, i in run.images.items()} for run in runs]
    yield "step compression", 3, [{k: i.tokens / i.forwards for k, i in run.images.items()} for run in runs]
    if timings := _latencies(found):
        yield LATENCY, 4, timings
    likely = [likelihoods(run) for run in runs]
    if runs[0].sampling != runs[1].sampling:
        found.skipped.append("NLL per token: the runs have different target distributions")
    elif not all(likely):
        found.skipped.append("NLL per token: an image of the runs has none, its likelihood was not finite")
    elif same_weights(*runs) or same_but_adapter(*runs) or same_but_adapter(*reversed(runs)):
        yield "NLL per token", 4, likely
    else:
        found.skipped.append("NLL per token: the model weights differ")
    scores = [read_scores(run.folder) for run in runs]
    names = [{name for row in side.values() for name in row} for side in scores]
    for name in sorted(names[0] | names[1]):
        sides = [{key: float(row[name]) for key, row in side.items() if name in row} for side in scores]
        if len({_protocol(run, name) for run in runs}) > 1:
            found.skipped.append(f"{name}: not measured with the same protocol")
        else:
            yield name, 4, sides


def _latencies(found: PairComparison) -> list[dict[Id, float]]:
    """Return the seconds of every separate timing of both runs; the images of a batch are timed together and count once.

    Empty, with a reason in `skipped`, if the times cannot be compared; their ratio, which needs no pairs, may be there.
    """
    first, second = found.runs
    machine = table_machine(found.runs)
    speedup = speed_up(second, first, machine)
    if not isinstance(speedup, SpeedUp):
        found.skipped.append(f"latency: {speedup}")
        return []
    found.speedup = speedup
    if has_stages(first, second) and isinstance(both := speed_up(second, first, machine, whole), SpeedUp):
        found.whole_speedup = both
    if any(run.setting("refill") and run.setting("batch_size") != 1 for run in found.runs):
        found.skipped.append("latency: the rows of a refilled batch share their passes, so there is no separate timing")
        return []
    timings, _ = comparable_timings(second, first, machine)
    batches = {(theirs.batch, ours.batch): key for key, (ours, theirs) in reversed(timings.items())}  # by first images
    if len({batch for batch, _ in batches}) < len(batches) or len({batch for _, batch in batches}) < len(batches):
        found.skipped.append("latency: the images were batched differently")
        return []
    return [{key: timings[key][side].latency for key in batches.values()} for side in (1, 0)]


def _protocol(run: Run, name: str) -> str | None:
    """Return the protocol of the metric that a per-image score belongs to."""
    metrics = {info.per_image: metric for metric, info in read_info(run.folder).values()}
    # scored before metrics declared their numbers: `alignment_all` belongs to `alignment`
    metric, protocol = metrics.get(name, name.partition("_")[0]), run.metrics.get("protocol", {})
    return protocol.get(name) or protocol.get(metric)


def _measure(found: PairComparison, metric: Mapping[str, Any] | None) -> None:
    """Test every value that both runs have, corrected for the number of tests."""
    values = []
    for name, digits, (a, b) in _values(found):
        common = a.keys() & b.keys()
        if len({key[0] for key in common}) < 2:
            found.skipped.append(f"{name}: fewer than two common prompts")
        else:
            values.append((name, digits, a, b, sorted(common)))
    distances = DistanceGaps(metric)
    tests, level = len(values) + 2, 1 - ALPHA  # `values` and two distances, whether or not these can be computed
    found.tests = tests
    for name, digits, a, b, common in values:
        gap = paired(a, b, level=level, comparisons=tests, replicates=min(40_000, 2000 * tests))
        means = (float(np.mean([a[key] for key in common])), float(np.mean([b[key] for key in common])))
        found.measures.append(Measure(name, means, gap, digits))
    for kind in ("kid", "fid"):
        gap, about = distances.gap(kind, *found.runs, level, tests)
        if gap is None:
            found.skipped.append(f"{kind.upper()}: {about}")
        else:
            found.measures.append(Measure(f"{kind.upper()} ({about})", (None, None), gap, 4))


# ---- for readers


def verdict(found: PairComparison) -> list[str]:
    """Return one sentence each on whether tokens and measures differ."""
    words, tokens = [], found.tokens
    if tokens is not None and tokens.equal == tokens.images:
        words.append(f"Tokens: equal in all {tokens.images} common images.")
    elif tokens is not None:
        first = f", first in image {image_name(tokens.first[0])} at token {tokens.first[1]}" if tokens.first else ""
        words.append(f"Tokens: different in {tokens.images - tokens.equal} of {tokens.images} common images{first}.")
    tested = [measure for measure in found.measures if measure.tested]
    if tested:
        different = [measure.name for measure in tested if measure.gap.differs]
        named = (
            f"different: {', '.join(different)}" if different else "no difference found, which does not prove equality"
        )
        words.append(
            f"Measures: {named} ({100 * ALPHA:g} % over all {found.tests} tests, including those that could not be made)."
        )
    elif found.measures:
        words.append(f"Measures: {UNTESTED}.")
    if found.speedup is not None:
        apart = (
            "" if found.speedup.paired else ", not timed in turns: it includes any change of the machine between them"
        )
        stages = (
            "" if found.whole_speedup is None else f" of the AR stage, {found.whole_speedup.text()} of the whole image"
        )
        words.append(f"Speed-up of B over A: {found.speedup.text()}{stages} (95 %){apart}.")
    return words


def pair_tables(found: PairComparison) -> list[Table]:
    """Return the tables of two runs: measures, settings, and what they ran on."""
    made = []
    if found.measures:
        level = f" ({100 * (1 - ALPHA / found.tests):.4g} %)" if any(m.tested for m in found.measures) else ""
        header = ["B minus A", "A", "B", f"difference{level}", "p", "N"]
        made.append(Table("Measures", [*header], [_cells(measure) for measure in found.measures]))
    ran = {key: (_some(a), _some(b)) for key, (a, b) in found.provenance.items()}
    equal = []
    for name, rows in (("Settings", found.settings), ("Provenance", ran)):
        if rows:
            made.append(Table(f"{name}: what differs", ["", "A", "B"], [[key, *pair] for key, pair in rows.items()]))
        else:
            equal.append(f"{name}: equal.")
    made = made or [Table("", ["nothing to compare"], [])]
    made[0].notes = ["A is {}, B is {}.".format(*paths(found)), *verdict(found), *equal]
    made[-1].notes += [f"Not compared: {reason.rstrip('.')}." for reason in found.skipped]
    return made


def paths(found: PairComparison) -> list[str]:
    """Return the names of both run folders, or their paths if the names are equal."""
    whole = [run.path.resolve() for run in found.runs]
    return [str(path) if whole[0].name == whole[1].name else path.name for path in whole]


def _some(values: Sequence[str]) -> str:
    more = f"; and {len(values) - EXAMPLES} more" if len(values) > EXAMPLES else ""
    return "; ".join(values[:EXAMPLES]) + more


def _cells(measure: Measure) -> list[str]:
    gap, digits = measure.gap, measure.digits
    sides = ["" if value is None else f"{value:.{digits}f}" for value in measure.values]
    if not measure.tested:
        return [measure.name, *sides, f"{gap.mean:+.{digits}f}", "", str(gap.prompts)]
    mark = "**" if gap.differs else ""
    return [measure.name, *sides, f"{mark}{gap.with_interval(digits)}{mark}", gap.p_text, str(gap.prompts)]


def pair_json(found: PairComparison) -> dict[str, Any]:
    """Return every number under its own name, unrounded; what could not be compared is absent."""
    about = {"a": str(found.runs[0].path), "b": str(found.runs[1].path), "tests": found.tests}
    about |= {"measures": [_numbers(measure) for measure in found.measures]}
    about |= {"settings": found.settings, "provenance": found.provenance, "skipped": found.skipped}
    about |= speedup_numbers(found.speedup) | speedup_numbers(found.whole_speedup, "whole_")
    return about | ({"tokens": asdict(found.tokens)} if found.tokens else {})


def _numbers(measure: Measure) -> dict[str, Any]:
    known: dict[str, Any] = {"name": measure.name, **gap_numbers(measure.gap)}
    if measure.tested:
        known["differs"] = measure.gap.differs
    return known | ({} if measure.values[0] is None else dict(zip("ab", measure.values, strict=True)))


def compare_pair(paths: tuple[Path, Path], out: Path, metric: Mapping[str, Any] | None = None) -> str:
    """Compare two run folders, write two.md and two.json into `out`; return the Markdown.

    Raises UserError if a folder is not a run, or both are the same.
    """
    first, second = (read_run(path) for path in paths)
    if first.path.resolve() == second.path.resolve():
        raise UserError(f"run_dir and against are the same folder, {first.path}; give two.")
    groups([first, second])
    found = compare_two(first, second, metric)
    text = "\n".join(markdown(table) for table in pair_tables(found))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "two.md", text.encode())
    write_atomically(out / "two.json", (json.dumps(pair_json(found), indent=1, allow_nan=False) + "\n").encode())
    return text
