"""GenEval: the folder that its tool reads, the tool as a subprocess, its verdicts summarised."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics import geneval
from evaluation.run_folder import RunFolder, Snapshot
from evaluation.score import read_scores
from sjd2.errors import UserError
from tests.helpers.cli import Cli
from tests.helpers.runs import a_run

LINES = [
    {"tag": task, "include": [{"class": "bench", "count": n + 1}], "prompt": f"a photo {n} of {task}"}
    for task in geneval.TASKS
    for n in range(2)
]
# judges an image by its first pixel; takes and writes what djghosh13/geneval's evaluate_images.py takes and writes
TOOL = """
import argparse, json, os, re, sys
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("imagedir", type=str)
parser.add_argument("--outfile", type=str, default="results.jsonl")
parser.add_argument("--model-config", type=str, default=None)
parser.add_argument("--model-path", type=str, default="./")
args = parser.parse_args()
with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("GENEVAL_FAILS"):
    sys.exit("no CUDA here")
rows = []
for subfolder in os.listdir(args.imagedir):
    folder = os.path.join(args.imagedir, subfolder)
    if not os.path.isdir(folder) or not subfolder.isdigit():
        continue
    metadata = json.load(open(os.path.join(folder, "metadata.jsonl")))
    for name in os.listdir(os.path.join(folder, "samples")):
        path = os.path.join(folder, "samples", name)
        if os.path.isfile(path) and re.match(r"\\d+\\.png", name):
            correct = Image.open(path).getpixel((0, 0))[0] > 127
            rows.append({"filename": path, "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": correct,
                         "reason": "", "metadata": json.dumps(metadata), "details": "{}"})
with open(args.outfile, "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
"""


def a_geneval_run(folder: Path, right: list[bool], repeats: int = 2) -> RunFolder:
    """Write a run of all LINES, as often as `right` says which images show what they should."""
    ids = [[prompt, repeat] for repeat in range(repeats) for prompt in range(len(LINES))][: len(right)]
    images = [np.full((8, 8, 3), 200 if good else 50, np.uint8) for good in right]
    run = a_run(folder, images, [LINES[prompt]["prompt"] for prompt, _ in ids], id=ids)
    facts = [{"prompt": line["prompt"], "metadata": line} for line in LINES]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in facts))
    return run


@pytest.fixture
def tool(tmp_path: Path) -> dict[str, str]:
    """The settings of a clone of GenEval with its detector."""
    (tmp_path / "clone" / "evaluation").mkdir(parents=True)
    (tmp_path / "clone" / "evaluation" / "evaluate_images.py").write_text(TOOL)
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / geneval.DETECTOR).write_bytes(b"\x80")  # as a pickle begins
    return {"tool": str(tmp_path / "clone"), "detector": str(tmp_path / "detector"), "python": sys.executable}


def calls(tool: dict[str, str]) -> list[list[str]]:
    path = Path(tool["tool"]) / "evaluation" / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


RIGHT = [bool(n) for n in np.random.default_rng(5).integers(0, 2, 2 * len(LINES))]


def expected(right: list[bool]) -> dict[str, float]:
    """Average as summary_scores.py does: over images within a task, then over tasks."""
    tags = [LINES[i % len(LINES)]["tag"] for i in range(len(right))]
    means = {tag: np.mean([r for r, t in zip(right, tags, strict=True) if t == tag]) for tag in dict.fromkeys(tags)}
    return {"geneval_overall": np.mean(list(means.values()))} | {f"geneval_{tag}": v for tag, v in means.items()}


# ---- layout


def test_the_layout_is_geneval_s(tmp_path: Path) -> None:
    run = a_geneval_run(tmp_path / "run", RIGHT)
    folder = geneval.write_layout(Snapshot(run), dict(enumerate(LINES)))
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:05d}" for i in range(len(LINES))]
    for i, line in enumerate(LINES):
        assert (folder / f"{i:05d}" / "metadata.jsonl").read_text() == json.dumps(line)
        assert sorted(p.name for p in (folder / f"{i:05d}" / "samples").iterdir()) == ["00000.png", "00001.png"]
    for record, right in zip(
        run.records(), [r for pair in zip(RIGHT[:12], RIGHT[12:], strict=True) for r in pair], strict=True
    ):
        prompt, repeat = record["id"]
        with Image.open(folder / f"{prompt:05d}" / "samples" / f"{repeat:05d}.png") as image:
            assert image.getpixel((0, 0))[0] == (200 if right else 50)
    assert geneval.write_layout(Snapshot(run), dict(enumerate(LINES))) == folder  # a second time over the first


def test_images_are_copied_where_the_disk_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(geneval.os, "link", refuse)
    run = a_geneval_run(tmp_path / "run", RIGHT)
    folder = geneval.write_layout(Snapshot(run), dict(enumerate(LINES)))
    assert (folder / "00003" / "samples" / "00001.png").read_bytes() == (
        run.path / "images" / "00003_1.png"
    ).read_bytes()


# ---- the tool


def test_scores_are_the_tool_s_verdicts_summarised(tmp_path: Path, tool: dict[str, str]) -> None:
    run = a_geneval_run(tmp_path / "run", RIGHT)
    metric = geneval.GenEval(**tool)
    metric.check()
    out = metric.score(run)
    assert {key: value for key, value in out.items() if key != "geneval_warning"} == pytest.approx(expected(RIGHT))
    assert out["geneval_warning"] == "12 prompts and 24 images, GenEval has 553 and 2212."
    assert out.keys() <= {info.name for info in metric.numbers} | set(metric.details)
    values = {key: row["geneval"] for key, row in read_scores(run).items()}
    assert values == {(i % 12, i // 12): float(right) for i, right in enumerate(RIGHT)}
    (call,) = calls(tool)
    assert call[0] == str(tmp_path / "run" / "geneval")
    assert call[3:] == ["--model-path", tool["detector"]]


def test_judged_images_are_not_judged_again_and_others_never_inherit(tmp_path: Path, tool: dict[str, str]) -> None:
    run = a_geneval_run(tmp_path / "run", RIGHT[:12])
    metric = geneval.GenEval(**tool)
    first = metric.score(run)
    assert metric.score(run) == first
    assert geneval.GenEval().score(run) == first  # also without the tool
    assert len(calls(tool)) == 1
    for path in (tmp_path / "run").glob("samples*.jsonl"):
        path.unlink()
    a_geneval_run(tmp_path / "run", RIGHT)
    assert metric.score(run)["geneval_overall"] == pytest.approx(expected(RIGHT)["geneval_overall"])
    assert len(calls(tool)) == 2


def test_a_tool_that_fails_says_its_command(
    tmp_path: Path, tool: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_geneval_run(tmp_path / "run", RIGHT)
    monkeypatch.setenv("GENEVAL_FAILS", "1")
    with pytest.raises(UserError, match=r"exit code 1, .* the command was: .*evaluate_images.py .*--outfile"):
        geneval.GenEval(**tool).score(run)
    assert not list((run.path / "geneval").glob("results-*.jsonl"))
    monkeypatch.delenv("GENEVAL_FAILS")
    assert geneval.GenEval(**tool).score(run)


def test_without_a_tool_it_reports_what_was_written_and_what_to_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_geneval_run(tmp_path / "run", RIGHT)
    metric = geneval.GenEval()
    metric.check()
    assert metric.score(run) == {}
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"wrote 24 images to {tmp_path / 'run' / 'geneval'}" in said
    assert "python GENEVAL/evaluation/evaluate_images.py" in said
    assert "--model-path DETECTOR_FOLDER" in said
    assert f"python run.py stage=score run_dir={run.path} evaluation=geneval" in said
    # what the sentence says to write is what is read then
    target = Path(said.split("--outfile ")[1].split()[0])
    rows = [
        {"tag": LINES[i % 12]["tag"], "prompt": LINES[i % 12]["prompt"], "correct": right}
        for i, right in enumerate(RIGHT)
    ]
    target.write_text("\n".join(map(json.dumps, rows)))
    assert metric.score(run)["geneval_overall"] == pytest.approx(expected(RIGHT)["geneval_overall"])


def test_other_prompts_have_no_geneval(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [np.zeros((8, 8, 3), np.uint8)])
    assert geneval.GenEval().score(run) == {}
    assert not (run.path / "geneval").exists()


def test_a_part_of_the_tasks_is_reported(tmp_path: Path, tool: dict[str, str]) -> None:
    out = geneval.GenEval(**tool).score(a_geneval_run(tmp_path / "run", RIGHT[:3]))
    assert out["geneval_overall"] == pytest.approx(expected(RIGHT[:3])["geneval_overall"])
    assert "geneval_counting" not in out
    assert out["geneval_warning"].startswith("no image of counting, colors, position, color_attr")


# ---- verdicts made elsewhere


def verdicts(right: list[bool], **changes: Any) -> str:
    """Write lines as pandas does, images in any order, with paths of another machine."""
    rows = []
    for i, value in enumerate(right):
        line, place = LINES[i % 12], (f"{i % 12:05d}", "samples", f"{i // 12:05d}.png")
        row = {"filename": ("C:\\out\\" + "\\".join(place)) if i % 2 else "/x/" + "/".join(place), "correct": value}
        rows.append(row | {"tag": line["tag"], "prompt": line["prompt"]} | changes)
    return "".join(json.dumps(row) + "\n" for row in reversed(rows))


def test_verdicts_from_elsewhere_are_read(tmp_path: Path) -> None:
    run = a_geneval_run(tmp_path / "run", RIGHT)
    (tmp_path / "results.jsonl").write_text(verdicts(RIGHT))
    metric = geneval.GenEval(results=str(tmp_path / "results.jsonl"))
    metric.check()
    out = metric.score(run)
    assert out["geneval_overall"] == pytest.approx(expected(RIGHT)["geneval_overall"])
    assert read_scores(run)[(3, 1)] == {"geneval": float(RIGHT[15])}
    assert not (run.path / "geneval").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (verdicts(RIGHT[:20]), "judges 20 images, but the run has 24"),
        (verdicts(RIGHT, prompt="a photo of a cow"), r"other prompts than the run's \(near 'a photo of a cow'"),
        (verdicts(RIGHT, tag="beauty"), "unknown GenEval task 'beauty'. Valid: single_object"),
        ("", "holds no verdict"),
        ('{"tag": "colors"}\n', "line 1: no verdict of GenEval"),
        ("Summary\n", "line 1: no verdict of GenEval"),
    ],
)
def test_wrong_verdicts_are_refused(tmp_path: Path, content: str, says: str) -> None:
    run = a_geneval_run(tmp_path / "run", RIGHT)
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        geneval.GenEval(results=str(tmp_path / "results.jsonl")).score(run)


def test_missing_files_are_reported_before_any_image_is_made(tmp_path: Path, tool: dict[str, str]) -> None:
    for changes, says in (
        ({"tool": "nowhere"}, "nowhere does not exist; give the folder of a clone"),
        ({"tool": str(tmp_path)}, r"evaluate_images.py does not exist"),
        ({"python": "nowhere"}, "is no interpreter"),
        ({"detector": None}, "detector=None is not set"),
        ({"detector": str(tmp_path)}, f"has no {geneval.DETECTOR}"),
        ({"model_config": "x.py"}, "model_config=x.py does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            geneval.GenEval(**(tool | changes)).check()
    with pytest.raises(UserError, match=r"results=x\.jsonl does not exist"):
        geneval.GenEval(results="x.jsonl").check()
    with pytest.raises(UserError, match="about one run"):
        geneval.GenEval(results="x.jsonl", stage="sample")
    with pytest.raises(UserError, match="leave one null"):
        geneval.GenEval(results="x.jsonl", tool="y")


# ---- from the command line


def test_from_prompts_to_the_table(cli: Cli, tool: dict[str, str]) -> None:
    Path("evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    command = ["decoder=ar", "prompts=geneval", "prompts.path=evaluation_metadata.jsonl", "prompts.repeats=2"]
    settings = [f"evaluation.metrics.geneval.{key}={value}" for key, value in tool.items()]
    assert cli(*command, "limit=null", "evaluation=geneval", *settings) == 0, cli.err
    run = cli.run("ar")
    metrics = run.metrics
    assert metrics["n_images"] == 24
    by_task = [metrics[f"geneval_{task}"] for task in geneval.TASKS]
    assert metrics["geneval_overall"] == pytest.approx(np.mean(by_task))
    assert metrics["protocol"]["geneval"] == geneval.GenEval.protocol
    assert "| GenEval ↑ | GenEval: single, two, counting, colours, position, attribution ↑ |" in cli.out
    assert f"| {metrics['geneval_overall']:.3f} | {' / '.join(f'{value:.2f}' for value in by_task)} |" in cli.out
