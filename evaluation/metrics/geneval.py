"""GenEval: write a run's images as its tool wants them, let the tool judge them, and summarise its verdicts.

    <run>/geneval/<00000>/metadata.jsonl, samples/00000.png ...    prompt 0, repeat 0
    <run>/geneval/results-<hash>.jsonl                             the tool's verdicts on exactly these images

The judge itself (Mask2Former through mmdet 2, and a CLIP for colours) needs an old PyTorch and a GPU, so it runs in an
environment of its own, or on another machine. Layout and summary follow djghosh13/geneval (generation/
diffusers_generate.py, evaluation/summary_scores.py); Ghosh, Hajishirzi, Schmidt 2023 (arXiv 2310.11513).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.metrics.batches import check_weights
from evaluation.metrics.exports import link_or_copy
from evaluation.metrics.workers import run_tool
from evaluation.prompts import Facts, metadata_of
from evaluation.run_folder import Id, Record, Snapshot
from evaluation.score import Metric, MetricInfo, Scores
from sjd2.errors import UserError
from sjd2.files import find, read_text, split_lines

log = logging.getLogger(__name__)

TASKS = {  # and their headings
    "single_object": "single",
    "two_object": "two",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "attribution",
}
PROMPTS, REPEATS = 553, 4  # what GenEval consists of
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
TOOL = Path("evaluation") / "evaluate_images.py"
SAMPLE = re.compile(r"(\d+)[/\\]samples[/\\](\d+)\.png$")


class GenEval(Metric):
    """GenEval's six sub-scores and their mean, judged by GenEval's own tool.

    tool: a clone of djghosh13/geneval, or its evaluate_images.py; null: only write the images. python: interpreter of
    the environment that it needs; null: this one. detector: folder with its Mask2Former weights. model_config: the
    config file of mmdet for them, if it is not where the tool looks. results: a results.jsonl made elsewhere, only
    for stage=score.
    """

    numbers = (
        MetricInfo(name="geneval_overall", title="GenEval", digits=3, higher_is_better=True),
        *(
            MetricInfo(name=f"geneval_{task}", title=title, group="GenEval", higher_is_better=True)
            for task, title in TASKS.items()
        ),
        # the share of images, where GenEval's total is the mean over its tasks: in paired differences only
        MetricInfo(name="geneval_correct", digits=3, higher_is_better=True, per_image="geneval"),
    )
    details = ("geneval_warning",)
    of_parts = False
    protocol = (
        "geneval_<task>: share of the task's images that GenEval's evaluate_images.py calls correct, geneval_overall: mean "
        "over tasks (summary_scores.py)."
    )

    def __init__(
        self,
        *,
        tool: str | None = None,
        python: str | None = None,
        detector: str | None = None,
        model_config: str | None = None,
        results: str | None = None,
        stage: str = "score",
    ) -> None:
        if results is not None and stage != "score":  # a run comes with its AR run, which must not inherit them
            raise UserError(
                "evaluation.metrics.geneval.results= is about one run: python run.py stage=score run_dir=FOLDER."
            )
        if tool is not None and results is not None:
            raise UserError("evaluation.metrics.geneval.tool= makes results and results= reads them; leave one null.")
        self.tool = None if tool is None else find(tool) / TOOL if find(tool).is_dir() else find(tool)
        self.python = python or sys.executable
        self.detector, self.model_config, self.results = detector, model_config, find(results) if results else None

    def check(self) -> None:
        """Raise UserError if a file that was named is not there."""
        key = "evaluation.metrics.geneval"
        if self.results is not None and not self.results.is_file():
            raise UserError(
                f"{key}.results={self.results} does not exist; give the results.jsonl of evaluate_images.py."
            )
        if self.tool is None:
            return
        if not self.tool.is_file():
            raise UserError(f"{key}.tool: {self.tool} does not exist; give the folder of a clone of djghosh13/geneval.")
        if shutil.which(self.python) is None:
            raise UserError(f"{key}.python={self.python} is no interpreter; give that of GenEval's environment.")
        if self.detector is None or not (find(self.detector) / DETECTOR).is_file():
            where = "is not set" if self.detector is None else f"has no {DETECTOR}"
            raise UserError(
                f"{key}.detector={self.detector} {where}; fetch it by GenEval's evaluation/download_models.sh."
            )
        check_weights(find(self.detector) / DETECTOR)
        if self.model_config is not None and not find(self.model_config).is_file():
            raise UserError(f"{key}.model_config={self.model_config} does not exist; null takes the one in mmdet.")

    @property
    def needs_images(self) -> bool:
        return True

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want no image, the tool reads the files; does not apply to other prompts than GenEval's."""
        self._facts = metadata_of(run.folder)
        if not run.records or not all("tag" in self._facts.get(prompt, {}) for prompt, _ in run.ids):
            log.info("geneval: left out, its prompts are not GenEval's (prompts=geneval prompts.path=FILE)")
            return None
        return ()

    def compute(self, run: Snapshot) -> Scores:
        """Return the scores; empty without verdicts.

        Without tool and results it ends by logging what was written and which command judges it.
        """
        verdicts = self.results or self._judge(run, self._facts)
        if verdicts is None:
            return Scores()
        found = read_verdicts(verdicts)
        self._compare(verdicts, found, run.records)
        known = all("id" in verdict for verdict in found)
        images = {"geneval": {verdict["id"]: float(verdict["correct"]) for verdict in found}} if known else {}
        warning = _doubts(found, run.records)
        return Scores(summarise(found) | ({"geneval_warning": warning} if warning else {}), images)

    def _judge(self, run: Snapshot, facts: Mapping[int, Facts]) -> Path | None:
        """Write the images and return the verdicts on them; None where nobody has judged them yet."""
        folder = write_layout(run, facts)
        verdicts = folder / f"results-{_fingerprint(run)}.jsonl"
        if verdicts.is_file():
            return verdicts
        command = self._command(folder, verdicts)
        if self.tool is None:
            log.warning(
                "geneval: wrote %d images to %s; judge them with: %s, then score again: python run.py stage=score "
                "run_dir=%s evaluation=geneval",
                *(len(run.records), folder, shlex.join(command), run.path),
            )
            return None
        unfinished = verdicts.with_suffix(".part")
        run_tool(self._command(folder, unfinished), "GenEval's evaluate_images.py")
        if not unfinished.is_file():
            raise UserError(
                f"GenEval's evaluate_images.py wrote no {unfinished}; the command was: {shlex.join(command)}"
            )
        os.replace(unfinished, verdicts)
        return verdicts

    def _command(self, folder: Path, verdicts: Path) -> list[str]:
        tool = [self.python, str(self.tool.absolute())] if self.tool else ["python", str("GENEVAL" / TOOL)]
        command = [*tool, str(folder), "--outfile", str(verdicts)]
        command += ["--model-path", str(find(self.detector).absolute()) if self.detector else "DETECTOR_FOLDER"]
        return command + (["--model-config", str(find(self.model_config).absolute())] if self.model_config else [])

    def _compare(self, path: Path, found: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError if verdicts are not about this run's images."""
        asked, judged = (sorted(row["prompt"] for row in rows) for rows in (records, found))
        if len(asked) != len(judged):
            raise UserError(f"{path} judges {len(judged)} images, but the run has {len(asked)}: judge them again.")
        if asked != judged:
            strange = next(theirs for ours, theirs in zip(asked, judged, strict=True) if ours != theirs)
            raise UserError(f"{path} judges other prompts than the run's (near '{strange}'): give its own results.")


# --------------------------------------------------------------------------------------------------------------- layout
def write_layout(run: Snapshot, facts: Mapping[int, Facts]) -> Path:
    """Put every image of a run where evaluate_images.py looks for it; returns the folder, absolute.

    The files are hard links where the disk allows it, so they cost no space.
    """
    folder = (run.path / "geneval").absolute()
    for record in run.records:
        prompt, repeat = record["id"]
        samples = folder / f"{prompt:05d}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(facts[prompt]), encoding="utf-8")
        link_or_copy(run.path / record["image"], samples / f"{repeat:05d}.png")
    return folder


def _fingerprint(run: Snapshot) -> str:
    """Return eight hex digits of all images' tokens: verdicts on other images are never taken for these."""
    text = "".join(f"{record['id']}{record['tokens_sha256']}" for record in run.records)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ------------------------------------------------------------------------------------------------------------- verdicts
def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Read a results.jsonl: {"tag", "prompt", "correct"} per image, and its "id" where the file name holds it.

    Raises UserError naming the line that is none.
    """
    found = []
    for number, line in enumerate(split_lines(read_text(path, "GenEval's results")), 1):
        if not line.strip():
            continue
        row: Any = None
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
        if not isinstance(row, dict) or not {"tag", "prompt", "correct"} <= row.keys():
            raise UserError(
                f"{path}, line {number}: no verdict of GenEval (tag, prompt, correct); give its results.jsonl."
            )
        verdict = {"tag": str(row["tag"]), "prompt": row["prompt"], "correct": bool(row["correct"])}
        if place := SAMPLE.search(str(row.get("filename", ""))):
            key: Id = (int(place[1]), int(place[2]))
            verdict["id"] = key
        found.append(verdict)
    if not found:
        raise UserError(f"{path} holds no verdict; run GenEval's evaluate_images.py again.")
    return found


def summarise(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of correct images of each task there is, and the mean over these tasks (summary_scores.py)."""
    tasks: dict[str, list[bool]] = {}
    for verdict in verdicts:
        tasks.setdefault(verdict["tag"], []).append(verdict["correct"])
    if strange := sorted(tasks.keys() - set(TASKS)):
        raise UserError(f"unknown GenEval task '{strange[0]}'. Valid: {', '.join(TASKS)}.")
    scores = {f"geneval_{task}": sum(tasks[task]) / len(tasks[task]) for task in TASKS if task in tasks}
    return {"geneval_overall": sum(scores.values()) / len(scores), **scores}


def _doubts(verdicts: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> str:
    """Return why the scores are not GenEval's; '' where they are."""
    prompts, tasks = {record["id"][0] for record in records}, {verdict["tag"] for verdict in verdicts}
    if len(tasks) < len(TASKS):
        lacking = [task for task in TASKS if task not in tasks]
        return f"no image of {', '.join(lacking)}, so the overall score is of {len(tasks)} tasks only."
    if len(prompts) != PROMPTS or len(records) != PROMPTS * REPEATS:
        return f"{len(prompts)} prompts and {len(records)} images, GenEval has {PROMPTS} and {PROMPTS * REPEATS}."
    return ""
