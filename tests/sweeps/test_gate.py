"""A run held to a saved baseline: what must hold holds, each kind of regression breaks its own bound, and only that."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from evaluation.run_folder import RunFolder
from evaluation.score import keep_scores
from harness.settings import BOUNDS
from sjd2.errors import UserError
from sweeps.compare.gate import Check, gate_table, hold, report_broken
from sweeps.compare.group import stage
from sweeps.compare.saved import SavedRun, read_baseline, take, write_baseline
from sweeps.runs import read_run
from sweeps.speedup import SpeedUp
from tests.helpers.cli import Cli
from tests.helpers.compared_runs import N, make

LIMITS: dict[str, float | None] = {
    "tokens": 0, "passes": 0.02, "nll": 0.02, "scores": 0.02, "distances": 0.05, "speedup": 0.1, "latency": 0.5,
}  # fmt: skip


def taken(path: Path) -> SavedRun:
    return take(read_run(path), [])


def saved(tmp_path: Path, name: str) -> SavedRun:
    """Return a run's baseline as it comes back from its file."""
    write_baseline(taken(tmp_path / "runs" / name), tmp_path / "baseline.json")
    return read_baseline(tmp_path / "baseline.json")


def held(tmp_path: Path, run: str, baseline: str, **bounds: float | None) -> dict[str, Check]:
    checks = hold(taken(tmp_path / "runs" / run), saved(tmp_path, baseline), LIMITS | bounds)
    return {check.name: check for check in checks}


def changed(path: Path, change: Any) -> None:
    """Rewrite the records of a run."""
    run = RunFolder(path)
    lines = [json.dumps(change(record)) + "\n" for record in run.records()]
    (path / "samples.jsonl").write_text("".join(lines))


def scored(path: Path, value: float) -> None:
    keep_scores(RunFolder(path), {"clip": {(i, 0): value + 0.1 * (i % 3) for i in range(N)}})


def copy(tmp_path: Path, name: str) -> Path:
    shutil.rmtree(tmp_path / "runs" / "copy", ignore_errors=True)
    return shutil.copytree(tmp_path / "runs" / name, tmp_path / "runs" / "copy")


def broken(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.broken]


def test_a_copy_holds_and_each_regression_breaks_its_own_bound(tmp_path: Path) -> None:
    name = make(tmp_path, "sjd", seed=2)
    scored(tmp_path / "runs" / name, 30.0)
    checks = held(tmp_path, copy(tmp_path, name).name, name)
    assert broken(checks) == []
    assert not any(checks[key].reason for key in ("images with other tokens", "passes per image", "clip", "latency, s"))
    report_broken(list(checks.values()))

    def nats(record: dict) -> dict:
        return record | {"nll": record["nll"] - 0.05 * record["tokens"]}

    def slow(record: dict) -> dict:
        return record | {"seconds": record["seconds"] | {"decode": 2.0}}

    cases = {
        "passes per image": lambda record: record | {"forwards": record["forwards"] + 1},
        "NLL per token": nats,  # lower is another distribution too
        "latency, s": slow,
        "images with other tokens": lambda r: r | {"tokens_sha256": "x" if r["id"][0] == 3 else r["tokens_sha256"]},
    }
    for bound, change in cases.items():
        path = copy(tmp_path, name)
        changed(path, change)
        checks = held(tmp_path, "copy", name)
        assert broken(checks) == [bound]
        with pytest.raises(UserError, match=f"1 of {len(checks)} bounds are broken: {bound}; .* raise bounds"):
            report_broken(list(checks.values()))
    assert broken(held(tmp_path, "copy", name, **dict.fromkeys(BOUNDS))) == []
    copy(tmp_path, name)
    scored(tmp_path / "runs" / "copy", 29.0)
    assert broken(held(tmp_path, "copy", name)) == ["clip"]
    scored(tmp_path / "runs" / "copy", 31.0)  # better
    assert broken(held(tmp_path, "copy", name)) == []


def test_images_without_a_finite_likelihood_are_broken(tmp_path: Path) -> None:
    name = make(tmp_path, "sjd", seed=2)
    changed(copy(tmp_path, name), lambda r: {k: v for k, v in r.items() if k != "nll" or r["id"][0] != 3})
    assert broken(held(tmp_path, "copy", name)) == ["images without a finite NLL"]


def test_few_prompts_prove_nothing_and_a_gate_that_holds_nothing_is_no_success(tmp_path: Path) -> None:
    name = make(tmp_path, "sjd", seed=2, ids=range(5))
    changed(copy(tmp_path, name), lambda record: record | {"forwards": record["forwards"] + 1})
    checks = held(tmp_path, "copy", name)
    assert checks["passes per image"].reason == "fewer than 6 common prompts have it"
    report_broken(list(checks.values()))
    with pytest.raises(UserError, match=r"none of the 5 bounds could be checked.*per image: fewer than 6 common"):
        report_broken(list(held(tmp_path, "copy", name, **dict.fromkeys(BOUNDS)).values()))
    larger = make(tmp_path, "scd", seed=2)
    few = taken(tmp_path / "runs" / make(tmp_path, "scd", seed=4, ids=range(8)))
    base = saved(tmp_path, larger)
    notes = gate_table(hold(few, base, LIMITS), few, base).notes
    assert f"{N - 8} of the baseline's {N} images are not in the run; N counts what was held." in notes


def test_a_speed_up_that_was_not_timed_in_turns_is_not_held(tmp_path: Path) -> None:
    name = make(tmp_path, "sjd", seed=2)
    fast = SpeedUp(ratio=4.0, low=3.9, high=4.1, images=N, timings=N, paired=True)
    base = replace(saved(tmp_path, name), speedup=fast)

    def check(**change: Any) -> Check:
        run = replace(taken(tmp_path / "runs" / name), speedup=replace(fast, **change))
        (found,) = [check for check in hold(run, base, LIMITS) if check.setting == "speedup"]
        return found

    slow = check(ratio=2.0, low=1.9, high=2.1)
    assert slow.broken
    assert slow.change == pytest.approx(0.5)
    # the logarithms' errors add up in squares
    half = math.hypot(math.log(4.1 / 3.9), math.log(2.1 / 1.9)) / 2
    assert (slow.low, slow.high) == pytest.approx((1 - 0.5 * math.exp(half), 1 - 0.5 * math.exp(-half)))
    assert not check(ratio=4.4, low=4.3, high=4.5).broken
    assert check(ratio=2.0, paired=False).reason == "the run and AR were not timed in turns"


def test_noise_and_a_small_proven_change_hold(tmp_path: Path) -> None:
    name = make(tmp_path, "sjd", seed=2)
    path = copy(tmp_path, name)
    rng = np.random.default_rng(0)
    changed(path, lambda record: record | {"nll": record["nll"] + rng.normal(0, 8)})  # 0.1 nats per token of the mean
    check = held(tmp_path, "copy", name, nll=0.001)["NLL per token"]
    assert check.change > 0.001
    assert check.low < 0 < check.high
    assert not check.broken
    assert check.verdict == "held?"
    changed(path, lambda record: record | {"forwards": record["forwards"] + 0.01})
    check = held(tmp_path, "copy", name)["passes per image"]
    assert 0 < check.low <= check.change < 0.02
    assert not check.broken


def test_what_is_not_comparable_is_reported_and_not_checked(tmp_path: Path) -> None:
    name, other = make(tmp_path, "sjd", seed=2), make(tmp_path, "scd", seed=3, digest="tuned")
    run = RunFolder(copy(tmp_path, name))
    run.close_launch(0, {"hardware": "another machine"})
    changed(run.path, lambda record: record | {"tokens_sha256": "x", "seconds": record["seconds"] | {"decode": 99.0}})
    checks = held(tmp_path, "copy", name)
    assert broken(checks) == []
    assert checks["latency, s"].reason == "timed on another machine, 1 threads, the baseline on x, 1 threads"
    assert "made on another machine, the baseline on x" in checks["images with other tokens"].reason
    checks = held(tmp_path, other, name)
    assert checks["images with other tokens"].reason.startswith(
        "other settings (decoder.name: sjd there, scd asked for"
    )
    assert checks["NLL per token"].reason == "other weights"
    assert not checks["passes per image"].reason
    assert checks["speed-up over AR"].reason == "the baseline has none"


def test_distances_are_held_at_equal_n(tmp_path: Path) -> None:
    name = make(tmp_path, "sjd", seed=2)
    scores = {"n_images": 200, "kid": 0.01, "fid_extractor": "six", "fid_reference": "r", "protocol": {}}
    (tmp_path / "runs" / name / "metrics.json").write_text(json.dumps(scores))
    path = copy(tmp_path, name)
    few = {"n_images": 150}
    for change, verdict in (({"kid": 0.0104}, "held"), ({"kid": 0.011}, "**broken**"), (few, "not checked")):
        (path / "metrics.json").write_text(json.dumps(scores | change))
        assert held(tmp_path, "copy", name)["KID"].verdict.startswith(verdict)
    cmmd = {"n_images": 60, "cmmd": 0.5, "cmmd_extractor": "c", "cmmd_reference": "r", "protocol": {}}
    (tmp_path / "runs" / name / "metrics.json").write_text(
        json.dumps(scores | cmmd | {"n_images": 200, "kid_std": 0.001})
    )
    changes = {"cmmd": 0.6, "kid": 0.0104, "kid_std": 0.001}
    (path / "metrics.json").write_text(json.dumps(scores | cmmd | {"n_images": 200} | changes))
    checks = held(tmp_path, "copy", name, distances=0.01)
    assert checks["CMMD"].broken
    assert checks["KID"].verdict == "held?"  # well within its spread over subsets
    assert checks["KID"].low == pytest.approx(0.04 - 1.96 * 2**0.5 * 0.1)


def test_other_prompts_and_files_that_are_none(tmp_path: Path) -> None:
    run, other = make(tmp_path, "sjd", seed=2), make(tmp_path, "scd", seed=3, ids=range(40, 45))
    with pytest.raises(UserError, match="no image of the same prompts in common"):
        held(tmp_path, run, other)
    saved(tmp_path, run)

    def damaged(run: str, images: list[dict] | None = None, **change: Any) -> str:
        content = json.loads((tmp_path / "baseline.json").read_text())
        whole = [content["images"][0] | image for image in images or [{}]]
        return json.dumps(content | change | {"images": whole})

    for content, message in (
        ("{", "is no baseline file"), ("[]", "is no baseline file"), ('{"sjd2_baseline": 0}', "another release"),
        ('{"sjd2_baseline": 1}', "is no baseline file"),
        (damaged(run, identity={}), "is no baseline file .*prompts"), (damaged(run, identity=3), "is no baseline file"),
        (damaged(run, metrics=[]), "is no baseline file"), (damaged(run, timings=[["x", 1]]), "is no baseline file"),
        (damaged(run, images=[{"forwards": "x"}]), "is no baseline file"),
        (damaged(run, images=[{"tokens": 0}]), "no baseline file .an image has no tokens"),
    ):  # fmt: skip
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_baseline(tmp_path / "wrong.json")
    with pytest.raises(UserError, match="neither a run folder nor a baseline file"):
        read_baseline(tmp_path / "missing.json")


def test_the_commands(cli: Cli, tmp_path: Path) -> None:
    run, file = tmp_path / "runs" / make(tmp_path, "scd", seed=2), cli.runs_dir / "ci" / "baseline.json"
    assert cli("stage=compare", f"run_dir={run}", f"save_baseline={file}") == 0, cli.err
    assert f"baseline of {N} images" in cli.out
    (cli.runs_dir / "a-damaged-neighbour").mkdir()
    (cli.runs_dir / "a-damaged-neighbour" / "config.yaml").write_text("identity: [1")
    (cli.runs_dir / "a-damaged-neighbour" / "samples.jsonl").write_text("{}\n")
    assert cli("stage=compare", f"against={file}", "output=json") == 0, cli.err  # the run of the same settings
    assert not json.loads(cli.out)["broken"]
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["forwards"] -= 1
    file.write_text(json.dumps(content))
    assert cli("stage=compare", f"run_dir={run}", f"against={file}") == 1
    assert "| passes per image | 2 % |" in cli.out
    assert "| **broken** |" in cli.out
    assert "bounds are broken: passes per image" in cli.err
    for arguments, message in (
        (("against=/nope.json", "bounds.passes=nan"), "bounds.passes must be 0 or more, got nan"),
        (("against=/nope.json", "bounds.nll=inf"), "bounds.nll=inf holds nothing; write bounds.nll=null"),
    ):
        assert cli("stage=compare", *arguments) == 1
        assert message in cli.err


def test_wrong_settings_are_one_sentence(tmp_path: Path) -> None:
    name = make(tmp_path, "scd", seed=2)
    saved(tmp_path, name)
    cfg = {"runs_dir": str(tmp_path / "empty"), "run_dir": None, "against": None, "bounds": LIMITS, "output": "auto"}
    for change, message in (
        ({"save_baseline": "b.json"}, "give its folder"),
        (
            {"save_baseline": "/proc/x/b.json", "run_dir": str(tmp_path / "runs" / name)},
            "save_baseline=.* cannot be written",
        ),
        ({"save_baseline": str(tmp_path), "run_dir": str(tmp_path / "runs" / name)}, "is a folder"),
        ({"against": str(tmp_path / "baseline.json")}, "no run in runs_dir=.* has the settings of the baseline"),
    ):
        with pytest.raises(UserError, match=message):
            stage(OmegaConf.create(cfg | change))
