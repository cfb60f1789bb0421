"""Two run folders: equal ones are called equal, and what was changed in one of them is what the comparison names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from evaluation.run_folder import RunFolder
from evaluation.score import keep_scores
from sjd2.errors import UserError
from sweeps.compare.group import stage
from sweeps.compare.pair import compare_pair
from tests.helpers.cli import Cli
from tests.helpers.compared_runs import SCORED, N, make


def compared(tmp_path: Path, first: str, second: str) -> tuple[str, dict[str, Any]]:
    out = tmp_path / "out"
    text = compare_pair((tmp_path / "runs" / first, tmp_path / "runs" / second), out)
    assert (out / "two.md").read_text() == text
    return text, json.loads((out / "two.json").read_text())


def measures(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {measure["name"]: measure for measure in found["measures"]}


def test_a_copy_is_equal_in_everything(tmp_path: Path, metric: dict[str, Any]) -> None:
    name = make(tmp_path, "sjd", seed=2, metric=metric)
    shutil.copytree(tmp_path / "runs" / name, tmp_path / "runs" / "copy")
    text, found = compared(tmp_path, name, "copy")
    assert found["tokens"] == {"images": SCORED, "equal": SCORED, "first": None}
    assert not any(measure["differs"] for measure in found["measures"])
    assert all(measure["mean"] == 0 for measure in found["measures"])
    assert {"KID (six numbers)", "FID (six numbers)", "NLL per token"} <= measures(found).keys()
    assert found["settings"] == found["provenance"] == {}
    assert f"Tokens: equal in all {SCORED} common images." in text
    assert "Settings: equal." in text
    assert "Provenance: equal." in text


def test_one_other_token_is_found(tmp_path: Path) -> None:
    name = make(tmp_path, "sjd", seed=2)
    shutil.copytree(tmp_path / "runs" / name, tmp_path / "runs" / "other")
    other = RunFolder(tmp_path / "runs" / "other")
    lines = []
    for record in other.records():
        if record["id"][0] == 5:
            tokens = other.tokens(record)
            tokens[2] += 1
            record |= other.write_image((5, 0), np.zeros((8, 8, 3), np.uint8), tokens)
        lines.append(json.dumps(record) + "\n")
    (other.path / "samples.jsonl").write_text("".join(lines))
    text, found = compared(tmp_path, name, "other")
    assert found["tokens"] == {"images": N, "equal": N - 1, "first": [[5, 0], 2]}
    assert f"Tokens: different in 1 of {N} common images, first in image 00005_0 at token 2." in text


def test_what_differs_is_named_and_corrected(tmp_path: Path, metric: dict[str, Any]) -> None:
    first = make(tmp_path, "sjd", seed=2, metric=metric, window=8)
    second = make(tmp_path, "sjd", seed=3, metric=metric, window=16, shift=0.4, forwards=4)
    runs = [RunFolder(tmp_path / "runs" / name) for name in (first, second)]
    for k, run in enumerate(runs):
        keep_scores(run, {"alignment": {(i, 0): 1.0 - 0.5 * k * (i % 2) for i in range(N)}})
        run.launch({"hardware": f"machine {k}", "threads": 1, "packages": {"torch": f"2.{k}", "numpy": "2.0"}})
    text, found = compared(tmp_path, first, second)
    rows = measures(found)
    tests = found["tests"]
    assert found["settings"] == {"decoder.window": ["8", "16"]}
    assert found["provenance"]["packages.torch"] == [["2.0"], ["2.1"]]
    assert "packages.numpy" not in found["provenance"]
    assert rows["passes per image"]["mean"] == -4
    assert (rows["passes per image"]["a"], rows["passes per image"]["b"]) == (8.5, 4.5)
    assert rows["NLL per token"]["mean"] == pytest.approx(0.4, abs=0.05)
    assert rows["alignment"]["mean"] == pytest.approx(-0.25)
    for name in ("passes per image", "NLL per token", "alignment", "KID (six numbers)", "FID (six numbers)"):
        assert rows[name]["differs"], name
    assert f"(1 % over all {tests} tests" in text
    assert f"({100 * (1 - 0.01 / tests):.4g} %)" in text


def test_equal_distributions_do_not_differ(tmp_path: Path, metric: dict[str, Any]) -> None:
    _, found = compared(
        tmp_path, make(tmp_path, "sjd", seed=2, metric=metric), make(tmp_path, "scd", seed=3, metric=metric)
    )
    rows = measures(found)
    for name in ("NLL per token", "KID (six numbers)", "FID (six numbers)"):
        assert not rows[name]["differs"]
        assert rows[name]["low"] < 0 < rows[name]["high"]
    assert rows["NLL per token"]["low"] < rows["NLL per token"]["high"]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    first, second = make(tmp_path, "sjd", seed=2), make(tmp_path, "sjd", seed=3, ids=range(40, 45))
    text, found = compared(tmp_path, first, second)
    assert found["skipped"] == ["images: the runs have none in common"]
    assert "Not compared: images: the runs have none in common." in text
    third = make(tmp_path, "scd", seed=4, digest="retrained")
    config = OmegaConf.load(tmp_path / "runs" / third / "config.yaml")
    config.identity.model.size = "64x96"
    OmegaConf.save(config, tmp_path / "runs" / third / "config.yaml")
    for name, digest in ((first, "a"), (third, "b")):
        keep_scores(RunFolder(tmp_path / "runs" / name), {"clip": {(i, 0): float(i) for i in range(N)}})
        (tmp_path / "runs" / name / "metrics.json").write_text(json.dumps({"protocol": {"clip": digest}}))
    _, found = compared(tmp_path, first, third)
    assert "clip: not measured with the same protocol" in found["skipped"]
    assert "tokens: the models differ" in found["skipped"]  # images of another size
    assert any(reason.startswith("latency: not the same model weights") for reason in found["skipped"])


def test_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = tmp_path / "runs"
    first, second = make(tmp_path, "sjd", seed=2), make(tmp_path, "ar", seed=3)
    cfg = OmegaConf.create({"runs_dir": str(runs), "run_dir": str(runs / first), "against": str(runs / second)})
    cfg.evaluation, cfg.output = {"metrics": {}}, "auto"
    out = stage(cfg)
    assert out.parent == runs / "tables"
    assert out.name.startswith(f"{first}-{second}-")
    assert (out / "two.md").is_file()
    assert "passes per image" in capsys.readouterr().out
    for lonely in ({"run_dir": None}, {"against": None}):
        with pytest.raises(UserError, match="takes either two runs"):
            stage(OmegaConf.merge(cfg, lonely))
    with pytest.raises(UserError, match="are the same folder"):
        stage(OmegaConf.merge(cfg, {"against": cfg.run_dir}))


def test_against_belongs_to_compare(cli: Cli) -> None:
    assert cli("against=somewhere") == 1
    assert "needs stage=compare" in cli.err


def timed(tmp_path: Path, decoder: str, seed: int, batch: int, seconds: float = 0.8) -> str:
    """Make a run of 48 images whose batches took `seconds` ± 0.1 s, all images of one batch the same."""
    found = make(tmp_path, decoder, seed=seed, ids=range(48))
    run, lines = RunFolder(tmp_path / "runs" / found), []
    for record in run.records():
        group = record["id"][0] // batch
        took = seconds + 0.1 * np.random.default_rng([seed, group]).normal()
        record |= {"batch": group, "seconds": record["seconds"] | {"prefill": 0.0, "decode": took}}
        lines.append(json.dumps(record) + "\n")
    (run.path / "samples.jsonl").write_text("".join(lines))
    return found


@pytest.mark.full
def test_images_of_one_batch_are_one_timing(tmp_path: Path) -> None:
    """Taken for independent, 48 images of 16 batches would find differences where there are none."""
    differ = 0
    for trial in range(20):
        first, second = timed(tmp_path, "sjd", 100 + trial, 3), timed(tmp_path, "scd", 200 + trial, 3)
        _, found = compared(tmp_path, first, second)
        row = measures(found)["latency, s"]
        assert row["prompts"] == 16
        differ += row["differs"]
    assert differ <= 1
    slow = timed(tmp_path, "sjd2", 300, 3, 1.2)
    text, found = compared(tmp_path, first, slow)
    assert measures(found)["latency, s"]["differs"]
    assert "any change of the machine" in text
    _, found = compared(tmp_path, timed(tmp_path, "sjd2", 301, 2), slow)
    assert "latency: the images were batched differently" in found["skipped"]
    shared = [make(tmp_path, name, seed=400, refilled=8) for name in ("sjd", "scd")]
    _, found = compared(tmp_path, *shared)
    assert (
        "latency: the rows of a refilled batch share their passes, so there is no separate timing" in found["skipped"]
    )
    assert found["speedup"] > 0  # as in a table
    _, found = compared(tmp_path, timed(tmp_path, "sjd2", 302, 4), timed(tmp_path, "scd", 303, 4, 1.2))
    assert measures(found)["latency, s"]["prompts"] == 12  # too few to test: no p-value
    assert "differs" not in measures(found)["latency, s"]


def test_the_tests_that_could_not_be_made_count(tmp_path: Path) -> None:
    """The level printed is the one that was used, with features and without."""
    text, found = compared(tmp_path, make(tmp_path, "sjd", seed=2), make(tmp_path, "scd", seed=3))
    assert len(found["measures"]) == found["tests"] - 2
    assert f"({100 * (1 - 0.01 / found['tests']):.4g} %)" in text
    assert f"over all {found['tests']} tests" in text


def test_the_likelihood_is_of_one_model(tmp_path: Path) -> None:
    base = make(tmp_path, "sjd", seed=2)
    _, found = compared(tmp_path, base, make(tmp_path, "sjd2", seed=3, digest="tuned", adapter="lora"))
    assert "NLL per token" in measures(found)
    _, found = compared(tmp_path, base, make(tmp_path, "scd", seed=4, digest="retrained"))
    assert "NLL per token: the model weights differ" in found["skipped"]


def test_provenance_is_compared_whole(tmp_path: Path) -> None:
    first = make(tmp_path, "sjd", seed=2)
    shutil.copytree(tmp_path / "runs" / first, tmp_path / "elsewhere" / first)
    folders = (tmp_path / "runs" / first, tmp_path / "elsewhere" / first)
    for folder, last in zip(folders, "AB", strict=True):
        for commit in ("x", "y", "z", last):
            RunFolder(folder).launch({"git": commit})
    text = compare_pair(folders, tmp_path / "out")
    assert "Provenance: what differs" in text
    assert "x; y; z; and 1 more" in text
    assert f"A is {folders[0]}, B is {folders[1]}." in text  # the same name on both machines


def test_a_lost_token_file_costs_its_place_only(tmp_path: Path) -> None:
    first, second = make(tmp_path, "sjd", seed=2), make(tmp_path, "scd", seed=3)
    run = RunFolder(tmp_path / "runs" / second)
    records = run.records()
    records[3]["tokens_sha256"] = "other"
    (run.path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run.path / "tokens" / "00003_0.npy").unlink()
    text, found = compared(tmp_path, first, second)
    assert found["tokens"]["first"] is None
    assert f"Tokens: different in 1 of {N} common images." in text


def test_two_prompts_prove_nothing(tmp_path: Path) -> None:
    text, found = compared(
        tmp_path, make(tmp_path, "sjd", seed=2, ids=range(2)), make(tmp_path, "scd", seed=3, ids=range(2), forwards=4)
    )
    row = measures(found)["passes per image"]
    assert row["mean"] == -4
    assert not {"low", "high", "p", "differs"} & row.keys()
    assert "Measures: not tested, which needs 16 common prompts." in text
    assert "| passes per image | 8.50 | 4.50 | -4.00 |  | 2 |" in text
