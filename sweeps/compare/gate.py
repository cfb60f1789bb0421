"""Hold a run to a saved baseline, for the CI of people's own: `python run.py stage=compare run_dir=RUN against=FILE`.

A bound is broken where the difference lies beyond it and its 95 % interval excludes no change at all: neither noise nor a
change that is proven but small ends a command. Values of single images are compared in pairs, on the images of both.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evaluation.bootstrap import ratio_of_medians
from evaluation.declared import declared
from evaluation.identity import difference, same
from evaluation.run_folder import Id, RunFolder, run_folders
from evaluation.statistics import paired
from harness.console import say
from harness.settings import check_writable
from sjd2.errors import UserError
from sjd2.files import write_atomically
from sweeps.compare.saved import ImageResult, SavedRun, read_baseline, take, write_baseline
from sweeps.runs import UNREADABLE, read_run, read_runs, with_baselines
from sweeps.tables.formats import Table, markdown
from sweeps.tables.terminal import show

Bounds = Mapping[str, float | None]
Values = tuple[dict[Id, float], dict[Id, float]]  # of the baseline and of the run
DISTANCES = {"fid": ("FID", "fid"), "kid": ("KID", "fid"), "cmmd": ("CMMD", "cmmd")}  # title, and whose keys it shares
FEWEST_PROMPTS = 6  # of one sign have a chance of 2^-5 by noise alone; below them nothing is proven at 95 %
HELD, OPEN, BROKEN = "held", "held?", "**broken**"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One bound, what both sides came to, and how far the run is beyond: `change` and its interval, as the bound counts it.

    setting: the key under bounds. relative: change is a share of the baseline's value. reason: why it is not checked.
    """

    name: str
    setting: str
    bound: float | None = None
    baseline: float | None = None
    run: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    relative: bool = True
    images: int = 0
    reason: str = ""

    @property
    def broken(self) -> bool:
        """Whether the change is beyond the bound, and proven to be one where it has an interval."""
        if self.reason or self.change is None or self.bound is None:
            return False
        proven = self.low is None or self.high is None or self.low > 0 or self.high < 0
        return self.change > self.bound and proven

    @property
    def undecided(self) -> bool:
        """Whether the bound is not broken, but the interval reaches beyond it."""
        held = not self.reason and not self.broken and self.high is not None and self.bound is not None
        return held and float(self.high or 0) > float(self.bound or 0)

    @property
    def verdict(self) -> str:
        """What a reader sees."""
        if self.reason:
            return f"not checked: {self.reason}"
        return BROKEN if self.broken else OPEN if self.undecided else HELD


def hold(run: SavedRun, saved: SavedRun, bounds: Bounds) -> list[Check]:
    """Check a run against a baseline; raises UserError if they have no image of the same prompts in common."""
    common = sorted(run.images.keys() & saved.images.keys())
    if run.identity["prompts"]["digest"] != saved.identity["prompts"]["digest"] or not common:
        raise UserError(
            f"{run.name} and the baseline of {saved.name} have no image of the same prompts in common; save a new baseline "
            "with save_baseline=FILE."
        )
    checks = [_tokens(run, saved, common)]
    checks += [_paired("passes per image", "passes", _values(saved, run, common, lambda image: image.forwards))]
    checks += [_likelihood(run, saved, common), *_scores(run, saved, common), *_distances(run, saved)]
    checks += [_speedup(run, saved), _latency(run, saved)]
    return [_with_bound(check, bounds) for check in checks]


def _with_bound(check: Check, bounds: Bounds) -> Check:
    bound = bounds[check.setting]
    reason = check.reason or ("" if bound is not None else f"bounds.{check.setting}=null")
    return Check(**asdict(check) | {"bound": bound, "reason": reason})


def _values(saved: SavedRun, run: SavedRun, common: list[Id], value: Callable[[ImageResult], float | None]) -> Values:
    """Return a value per image of both sides, of the common images that have it."""
    sides = [{key: value(side.images[key]) for key in common} for side in (saved, run)]
    keys = [key for key in common if None not in (sides[0][key], sides[1][key])]
    first, second = ({key: float(side[key] or 0.0) for key in keys} for side in sides)
    return first, second


def _paired(name: str, setting: str, values: Values, *, worse: int = 1, relative: bool = True) -> Check:
    """Return a check of the paired difference; worse: 1 where more is worse, -1 where less is, 0 where either is."""
    base, ours = values
    about: dict[str, Any] = {"name": name, "setting": setting, "images": len(base), "relative": relative}
    if len({key[0] for key in base}) < FEWEST_PROMPTS:
        return Check(**about, reason=f"fewer than {FEWEST_PROMPTS} common prompts have it")
    means = [sum(side.values()) / len(side) for side in values]
    gap = paired(base, ours)
    unit = abs(means[0]) if relative and means[0] else 1.0
    sign = worse or (1 if gap.mean >= 0 else -1)
    ends = sorted((sign * gap.low / unit, sign * gap.high / unit))
    return Check(**about, baseline=means[0], run=means[1], change=sign * gap.mean / unit, low=ends[0], high=ends[1])


def _tokens(run: SavedRun, saved: SavedRun, common: list[Id]) -> Check:
    """Return the check of tokens: held where nothing but the code may have changed."""
    other = sum(run.images[key].tokens_sha256 != saved.images[key].tokens_sha256 for key in common)
    reason = ""
    if not same(run.identity, saved.identity):
        reason = f"other settings ({difference(saved.identity, run.identity)})"
    elif (run.made_on, run.torch) != (saved.made_on, saved.torch):
        names = [", ".join(map(str, (*side.made_on, *(f"torch {v}" for v in side.torch)))) for side in (saved, run)]
        reason = f"made on {names[1]}, the baseline on {names[0]}"
    share = other / len(common)
    return Check(
        name="images with other tokens", setting="tokens", baseline=0.0, run=float(other), change=share,
        images=len(common), reason=reason,
    )  # fmt: skip


def _likelihood(run: SavedRun, saved: SavedRun, common: list[Id]) -> Check:
    for key, what in (("digest", "weights"), ("law", "sampling parameters")):
        if run.identity.get(key) != saved.identity.get(key):
            return Check(name="NLL per token", setting="nll", relative=False, reason=f"other {what}")
    lost = sum(run.images[key].nll is None and saved.images[key].nll is not None for key in common)
    if lost:  # the worst change of all, which a mean over the others would hide
        return Check(
            name="images without a finite NLL", setting="nll", baseline=0.0, run=float(lost), change=float(lost),
            relative=False, images=len(common),
        )  # fmt: skip
    per_token = _values(saved, run, common, lambda image: None if image.nll is None else image.nll / image.tokens)
    return _paired("NLL per token", "nll", per_token, worse=0, relative=False)


def _scores(run: SavedRun, saved: SavedRun, common: list[Id]) -> Iterator[Check]:
    """Yield the check of each score of single images that the baseline has."""
    known = {info.per_image: info for info in reversed(declared([]).values()) if info.per_image}
    for name in sorted({name for image in saved.images.values() for name in image.scores}):
        if run.protocols.get(name) != saved.protocols.get(name):
            yield Check(name=name, setting="scores", reason="not measured, or by another protocol")
            continue
        better = known[name].higher_is_better if name in known else None
        worse = {True: -1, False: 1, None: 0}[better]
        yield _paired(name, "scores", _values(saved, run, common, lambda image, name=name: image.scores.get(name)),
                      worse=worse)  # fmt: skip


def _distances(run: SavedRun, saved: SavedRun) -> Iterator[Check]:
    for key, (title, kind) in DISTANCES.items():
        if key not in saved.metrics:
            continue
        alike = ("n_images", f"{kind}_extractor", f"{kind}_reference")
        if key not in run.metrics or any(run.metrics.get(k) != saved.metrics.get(k) for k in alike):
            yield Check(name=title, setting="distances", reason="other N, extractor or reference, or too few images")
            continue
        base, ours = float(saved.metrics[key]), float(run.metrics[key])
        unit, ends = abs(base) or 1.0, (None, None)
        change = (ours - base) / unit
        if all(f"{key}_std" in side.metrics for side in (saved, run)):  # over subsets, so more than that of the mean
            half = 1.96 * math.hypot(*(float(side.metrics[f"{key}_std"]) for side in (saved, run))) / unit
            ends = (change - half, change + half)
        yield Check(name=title, setting="distances", baseline=base, run=ours, change=change, low=ends[0], high=ends[1],
                    images=int(saved.metrics["n_images"]))  # fmt: skip


def _speedup(run: SavedRun, saved: SavedRun) -> Check:
    about: dict[str, Any] = {"name": "speed-up over AR", "setting": "speedup"}
    first, second = saved.speedup, run.speedup
    if first is None or second is None:
        return Check(**about, reason="the run has none" if first else "the baseline has none")
    if reason := _elsewhere(run, saved):
        return Check(**about, reason=reason)
    if not (first.paired and second.paired):
        return Check(**about, reason=f"{'the run' if first.paired else 'the baseline'} and AR were not timed in turns")
    change, low, high = 1 - second.ratio / first.ratio, None, None
    if None not in (first.low, first.high, second.low, second.high):
        # the logarithms of both ratios are about normal, with half the interval as 1.96 standard errors
        half = math.hypot(*(math.log(one.high / one.low) / 2 for one in (first, second) if one.low and one.high))
        middle = math.log(second.ratio / first.ratio)
        low, high = 1 - math.exp(middle + half), 1 - math.exp(middle - half)
    return Check(**about, baseline=first.ratio, run=second.ratio, change=change, low=low, high=high,
                 images=min(first.images, second.images))  # fmt: skip


def _latency(run: SavedRun, saved: SavedRun) -> Check:
    about: dict[str, Any] = {"name": "latency, s", "setting": "latency"}
    if not run.timings or not saved.timings:
        return Check(**about, reason="no timings")
    if reason := _elsewhere(run, saved):
        return Check(**about, reason=reason)
    ratio, low, high = ratio_of_medians(run.timings, saved.timings)
    base, ours = (ratio_of_medians(side.timings, [(1.0, 1)])[0] for side in (saved, run))
    ends = (None, None) if low is None or high is None else (low - 1, high - 1)
    return Check(**about, baseline=base, run=ours, change=ratio - 1, low=ends[0], high=ends[1],
                 images=sum(images for _, images in run.timings))  # fmt: skip


def _elsewhere(run: SavedRun, saved: SavedRun) -> str:
    """Return why times of two runs do not compare; '' where they do."""
    for side, who in ((run, "the run"), (saved, "the baseline")):
        if side.disturbed:
            return f"{who} {side.disturbed}"
    if run.machine != saved.machine:
        names = [side.machine and f"{side.machine[0]}, {side.machine[1]} threads" for side in (saved, run)]
        return f"timed on {names[1]}, the baseline on {names[0]}"
    for key in ("batch_size", "refill", "dtype"):
        if run.identity.get(key) != saved.identity.get(key):
            return f"{key} is {run.identity.get(key)}, the baseline's {saved.identity.get(key)}"
    return ""


# ---- for readers


def gate_table(checks: list[Check], run: SavedRun, saved: SavedRun) -> Table:
    """Return the one table of what held and what did not."""
    header = ["held to the baseline", "bound", "baseline", "run", "worse by (95 %)", "verdict", "N"]
    notes = [f"Run {run.name}, baseline of {saved.name}.", verdict(checks)]
    notes += [f"{check.name}, {check.verdict}." for check in checks if check.reason]
    if lacking := len(saved.images.keys() - run.images.keys()):
        notes.append(
            f"{lacking} of the baseline's {len(saved.images)} images are not in the run; N counts what was held."
        )
    if any(check.undecided for check in checks):
        notes.append("held?: the interval reaches beyond the bound; more images would decide.")
    notes += [
        (
            "A bound is broken where the difference lies beyond it and its interval excludes no change. Worse: more passes, "
            "lower scores, longer times; an NLL that is lower is as far from the model's distribution as a higher one."
        )
    ]
    return Table("Held to a saved baseline", header, [_cells(check) for check in checks], notes)


def verdict(checks: list[Check]) -> str:
    """Return how many bounds held, were broken and could not be checked, in one sentence."""
    broken = [check.name for check in checks if check.broken]
    left = sum(bool(check.reason) for check in checks)
    unsure = sum(check.undecided for check in checks)
    words = [f"{len(checks) - len(broken) - left} bounds held{f' ({unsure} undecided)' * bool(unsure)}"]
    words.append(f"{len(broken)} broken")
    named = f" ({', '.join(broken)})" if broken else ""
    return f"{', '.join(words)}{named}, {left} not checked."


def _cells(check: Check) -> list[str]:
    percent = check.relative

    def text(value: float | None) -> str:
        if value is None:
            return ""
        value = round(value, 6) + 0.0  # no -0.0
        return f"{100 * value:+.1f} %" if percent else f"{value:+.4f}"

    bound = "" if check.bound is None else (f"{100 * check.bound:g} %" if percent else f"{check.bound:g}")
    interval = "" if check.low is None else f" [{text(check.low)}, {text(check.high)}]"
    sides = ["" if value is None else f"{value:.4g}" for value in (check.baseline, check.run)]
    short = "not checked" if check.reason else check.verdict
    return [check.name, bound, *sides, f"{text(check.change)}{interval}", short, str(check.images or "")]


def write_gate(checks: list[Check], run: SavedRun, saved: SavedRun, out: Path) -> str:
    """Write gate.md and gate.json into `out`; return the Markdown."""
    text = markdown(gate_table(checks, run, saved))
    lines = [
        {key: value for key, value in asdict(check).items() if value not in (None, "")}
        | {"held": not check.reason and not check.broken, "undecided": check.undecided, "broken": check.broken}
        for check in checks
    ]
    content = {"run": run.name, "baseline": saved.name, "broken": any(c.broken for c in checks), "checks": lines}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "gate.md", text.encode())
    write_atomically(out / "gate.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return text


def report_broken(checks: list[Check]) -> None:
    """Raise UserError, which ends the command with exit code 1, if a bound is broken, or none could be checked."""
    if all(check.reason for check in checks):
        raise UserError(
            f"none of the {len(checks)} bounds could be checked, so nothing is known of this run: "
            f"{'; '.join(f'{check.name}: {check.reason}' for check in checks)}."
        )
    if broken := [check for check in checks if check.broken]:
        settings = ", ".join(dict.fromkeys(f"bounds.{check.setting}" for check in broken))
        raise UserError(
            f"{len(broken)} of {len(checks)} bounds are broken: {', '.join(check.name for check in broken)}; if "
            f"that is intended, raise {settings}, or save a new baseline."
        )


# ---- the stage


def save(cfg: DictConfig) -> Path:
    """Save the run of run_dir as a baseline file; return the run folder."""
    if cfg.run_dir is None:
        raise UserError("save_baseline=FILE saves one run: give its folder, run_dir=FOLDER.")
    path, file = RunFolder.open(cfg.run_dir).path, Path(cfg.save_baseline)
    if file.is_dir():
        raise UserError(f"save_baseline={file} is a folder; give a file, e.g. {file / 'baseline.json'}.")
    check_writable(file.parent, "save_baseline")
    saved = _taken(path)
    write_baseline(saved, file)
    say(f"baseline of {len(saved.images)} images: {file}")
    return path


def gate(cfg: DictConfig) -> Path:
    """Hold the run of run_dir, or the one of runs_dir with the baseline's settings, to a file; return the folder written.

    Raises UserError if a bound is broken.
    """
    file = Path(cfg.against)
    saved = read_baseline(file)
    run = _taken(RunFolder.open(cfg.run_dir).path if cfg.run_dir is not None else _of_settings(cfg.runs_dir, saved))
    checks = hold(run, saved, cfg.bounds)
    out = Path(cfg.runs_dir) / "tables" / f"{run.name}-against-{file.stem}"
    show(write_gate(checks, run, saved, out), out / "gate.md", cfg.output)
    report_broken(checks)
    return out


def _taken(path: Path) -> SavedRun:
    run = read_run(path)
    others, _ = read_runs(with_baselines([path]))
    return take(run, others)


def _of_settings(runs_dir: str, saved: SavedRun) -> Path:
    """Return the run folder with the settings of a baseline."""
    for path in run_folders(runs_dir):
        with contextlib.suppress(*UNREADABLE):  # a damaged folder is not the one
            if same(RunFolder(path).identity, saved.identity):
                return path
    raise UserError(
        f"no run in runs_dir={runs_dir} has the settings of the baseline ({saved.name}); make it again, or name another run "
        "with run_dir=FOLDER."
    )
