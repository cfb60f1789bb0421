"""Pairwise comparison of runs: a shifted distribution is found, an equal one is not, and every N is of common prompts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from evaluation.metrics.features import save_npz
from evaluation.run_folder import RunFolder, run_folders
from evaluation.score import score
from sjd2.config import instantiate
from sjd2.errors import UserError
from sweeps.compare.group import compare_folders, stage
from sweeps.tables import figures
from sweeps.tables.table import make_tables
from sweeps.tables.table import stage as table_stage
from tests.helpers.compared_runs import PAPER, SCORED, N, make


def compared(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """Return the Markdown and the only group of compare.json."""
    text = compare_folders(run_folders(tmp_path / "runs"), tmp_path / "out")
    assert (tmp_path / "out" / "compare.md").read_text() == text
    (group,) = json.loads((tmp_path / "out" / "compare.json").read_text())
    return text, group


def test_a_shifted_run_is_found_and_an_equal_one_is_not(tmp_path: Path, metric: dict[str, Any]) -> None:
    make(tmp_path, "ar", seed=1, metric=metric)
    make(tmp_path, "sjd", seed=2, metric=metric)
    make(tmp_path, "sjd2", seed=3, shift=0.4, metric=metric, **PAPER)
    text, group = compared(tmp_path)
    equal, lossy = group["against_ar"]
    assert (equal["decoder"], equal["lossless"], lossy["decoder"], lossy["lossless"]) == ("sjd", True, "sjd2", False)
    assert group["comparisons"] == 2
    assert group["corrected_level"] == pytest.approx(0.995)
    for name in ("nll_per_token", "kid"):
        assert not equal[name]["differs"]
        assert equal[name]["low"] < 0 < equal[name]["high"]
        assert lossy[name]["differs"]
        assert lossy[name]["low"] > 0
        assert (equal[name]["prompts"], equal[name]["level"]) == (SCORED, 0.99)
    assert lossy["nll_per_token"]["mean"] == pytest.approx(0.4, abs=0.05)  # nats per token, not per image
    assert "0 of 1 lossless differ from AR; 1 of 1 lossy differ from AR (sjd2 rule=paper)." in text
    assert "| sjd | yes | 100 |" in text
    assert "| sjd2 rule=paper | **no** | 100 |" in text
    assert "99.5 %" in text
    assert "KID on features of six numbers." in text


def test_a_passes_difference_is_the_first_named_minus_the_second(tmp_path: Path) -> None:
    make(tmp_path, "ar", seed=1)
    fast, slow = make(tmp_path, "sjd2", seed=2, forwards=4), make(tmp_path, "scd", seed=3, forwards=7)
    text, group = compared(tmp_path)
    (pair,) = group["pairs"]
    assert (pair["run"], pair["minus"]) == (fast, slow)
    assert pair["passes"]["mean"] == pair["passes"]["low"] == pair["passes"]["high"] == -3
    assert pair["passes"]["level"] == 0.95
    assert pair["passes"]["p"] == 2.0 ** (1 - N)  # all of one sign
    assert pair["step_compression"]["mean"] == pytest.approx((16 / 4 + 16 / 5 - 16 / 7 - 16 / 8) / 2)
    assert "| sjd2 − scd | 24 | -3.00 [-3.00, -3.00] | &lt;0.001 | +1.46" in text


def test_different_n_use_the_prompts_of_both(tmp_path: Path) -> None:
    make(tmp_path, "ar", seed=1, ids=range(18))
    make(tmp_path, "scd", seed=2, ids=range(12))
    make(tmp_path, "sjd2", seed=3, ids=range(5, 24), forwards=9)
    make(tmp_path, "sjd", seed=4, ids=range(60, 65))
    text, group = compared(tmp_path)
    found = {row["label"]: row["nll_per_token"]["prompts"] for row in group["against_ar"]}
    assert found == {"scd": 12, "sjd2": 13}
    assert not any({"low", "p", "differs"} & row["nll_per_token"].keys() for row in group["against_ar"])
    assert "not tested, which needs 16 common prompts." in text
    assert "differ from AR" not in text
    assert "sjd2 − scd: not tested, which needs 16 common prompts." in text
    assert "| Δ NLL/token |" in text  # no column promises an interval
    assert "| difference |" in text
    assert [(pair["label"], pair["minus_label"], pair["passes"]["prompts"]) for pair in group["pairs"]] == [
        ("sjd2", "scd", 7)
    ]
    assert "Not compared: sjd: no AR run with the same weights shares two prompts." in text
    assert "Not compared: sjd − scd: fewer than two common prompts." in text


def test_missing_features_leave_kid_out(tmp_path: Path, metric: dict[str, Any]) -> None:
    make(tmp_path, "ar", seed=1, metric=metric)
    make(tmp_path, "sjd", seed=2, ids=range(SCORED))
    text, group = compared(tmp_path)
    (row,) = group["against_ar"]
    assert "kid" not in row
    assert "sjd-2 holds no features of six numbers" in row["kid_missing"]
    assert "Δ KID" not in text
    assert "No KID for sjd: sjd-2 holds no features" in text
    assert not row["nll_per_token"]["differs"]


def test_few_images_give_no_kid(tmp_path: Path, metric: dict[str, Any]) -> None:
    make(tmp_path, "ar", seed=1, metric=metric)
    make(tmp_path, "sjd", seed=2, ids=range(SCORED - 1), metric=metric)
    text, group = compared(tmp_path)
    assert "kid" not in group["against_ar"][0]
    assert "No KID for sjd: 99 common images are too few, a KID takes 100." in text


def test_table_and_comparison_give_one_kid(tmp_path: Path, metric: dict[str, Any]) -> None:
    runs = [
        RunFolder(tmp_path / "runs" / make(tmp_path, name, seed=s, metric=metric))
        for s, name in enumerate(("ar", "sjd"))
    ]
    scorer = instantiate(OmegaConf.create(metric))
    for run in runs:
        hashes = np.array([record["tokens_sha256"][:16] for record in run.records()])
        with np.load(run.path / "features-six.npz") as kept:
            save_npz(run.path / "features-six.npz", dict(kept) | {"tokens": hashes})
        score(run, {"fid": scorer})
    text = make_tables([run.path for run in runs], tmp_path / "tables")
    ar, sjd = csv.DictReader((tmp_path / "tables" / "table.csv").open())
    _, group = compared(tmp_path)
    assert group["against_ar"][0]["kid"]["mean"] == pytest.approx(float(sjd["kid"]) - float(ar["kid"]), abs=1e-12)
    assert "KID is the mean over random subsets (torchmetrics), here and in stage=compare." in text


def test_adapters_and_other_weights(tmp_path: Path) -> None:
    make(tmp_path, "ar", seed=1)
    make(tmp_path, "ar", seed=2, ids=range(12))
    make(tmp_path, "sjd", seed=3)
    make(tmp_path, "sjd2", seed=4, digest="tuned", adapter="lora")
    make(tmp_path, "scd", seed=5, digest="retrained")
    text, group = compared(tmp_path)
    labels = [row["decoder"] for row in group["against_ar"]]
    assert labels == ["ar", "sjd", "sjd2"]  # the second AR run is a control, scd has no AR run of its weights
    assert [row["same_weights"] for row in group["against_ar"]] == [True, True, False]
    assert {row["reference"] for row in group["against_ar"]} == {"ar-1"}
    assert "sjd2 †" in text
    assert [(pair["run"], pair["minus"]) for pair in group["pairs"]] == [("sjd2-4", "scd-5"), ("sjd2-4", "sjd-3")]
    assert "sjd − scd: the model weights differ." in text


def test_the_stages(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())
    runs = tmp_path / "runs"
    cfg = OmegaConf.create(
        {"runs_dir": str(runs), "run_dir": None, "against": None, "paper": None, "evaluation": {"metrics": {}}}
        | {"output": "auto"}
    )
    make(tmp_path, "sjd", seed=2)
    with pytest.raises(UserError, match="needs two runs"):
        stage(cfg)
    make(tmp_path, "ar", seed=1)
    make(tmp_path, "scd", seed=3)
    assert stage(cfg) == runs / "tables"
    assert "Against AR".lower() in capsys.readouterr().out
    assert {path.name for path in (runs / "tables").iterdir()} == {"compare.md", "compare.json"}
    assert table_stage(cfg) == runs / "tables" / "all"
    cfg.run_dir = str(runs / "sjd-2")
    assert table_stage(cfg) == runs / "tables" / "sjd-2"
    text = (runs / "tables" / "sjd-2" / "table.md").read_text()
    assert "| sjd |" in text
    assert "| scd |" not in text
    assert "published" in text
    with pytest.raises(UserError, match="takes either two runs"):
        stage(cfg)
