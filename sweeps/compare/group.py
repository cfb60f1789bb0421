"""Compare the runs of one table pairwise: each against AR in distribution, the others with each other in passes.

Lossless decoders must not differ from AR, a lossy control should: its likelihood (NLL per token) and its kernel distance
(KID, from the features in the run folders) are tested at 1 %, corrected for the number of decoders. Every value is of
the images that both runs have; too few prompts for a test leave the mean alone. Two runs in every respect
(`run_dir=A against=B`): pair.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evaluation.run_folder import RunFolder, run_folders
from evaluation.statistics import ALPHA, Difference, paired
from sjd2.errors import UserError
from sjd2.files import write_atomically
from sweeps.comparable import common_prompts, groups, quality_reference, same_weights, table_machine
from sweeps.compare.distances import DistanceGaps, fid_settings
from sweeps.compare.gate import gate, save
from sweeps.compare.pair import UNTESTED, compare_pair, enough, gap_numbers
from sweeps.runs import Run, read_runs
from sweeps.speedup import SpeedUp, has_stages, speed_up_over_ar, whole
from sweeps.tables.formats import Table, markdown
from sweeps.tables.notes import ADAPTER
from sweeps.tables.rows import likelihoods
from sweeps.tables.table import speedup_numbers, title
from sweeps.tables.terminal import show


@dataclass(frozen=True)
class AgainstAR:
    """One run minus its AR run: NLL in nats per token, and KID; None if it could not be tested."""

    run: Run
    reference: Run
    prompts: int  # in both runs
    nll: Difference | None
    kid: Difference | None
    extractor: str  # of the KID
    kid_missing: str  # why there is no KID
    speedup: SpeedUp | None = None
    speedup_missing: str = ""
    whole_speedup: SpeedUp | None = None  # of the whole image, where a diffusion stage follows the tokens

    @property
    def found(self) -> list[bool]:
        """For each test that could be made, whether it found a difference."""
        return [value.differs for value in (self.nll, self.kid) if value is not None and enough(value)]


@dataclass(frozen=True)
class PassGap:
    """Run `second` minus run `first`: target-model passes per image, and tokens per pass."""

    first: Run
    second: Run
    passes: Difference
    compression: Difference


@dataclass
class GroupComparison:
    """Everything compared within one group of runs; `skipped` gives the reasons for what was not."""

    runs: Sequence[Run]
    against_ar: list[AgainstAR] = field(default_factory=list)
    pairs: list[PassGap] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def corrected_level(self) -> float:
        """The level of one interval against AR, 1 - 0.01 / m for m decoders."""
        return 1 - ALPHA / max(1, len(self.against_ar))


def compare(runs: Sequence[Run], metric: Mapping[str, Any] | None = None) -> GroupComparison:
    """Compare the runs of one group; metric: settings of a FeatureDistance, tried before those in the runs' folders."""
    found = GroupComparison(runs)
    others = [run for run in runs if not run.is_ar]
    references = {run.path: quality_reference(run, runs) for run in others}
    used = {reference.path: reference for reference in references.values() if reference is not None}
    more = [run for run in runs if run.is_ar and run.path not in used]  # e.g. AR with another seed: a negative control
    references |= {run.path: quality_reference(run, used.values()) for run in more}
    tested = [(run, ar) for run in more + others if (ar := references[run.path]) is not None]
    unmatched = [run.label for run in others if references[run.path] is None]
    if unmatched:
        found.skipped.append(f"{', '.join(unmatched)}: no AR run with the same weights shares two prompts.")
    distances, machine = DistanceGaps(metric), table_machine(runs)
    for run, ar in tested:
        line = _against_ar(run, ar, len(tested), distances)
        if not run.is_ar:
            speedup, _, why = speed_up_over_ar(run, runs, machine)
            line = replace(line, speedup=speedup, speedup_missing=why)
            if has_stages(run):
                line = replace(line, whole_speedup=speed_up_over_ar(run, runs, machine, whole)[0])
        found.against_ar.append(line)
    for first, second in combinations(others, 2):
        if first.adapter == second.adapter and not same_weights(first, second):
            found.skipped.append(f"{second.label} − {first.label}: the model weights differ.")
        elif common_prompts(first, second) < 2:
            found.skipped.append(f"{second.label} − {first.label}: fewer than two common prompts.")
        else:
            found.pairs.append(_pair(first, second))
    return found


def _against_ar(run: Run, reference: Run, comparisons: int, distances: DistanceGaps) -> AgainstAR:
    theirs, ours = likelihoods(reference), likelihoods(run)
    level, nll = 1 - ALPHA, None
    if len({key[0] for key in theirs.keys() & ours.keys()}) > 1:
        replicates = min(40_000, 2000 * comparisons)  # at least 10 in either tail of the corrected interval
        nll = paired(theirs, ours, level=level, comparisons=comparisons, replicates=replicates)
    kid, about = distances.gap("kid", reference, run, level, comparisons)
    extractor, missing = (about, "") if kid else ("", about)
    return AgainstAR(run, reference, common_prompts(reference, run), nll, kid, extractor, missing)


def _pair(first: Run, second: Run) -> PassGap:
    passes = [{key: float(image.forwards) for key, image in run.images.items()} for run in (first, second)]
    rates = [{key: image.tokens / image.forwards for key, image in run.images.items()} for run in (first, second)]
    return PassGap(first, second, paired(*passes), paired(*rates))


# ---- for readers


def group_tables(found: GroupComparison) -> list[Table]:
    """Return the tables of one group: against AR, and pairs of the others."""
    made = [_ar_table(found)] if found.against_ar else []
    if found.pairs:
        few = [pair for pair in found.pairs if not enough(pair.passes)]
        level = " (95 %)" if len(few) < len(found.pairs) else ""
        header = [f"difference{level}", "N", "passes per image", "p", "step compression", "p"]
        notes = [
            (
                "First minus second, on the common prompts; not corrected for the number of pairs. Passes of a separate "
                "draft model are not counted."
            )
        ]
        notes += [f"{', '.join(map(_name, few))}: {UNTESTED}."] if few else []
        made.append(
            Table("Decoders compared with each other", header, [_pair_cells(pair) for pair in found.pairs], notes)
        )
    made = made or [Table("", ["nothing to compare"], [])]
    made[0].title = " - ".join(filter(None, (title(found.runs[0]), made[0].title.lower())))
    made[-1].notes += [f"Not compared: {reason}" for reason in found.skipped]
    return made


def _ar_table(found: GroupComparison) -> Table:
    rows, names = found.against_ar, sorted({row.extractor for row in found.against_ar if row.kid})
    level = f"{100 * found.corrected_level:.5g} %"
    shown = f" ({level})" if any(row.found for row in rows) else ""
    header = ["minus AR", "lossless", "N", f"Δ NLL/token{shown}", "p", "differs"]
    header += [f"Δ KID{shown}", "p", "differs"] if names else []
    stages = any(row.whole_speedup for row in rows)
    header += ["AR stage speed-up (95 %)", "whole speed-up (95 %)"] if stages else ["speed-up (95 %)"]
    cells = []
    for row in rows:
        mark = "" if same_weights(row.run, row.reference) else " †"
        line = [row.run.label + mark, "yes" if row.run.lossless else "**no**", _n(row.nll, row.prompts)]
        line += _tested(row.nll, 4)
        if names:
            own = f" (N={_n(row.kid, 0)})" if row.kid and _n(row.kid, 0) != line[2] else ""
            first, *rest = _tested(row.kid, 5)
            line += [first + own, *rest]
        for speedup in (row.speedup, row.whole_speedup)[: 1 + stages]:
            line.append(speedup.text(mark.strip()) if speedup else "–" * bool(row.speedup_missing))
        cells.append(line)
    notes = [_verdict(rows)]
    few = [row.run.label for row in rows if row.nll and not enough(row.nll)]
    if few and shown:
        notes.append(f"{', '.join(few)}: {UNTESTED}.")
    if shown:
        notes.append(f"Nats per token; p-values and {level} intervals are corrected for {len(rows)} decoders, "
                     f"so the probability of even one false positive is {100 * ALPHA:g} % for each measure. No difference "
                     "found does not prove equality: the interval says how far apart they may be.")  # fmt: skip
    notes += [f"KID on features of {', '.join(names)}."] if names else []
    missing = {row.kid_missing: [r.run.label for r in rows if r.kid_missing == row.kid_missing] for row in rows}
    reasons = [f"No KID for {', '.join(labels)}: {reason}." for reason, labels in missing.items() if reason]
    slow = {
        row.speedup_missing: [r.run.label for r in rows if r.speedup_missing == row.speedup_missing] for row in rows
    }
    reasons += [f"No speed-up for {', '.join(labels)}: {reason}." for reason, labels in slow.items() if reason]
    return Table("Against AR", header, cells, [*notes, *reasons, *([ADAPTER] if "†" in str(cells) else [])])


def _verdict(rows: Sequence[AgainstAR]) -> str:
    words = []
    for kind, wanted in (("lossless", True), ("lossy", False)):
        tested = [row for row in rows if row.run.lossless is wanted and row.found]
        if tested:
            names = [row.run.label for row in tested if any(row.found)]
            listed = f" ({', '.join(names)})" if names else ""
            words.append(f"{len(names)} of {len(tested)} {kind} differ from AR{listed}")
    return "; ".join(words or [UNTESTED if any(row.nll for row in rows) else "nothing could be tested"]) + "."


def _n(difference: Difference | None, prompts: int) -> str:
    if difference is None or difference.images == difference.prompts:
        return str(difference.prompts if difference else prompts)
    return f"{difference.prompts} ({difference.images} images)"


def _tested(gap: Difference | None, digits: int) -> list[str]:
    if gap is None:
        return ["", "", ""]
    if not enough(gap):
        return [f"{gap.mean:+.{digits}f}", "", ""]
    return [gap.with_interval(digits), gap.p_text, "**yes**" if gap.differs else "no"]


def _pair_cells(pair: PassGap) -> list[str]:
    gaps = [text for gap in (pair.passes, pair.compression) for text in _tested(gap, 2)[:2]]
    return [_name(pair), _n(pair.passes, 0), *gaps]


def _name(pair: PassGap) -> str:
    return f"{pair.second.label} − {pair.first.label}"


# ---- for programs


def group_json(found: GroupComparison) -> dict[str, Any]:
    """Return every number under its own name, unrounded; what could not be tested is absent."""
    against = []
    for row in found.against_ar:
        line = {"run": row.run.path.name, "label": row.run.label, "decoder": row.run.decoder}
        line |= {"lossless": row.run.lossless, "reference": row.reference.path.name, "prompts": row.prompts}
        line |= {"same_weights": same_weights(row.run, row.reference)}
        for name, gap in (("nll_per_token", row.nll), ("kid", row.kid)):
            line |= {name: gap_numbers(gap) | ({"differs": gap.differs} if enough(gap) else {})} if gap else {}
        line |= speedup_numbers(row.speedup) | speedup_numbers(row.whole_speedup, "whole_")
        against.append(line | ({"kid_extractor": row.extractor} if row.kid else {"kid_missing": row.kid_missing}))
    pairs = [
        {"run": pair.second.path.name, "minus": pair.first.path.name, "label": pair.second.label}
        | {"minus_label": pair.first.label, "passes": gap_numbers(pair.passes)}
        | {"step_compression": gap_numbers(pair.compression)}
        for pair in found.pairs
    ]
    about = {"group": title(found.runs[0]), "alpha": ALPHA, "comparisons": len(against)}
    return about | {"corrected_level": found.corrected_level, "against_ar": against, "pairs": pairs,
                    "skipped": found.skipped}  # fmt: skip


def compare_folders(paths: Sequence[Path], out: Path, metric: Mapping[str, Any] | None = None) -> str:
    """Compare run folders group by group, write compare.md and compare.json into `out`; return the Markdown.

    Raises UserError if no two runs may be compared.
    """
    runs, unreadable = read_runs(paths)
    found = [compare(group, metric) for group in groups(runs) if len(group) > 1]
    if not found:
        raise UserError(
            "stage=compare needs two runs with the same model, prompts and sampling parameters, and found none."
        )
    text = "\n".join(markdown(table) for comparison in found for table in group_tables(comparison))
    text += "".join(f"\nSkipped {label}: {reason}\n" for label, reason in unreadable)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "compare.md", text.encode())
    content = json.dumps([group_json(comparison) for comparison in found], indent=1, allow_nan=False)
    write_atomically(out / "compare.json", (content + "\n").encode())
    return text


def stage(cfg: DictConfig) -> Path:
    """Compare run_dir with against, or all run folders of runs_dir pairwise; return the folder written to.

    Where `against` is a file, hold the run to it; raises UserError if it breaks a bound.
    """
    if cfg.get("save_baseline") is not None:
        return save(cfg)
    if cfg.against is not None and not Path(cfg.against).is_dir():
        return gate(cfg)
    if (cfg.run_dir is None) != (cfg.against is None):
        raise UserError(
            "stage=compare takes either two runs, run_dir=FOLDER against=FOLDER, or all runs of runs_dir=FOLDER."
        )
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = fid_settings(config)
    out = Path(cfg.runs_dir) / "tables"
    if cfg.run_dir is not None:
        first, second = RunFolder.open(cfg.run_dir).path, RunFolder.open(str(cfg.against)).path
        # two pairs of folders may share their names
        pair = hashlib.sha256(f"{first.resolve()} {second.resolve()}".encode()).hexdigest()[:6]
        out = out / f"{first.resolve().name}-{second.resolve().name}-{pair}"
        show(compare_pair((first, second), out, settings), out / "two.md", cfg.output)
        return out
    show(compare_folders(run_folders(cfg.runs_dir), out, settings), out / "compare.md", cfg.output)
    return out
