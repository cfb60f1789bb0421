"""Prompt sets: which caption of an image, in which order, what is known of a prompt, and what wrong files say."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from evaluation.prompt_sets import Coco, DpgBench, PartiPrompts, choose_captions
from evaluation.prompts import Prompts, metadata_of
from evaluation.run_folder import RunFolder
from sjd2.config import instantiate
from sjd2.errors import UserError
from sjd2.files import ROOT
from tests.helpers.cli import Cli

# (image id, captions); ids are not in the file's order, and captions of different images lie between each other
IMAGES = {30: ["aa", "bbbb", "cccc"], 10: ["ddd", "e "], 20: ["f", "gg", "hhh"], 40: ["iiiii", "j", "kkkkkk\n"]}
INSTANCES = {"images": [], "annotations": [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1]}]}


def annotations(images: dict[int, list[str]] = IMAGES) -> dict[str, Any]:
    """Write COCO's layout: images by falling id, first all first captions, then all second ones."""
    listed = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 4, "width": 5} for i in sorted(images, reverse=True)]
    rows = [(image, text) for k in range(3) for image, own in images.items() for text in own[k : k + 1]]
    captions = [{"image_id": image, "id": 100 + n, "caption": text} for n, (image, text) in enumerate(rows)]
    return {"info": {}, "images": listed, "annotations": captions}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    path = tmp_path / "coco" / "annotations" / "captions_val2017.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(annotations()))
    return path


# ---- COCO: the caption


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("first", ["ddd", "f", "aa", "iiiii"]),
        ("longest", ["ddd", "hhh", "bbbb", "kkkkkk\n"]),  # of equal ones the first; the newline counts
        # records: ddd (first caption); hhh only equals it; bbbb (second); iiiii, then kkkkkk\n (third)
        ("sjd", ["ddd", "f", "bbbb", "kkkkkk\n"]),
    ],
)
def test_captions_by_hand(coco: Path, caption: str, expected: list[str]) -> None:
    assert Coco(name="coco2017", path=str(coco), caption=caption).texts == expected


def test_sjd_takes_the_place_of_the_longest_caption_met_so_far() -> None:
    draw = random.Random(0)
    for _ in range(200):
        images = [["x" * draw.randint(1, 30) for _ in range(3)] for _ in range(12)]
        met: list[tuple[int, int]] = []
        expected = []
        for own in images:
            met += [(len(text), place) for place, text in enumerate(own)]
            longest = max(length for length, _ in met)
            expected.append(next(place for length, place in met if length == longest))
        assert choose_captions(images, "sjd") == expected
        assert expected != choose_captions(images, "longest")  # were it reset per image
        flat = [len(text) for own in images for text in own]
        last = flat.index(max(flat)) // 3
        assert len(set(expected[last:])) == 1  # nothing is longer any more


def test_sjd_may_ask_for_a_caption_that_an_image_lacks(coco: Path) -> None:
    coco.write_text(json.dumps(annotations({1: ["a", "bb"], 2: ["c"]})))
    with pytest.raises(UserError, match=r"image 2 of .* has 1 captions, .* number 2; take prompts.caption=longest"):
        _ = Coco(name="coco2017", path=str(coco), caption="sjd").texts
    assert Coco(name="coco2017", path=str(coco)).texts == ["bb", "c"]


def test_images_by_id_or_as_the_captions_name_them(coco: Path) -> None:
    by_id = Coco(name="coco2017", path=str(coco), caption="sjd")
    by_file = Coco(name="coco2017", path=str(coco), caption="sjd", order="annotations")
    assert [facts["image_id"] for facts in by_id.metadata] == [10, 20, 30, 40]
    assert by_id.metadata is by_id.metadata  # looked up for each of maybe 100,000 images
    assert [facts["image_id"] for facts in by_file.metadata] == [30, 10, 20, 40]
    assert sorted(by_id.texts) == sorted(by_file.texts)  # the order changes no choice
    assert by_id.metadata[2] == {"image_id": 30, "caption_id": 104, "file_name": "000000000030.jpg"}
    assert by_id.digest != by_file.digest


def test_images_without_captions_are_no_prompts(coco: Path) -> None:
    content = annotations()
    content["images"].append({"id": 5, "file_name": "5.jpg"})
    coco.write_text(json.dumps(content))
    assert len(Coco(name="coco2017", path=str(coco)).texts) == 4


def test_coco_is_found_in_its_folders(coco: Path) -> None:
    texts = Coco(name="coco2017", path=str(coco)).texts
    for folder in (coco.parent, coco.parent.parent):
        assert Coco(name="coco2017", path=str(folder)).texts == texts
    with pytest.raises(UserError, match=r"neither captions_val2014.json nor annotations/captions_val2014.json"):
        _ = Coco(name="coco2014", path=str(coco.parent), split="val2014").texts


# ---- the others


PARTI = [["bond", "Abstract", "Basic", "a note"], ['the word "START" ', "Arts", "Writing & Symbols", ""]]


@pytest.mark.parametrize(("ending", "delimiter"), [("tsv", "\t"), ("csv", ",")])
def test_parti(tmp_path: Path, ending: str, delimiter: str) -> None:
    path = tmp_path / f"PartiPrompts.{ending}"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["Prompt", "Category", "Challenge", "Note"], *PARTI])
    prompts = PartiPrompts(name="parti", path=str(path))
    assert prompts.texts == ["bond", 'the word "START" ']
    assert prompts.metadata[1] == {"Category": "Arts", "Challenge": "Writing & Symbols"}
    assert Prompts(name="file", path=str(path)).texts == ["bond", 'the word "START"']


def test_parti_with_bare_quotes_as_published(tmp_path: Path) -> None:
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        'Prompt\tCategory\tChallenge\tNote\na "red" fox\tAnimals\tBasic\t\nDogs\tAnimals\tBasic\tof "Dogs"\n'
    )
    assert PartiPrompts(name="parti", path=str(path)).texts == ['a "red" fox', "Dogs"]


LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [], "exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"},
]


def test_geneval_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    node = OmegaConf.load(ROOT / "conf" / "prompts" / "geneval.yaml")
    prompts = instantiate(OmegaConf.merge(node, {"path": str(path)}))
    assert prompts.texts == ["a photo of a bench", "a photo of two clocks"]
    assert prompts.metadata == LINES
    assert [list(facts) for facts in prompts.metadata] == [
        list(line) for line in LINES
    ]  # the tool groups by their text
    assert len(prompts.ids()) == 2 * 4
    assert prompts.ids(3) == [(0, 0), (1, 0), (0, 1)]


def test_dpg_folder_and_table_are_one_set(tmp_path: Path) -> None:
    texts = {"b10": "two dogs, one cat", "a2": "a house\nby the sea", "10": "rain"}
    (tmp_path / "prompts").mkdir()
    for item, text in texts.items():
        (tmp_path / "prompts" / f"{item}.txt").write_text(text + "\n")
    with (tmp_path / "dpg_bench.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "text", "proposition_id"])
        rows.writerows([item, text, number] for item, text in texts.items() for number in (1, 2))
    found = [DpgBench(name="dpg", path=str(tmp_path / p)) for p in ("prompts", "", "dpg_bench.csv")]
    assert found[0].texts == ["rain", "a house\nby the sea", "two dogs, one cat"]
    assert [facts["item_id"] for facts in found[0].metadata] == ["10", "a2", "b10"]
    assert len({prompts.digest for prompts in found}) == 1


def test_the_old_sets_are_the_same_lists_as_ever(tmp_path: Path) -> None:
    assert Prompts(name="shapes").digest == "3319a9e654774270"  # runs of earlier versions go on
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(annotations()))
    plain = Prompts(name="file", path=str(path))
    assert len(plain.texts) == 11  # every caption, stripped, in the file's order
    assert plain.texts[:2] == ["aa", "ddd"]
    assert plain.metadata == [{}] * 11


# ---- what is known of a prompt reaches the metrics


def a_run(folder: Path, prompts: Prompts, node: dict[str, Any]) -> RunFolder:
    run = RunFolder(folder)
    known = {"id": "x", "prompts": {"digest": prompts.digest, "repeats": 1}}
    run.claim(OmegaConf.create({"prompts": node, "identity": known}), known)
    return run


def test_metadata_come_from_the_run_folder_or_from_the_unchanged_file(tmp_path: Path, coco: Path) -> None:
    node = {"_target_": "evaluation.prompt_sets.Coco", "name": "coco2017", "path": str(coco)}
    prompts = instantiate(OmegaConf.create(node))
    run = a_run(tmp_path / "run", prompts, node)
    expected = dict(enumerate(prompts.metadata))
    assert metadata_of(run) == expected
    coco.write_text(json.dumps(annotations({10: ["another"]})))
    assert metadata_of(run) == {}  # these are not the prompts that the run was made with
    coco.unlink()
    assert metadata_of(run) == {}
    prompts.keep(run)
    assert metadata_of(run) == expected
    assert json.loads((run.path / "prompts.jsonl").read_text().splitlines()[0])["prompt"] == prompts.texts[0]


def test_plain_lists_have_no_metadata(tmp_path: Path) -> None:
    node = {"_target_": "evaluation.prompts.Prompts", "name": "shapes"}
    prompts = Prompts(name="shapes")
    run = a_run(tmp_path / "run", prompts, node)
    prompts.keep(run)
    assert not (run.path / "prompts.jsonl").exists()
    assert metadata_of(run) == {}


# ---- wrong files


FILES = {
    "instances.json": json.dumps(INSTANCES),
    "list.json": '["a cat", "a dog"]',
    "test.json": '{"images": [], "annotations": []}',
    "cut.json": '{"images": [',
    "prompts.txt": "a cat\n",
    "prompts.jsonl": '{"prompt": "a cat"}\n',
    "prompts.tsv": "text\na cat\n",
    "prompts.csv": "text\na cat\n",
    "open.csv": 'item_id,text\n1,a cat\n2,"a dog\n3,a cow\n',
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco2017"], r"prompts=coco2017 needs COCO's captions: prompts.path=FOLDER, .*annotations_trainval2017.zip"),
        (["coco2014"], r"prompts=coco2014 needs .*captions_val2014.json.*annotations_trainval2014.zip"),
        (["coco2017", "path=nowhere"], r"'nowhere' does not exist"),
        (["coco2017", "path=."], r"has neither captions_val2017.json nor annotations/"),
        (["coco2017", "path=instances.json"], r"without a caption \(bbox, category_id, .*give captions_\*.json"),
        (["coco2017", "path=list.json"], r"no annotation file of COCO .*prompts=file"),
        (["coco2017", "path=test.json"], r"holds no caption; the test splits"),
        (["coco2017", "path=cut.json"], r"'cut.json' is no json"),
        (["coco2017", "caption=longst"], r"unknown prompts.caption 'longst', did you mean 'longest'\?"),
        (["coco2017", "order=ids"], r"unknown prompts.order 'ids', did you mean 'id'\?"),
        (["parti"], r"prompts=parti needs prompts.path=PATH: PartiPrompts.tsv"),
        (["parti", "path=prompts.tsv"], r"no 'Prompt' among its columns \(text\)"),
        (["geneval"], r"prompts=geneval needs prompts.path=PATH: evaluation_metadata.jsonl"),
        (["geneval", "path=prompts.txt"], r"not GenEval's metadata: entry 1 has no 'tag'"),
        (["geneval", "path=prompts.jsonl"], r"not GenEval's metadata: entry 1 has no 'tag'"),
        (["dpg"], r"prompts=dpg needs prompts.path=PATH: the folder"),
        (["dpg", "path=empty"], r"'empty' holds no prompt"),
        (["dpg", "path=prompts.csv"], r"no column 'item_id'"),
        (["dpg", "path=open.csv"], r"'open.csv' is no csv: a quote of the entry at line 3 is never closed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_files_end_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name, content in FILES.items():
        Path(name).write_text(content)
    node = OmegaConf.load(ROOT / "conf" / "prompts" / f"{arguments[0]}.yaml")
    with pytest.raises(UserError, match=message) as error:
        _ = instantiate(OmegaConf.merge(node, OmegaConf.from_dotlist(arguments[1:]))).texts
    assert "\n" not in str(error.value)


def test_a_wrong_file_is_reported_before_weights_load(cli: Cli) -> None:
    Path("instances_val2017.json").write_text(FILES["instances.json"])
    assert cli("decoder=ar", "prompts=coco2017", "prompts.path=instances_val2017.json") == 1
    assert cli.err.startswith("error: 'instances_val2017.json' holds annotations without a caption")
    assert cli.err.count("\n") == 1
    assert "weights are loaded" not in cli.out
    assert not cli.runs_dir.exists()


def test_a_list_of_ones_own_may_name_categories(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,category,note\na dog,animals,x\na cup,,y\n")
    prompts = Prompts(name="file", path=str(tmp_path / "mine.csv"))
    assert prompts.metadata == [{"category": "animals"}, {}]
    assert prompts.texts == ["a dog", "a cup"]
