"""What other benchmarks' scorers are given: GenEval 2's json, DPG-Bench's grids, T2I-CompBench's folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics.exports import CompBenchExport, DpgExport, Export, GenEval2Export
from evaluation.prompt_sets import CompBench, GenEval2Prompts
from evaluation.run_folder import RunFolder
from evaluation.score import score
from sjd2.errors import UserError
from tests.helpers.runs import a_run


def exported(
    tmp_path: Path, export: Export, facts: list[dict], ids: list[list[int]], prompts: list[str], side: tuple = (4, 4)
) -> RunFolder:
    """Score a run whose image i is grey, of value 10 i."""
    images = [np.full((*side, 3), 10 * i, np.uint8) for i in range(len(ids))]
    run = a_run(tmp_path / "run", images, [prompts[p] for p, _ in ids], id=ids, seed=[100 + i for i in range(len(ids))])
    lines = [json.dumps({"prompt": "-", "metadata": fact}) + "\n" for fact in facts]
    (run.path / "prompts.jsonl").write_text("".join(lines))
    assert set(score(run, {export.name: export})) == {"n_images", "protocol"}
    return run


def test_geneval2_is_one_json_of_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = [{"vqa_list": []}, {"vqa_list": []}]
    run = exported(tmp_path, GenEval2Export(), facts, [[0, 0], [1, 0], [0, 1]], ["two cats", "a dog"])
    paths = json.loads((run.path / "geneval2" / "images.json").read_text())
    assert {prompt: Path(path).name for prompt, path in paths.items()} == {
        "two cats": "00000_0.png",
        "a dog": "00001_0.png",
    }
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in paths.values())
    assert "python evaluation.py --benchmark_data geneval2_data.jsonl --image_filepath_data" in caplog.text
    assert "the first of each is exported" in caplog.text


def test_dpg_is_a_grid_of_four_in_the_order_of_its_crops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = [[0, 0], [1, 0], [0, 1], [0, 2], [0, 3]]  # the second prompt has one image only
    run = exported(tmp_path, DpgExport(), [{"item_id": "COCOval2014_1"}, {"item_id": "x"}], ids, ["a", "b"])
    with Image.open(run.path / "dpg" / "COCOval2014_1.png") as grid:
        assert grid.size == (8, 8)
        # resolution 4: (0, 0), (4, 0), (0, 4), (4, 4)
        crops = [grid.crop((x, y, x + 4, y + 4)).getextrema()[0] for y in (0, 4) for x in (0, 4)]
    assert crops == [(0, 0), (20, 20), (30, 30), (40, 40)]
    assert [file.name for file in (run.path / "dpg").iterdir()] == ["COCOval2014_1.png"]
    assert json.loads((run.path / "dpg-seeds.json").read_text()) == {"COCOval2014_1": [100, 102, 103, 104]}
    assert "--resolution 4 --pic-num 4 --vqa-model mplug" in caplog.text
    assert "1 prompts lack some of their 4 images" in caplog.text


def test_dpg_takes_square_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cuts its grids into squares"):
        exported(tmp_path, DpgExport(), [{"item_id": "a"}], [[0, i] for i in range(4)], ["a"], side=(4, 6))


def test_compbench_names_files_after_their_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = [{"category": name} for name in ("color", "complex", "color")]
    ids = [[0, 0], [0, 1], [1, 0], [2, 0]]
    run = exported(tmp_path, CompBenchExport(), facts, ids, ["a green bench", "a/b_c", "a blue bowl"])
    folder = run.path / "t2i_compbench"
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    assert names == [
        "color/samples/a blue bowl_000002.png", "color/samples/a green bench_000000.png",
        "color/samples/a green bench_000001.png", "complex/samples/a b c_000000.png",
    ]  # fmt: skip
    (folder / "color" / "samples" / "a blue bowl_000001.png").write_bytes(b"")  # its number before the run grew
    score(run, {"t2i_compbench": CompBenchExport()})
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png")) == names
    assert "python BLIPvqa_eval/BLIP_vqa.py --out_dir" in caplog.text
    assert "python 3_in_1_eval/3_in_1.py --outpath" in caplog.text


def test_prompts_of_another_set_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = exported(tmp_path, DpgExport(), [{"tag": "counting"}], [[0, 0]], ["a"])
    assert not (run.path / "dpg").exists()
    assert "prompts=dpg prompts.path=FOLDER" in caplog.text


def test_the_prompt_sets(tmp_path: Path) -> None:
    file = tmp_path / "geneval2_data.jsonl"
    file.write_text(json.dumps({"prompt": "two cats", "vqa_list": [], "atom_count": 2}) + "\n")
    (entry,) = GenEval2Prompts(name="geneval2", path=str(file)).read()
    assert entry == ("two cats", {"prompt": "two cats", "vqa_list": [], "atom_count": 2})
    file.write_text(json.dumps({"prompt": "two cats", "tag": "counting"}) + "\n")
    with pytest.raises(UserError, match="entry 1 has no 'vqa_list'"):
        GenEval2Prompts(name="geneval2", path=str(file)).read()
    (tmp_path / "color_val.txt").write_text("a green bench\ta bench\na red cup\n\n")
    (tmp_path / "shape_val.txt").write_text("a round cup\n")
    (tmp_path / "color_train.txt").write_text("another\n")
    prompts = CompBench(name="t2i_compbench", path=str(tmp_path))
    assert [(text, facts["category"]) for text, facts in prompts.read()] == [
        ("a green bench", "color"), ("a red cup", "color"), ("a round cup", "shape"),
    ]  # fmt: skip
    assert CompBench(name="t2i_compbench", path=str(tmp_path), category="shape").texts == ["a round cup"]
    with pytest.raises(UserError, match=r"unknown prompts.category 'colour', did you mean 'color'"):
        CompBench(name="t2i_compbench", path=str(tmp_path), category="colour").read()
    with pytest.raises(UserError, match=r"has no <category>_val\.txt"):
        CompBench(name="t2i_compbench", path=str(file)).read()
