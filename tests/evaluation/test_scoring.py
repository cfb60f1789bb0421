"""One scoring reads a run folder once, and a metric of somebody's own reaches every table by what it declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import PngImagePlugin

from evaluation import run_folder
from evaluation.declared import declared
from evaluation.run_folder import Id, Record, RunFolder, Snapshot, record_id
from evaluation.score import INFO_FILE, Metric, MetricInfo, Scores, measure, read_scores, score
from harness.job import mirror
from harness.tracking import NoTracker
from sjd2.config import instantiate
from sjd2.files import ROOT
from sjd2.models.tiny import scenes
from sweeps.compare.pair import compare_pair
from sweeps.tables import figures
from tests.helpers.cli import Cli
from tests.helpers.runs import a_run, pixels
from tests.helpers.table_runs import ar, cells, make, table


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often samples.jsonl is parsed and an image decoded, by run folder and kind: {"toy-ar-... parse": 2}."""
    found: Counter[str] = Counter()
    read_lines, decode = run_folder.read_lines, PngImagePlugin.PngImageFile.load_prepare

    def parsing(path: Path) -> tuple[list, int]:
        found[f"{path.parent.name} parse"] += path.name.startswith("samples")
        return read_lines(path)

    def decoding(image: PngImagePlugin.PngImageFile) -> None:
        place = Path(image.fp.name)
        found[f"{place.parent.parent.name} decode"] += place.parent.name == "images"
        decode(image)

    monkeypatch.setattr(run_folder, "read_lines", parsing)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", decoding)
    return found


def test_a_scoring_parses_once_and_decodes_every_image_once(tmp_path: Path, reads: Counter[str]) -> None:
    drawn = scenes.held_out(6, 555)
    run = a_run(tmp_path / "run", scenes.render(drawn, 555), [scenes.caption(scene) for scene in drawn])
    cfg = OmegaConf.create({"device": "cpu", "evaluation": OmegaConf.load(ROOT / "conf" / "evaluation" / "tiny.yaml")})
    metrics = {name: instantiate(node) for name, node in cfg.evaluation.metrics.items()}
    reads.clear()
    first = score(run, metrics)
    assert {"fid", "clip_score", "alignment", "step_compression"} <= first.keys()
    assert +reads == {"run parse": 1, "run decode": 6}
    reads.clear()
    assert score(run, {"fid": metrics["fid"]})["fid"] == first["fid"]
    assert +reads == {"run parse": 1}  # its features are kept


def test_a_run_and_its_baseline_are_parsed_few_times(tmp_path: Path, cli: Cli, reads: Counter[str]) -> None:
    assert cli("decoder=sjd", "limit=4") == 0, cli.err
    # once after sampling for plots, scoring and tracker, once for the table
    assert reads[f"{cli.run('sjd').path.name} parse"] == 2
    assert reads[f"{cli.run('ar').path.name} parse"] == 2


def test_batches_are_each_metric_s_own(tmp_path: Path) -> None:
    class Sizes(Metric):
        numbers = (MetricInfo(name="n"),)
        protocol = "images."

        def __init__(self, wanted: slice, batch_size: int) -> None:
            self.wanted, self.batch_size = wanted, batch_size

        def start(self, run: Snapshot) -> Sequence[Record]:
            self.seen: list[list[Id]] = []
            return run.records[self.wanted]

        def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
            for image, record in zip(images, records, strict=True):
                assert np.array_equal(image, expected[record["id"][0]])
            self.seen.append([record_id(record) for record in records])

        def compute(self, run: Snapshot) -> Scores:
            return Scores({"n": sum(map(len, self.seen))})

    expected = pixels(5)
    metrics = {"all": Sizes(slice(None), 2), "last": Sizes(slice(3, None), 4), "none": Sizes(slice(0), 4)}
    found = measure(Snapshot(a_run(tmp_path / "run", expected)), metrics)
    assert [scores.values["n"] for scores in found.values()] == [5, 2, 0]
    assert metrics["all"].seen == [[(0, 0), (1, 0)], [(2, 0), (3, 0)], [(4, 0)]]
    assert metrics["last"].seen == [[(3, 0), (4, 0)]]


class Brightness(Metric):
    """A metric from somebody's own package: the example of evaluation/score.py."""

    numbers = (
        MetricInfo(name="brightness", title="brightness", digits=1, higher_is_better=True, per_image="brightness"),
    )
    protocol = "brightness: mean over n_images of the mean pixel value."

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        self.values: dict[Id, float] = {}
        return run.records or None

    def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
        for image, record in zip(images, records, strict=True):
            self.values[record_id(record)] = float(image.mean())

    def compute(self, run: Snapshot) -> Scores:
        return Scores({"brightness": fmean(self.values.values())}, {"brightness": self.values})


def test_a_metric_of_somebody_s_own_reaches_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())
    base, ours = ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd")
    for i in range(4):
        RunFolder(ours).write_image((i, 0), np.full((8, 8, 3), 20 * i + 4, np.uint8), np.zeros(1))
    for path in (base, ours):
        score(RunFolder(path), {"glow": Brightness()})
    assert read_scores(RunFolder(ours))[(3, 0)] == {"brightness": 64.0}
    assert "brightness" not in declared([])  # the class is unknown to whoever makes the table
    text, rows = table(tmp_path, base, ours)
    assert cells(text, "sjd")["brightness ↑"] == "34.0"
    assert float(rows[1]["brightness"]) == 34.0
    assert float(rows[1]["brightness_difference"]) == 4.0
    assert "| difference to AR (95 %) | images in both | brightness |" in text
    compared = compare_pair((base, ours), tmp_path / "pair")
    assert "| brightness | 30.0000 | 34.0000 |" in compared
    changed = RunFolder(ours).metrics | {"protocol": {"glow": "another one."}}
    (ours / "metrics.json").write_text(run_folder.json.dumps(changed))
    compared = compare_pair((base, ours), tmp_path / "pair")
    assert "34.0000" not in compared
    assert "same protocol" in compared


def test_the_tracker_gets_no_distance_of_few_images(tmp_path: Path) -> None:
    class Kept(NoTracker):
        def summary(self, values: Mapping[str, Any]) -> None:
            self.values = values

    tracker, run = Kept(), a_run(tmp_path, pixels(2), seed=0)
    numbers = {"n_images": 2, "fid": 9.0, "fid_warning": "few", "kid": 0.1, "kid_std": 0.1, "clip_score": 30.0}
    numbers["protocol"] = {"fid": "fid: Frechet distance in float64 on 64 features of a net"}
    mirror(Snapshot(run), numbers, tracker)
    assert tracker.values == {"n_images": 2, "clip_score": 30.0}


def test_declarations_stay_as_long_as_the_values(tmp_path: Path) -> None:
    run = a_run(tmp_path, pixels(2))
    score(run, {"glow": Brightness()})

    class Other(Brightness):
        numbers = (MetricInfo(name="other"),)

        def compute(self, run: Snapshot) -> Scores:
            return Scores({"other": 1})

    score(run, {"other": Other()})
    assert {"brightness", "other"} <= declared([run]).keys()
    assert declared([run])["brightness"] == Brightness.numbers[0]
    a_run(tmp_path, pixels(3), launches=())  # values of two images go, and what was declared of them
    score(run, {"other": Other()})
    assert "brightness" not in declared([run])
    (tmp_path / INFO_FILE).unlink()  # a folder from before there was such a file
    assert "other" not in declared([run])
    assert {"fid", "clip_score", "geneval_overall", "image_reward"} <= declared([run]).keys()
