"""Write a run's images as the scorers of other benchmarks want them: GenEval 2, DPG-Bench, T2I-CompBench.

    <run>/geneval2/images.json                         {prompt: path}
    <run>/dpg/<item_id>.png                            four images of a prompt in a 2 x 2 grid; <run>/dpg-seeds.json
    <run>/t2i_compbench/<category>/samples/<prompt>_000012.png

Each scorer needs an environment, a network and often a GPU of its own, so an export ends by logging the command that
runs it. What is written follows facebookresearch/GenEval2 (README, commit c088ab7), TencentQQGYLab/ELLA
(dpg_bench/compute_dpg_bench.py, 025f650) and Karine-Huang/T2I-CompBench (GORS_finetune/inference_eval.py, 8e6b07c;
BLIPvqa_eval/BLIP_vqa.py, 34134bd). The scorers themselves have not been run here.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from evaluation.prompts import Facts, metadata_of
from evaluation.run_folder import Id, Record, Snapshot
from evaluation.score import Metric, Scores
from sjd2.errors import UserError
from sjd2.files import write_atomically

log = logging.getLogger(__name__)

BLIP, CLIP = ("BLIPvqa_eval/BLIP_vqa.py", "--out_dir"), ("CLIPScore_eval/CLIP_similarity.py", "--outpath")
SPATIAL = ("UniDet_eval/2D_spatial_eval.py", "--outpath")
JUDGES = {  # of T2I-CompBench, each to be run in its own folder of the clone
    "color": [BLIP],
    "shape": [BLIP],
    "texture": [BLIP],
    "spatial": [SPATIAL],
    "3d_spatial": [("UniDet_eval/3D_spatial_eval.py", "--outpath")],
    "numeracy": [("UniDet_eval/numeracy_eval.py", "--outpath")],
    "non_spatial": [CLIP],
    "complex": [BLIP, SPATIAL, CLIP, ("3_in_1_eval/3_in_1.py", "--outpath")],
}
GRID = 4  # images of a prompt in a grid of DPG-Bench: top left, top right, bottom left, bottom right


def link_or_copy(source: Path, target: Path) -> None:
    """Put an image where a tool looks for it: a hard link, a copy on another disk or one without links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Export(Metric):
    """Images in the layout of a scorer; no number. fact: what a prompt of the set is known by, prompts: how to get them."""

    of_parts = False
    name: str
    fact: str
    prompts: str

    @property
    def needs_images(self) -> bool:
        """Return True: the files are what is exported."""
        return True

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want no image, the files are enough; does not apply to prompts of another set."""
        self._facts = metadata_of(run.folder)
        if not run.records or not all(self.fact in self._facts.get(prompt, {}) for prompt, _ in run.ids):
            log.info("%s: left out, its prompts are not that benchmark's (%s)", self.name, self.prompts)
            return None
        return ()

    def compute(self, run: Snapshot) -> Scores:
        """Write the images and log the command that scores them."""
        commands = [shlex.join(command) for command in self.write(run, self._facts)]
        log.warning("%s: wrote %d images; score them with: %s", self.name, len(run.records), " && ".join(commands))
        return Scores()

    def write(self, run: Snapshot, facts: Mapping[int, Facts]) -> list[list[str]]:
        """Write the files, and return the commands of the scorer."""
        raise NotImplementedError


class GenEval2Export(Export):
    """GenEval 2 (arXiv 2512.16853): one json of {prompt: path}, of the first image of each prompt."""

    name, fact, prompts = "geneval2", "vqa_list", "prompts=geneval2 prompts.path=geneval2_data.jsonl"

    def write(self, run: Snapshot, facts: Mapping[int, Facts]) -> list[list[str]]:
        """Write images.json."""
        paths = {r["prompt"]: str((run.path / r["image"]).absolute()) for r in run.records if r["id"][1] == 0}
        file = (run.path / "geneval2" / "images.json").absolute()
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, (json.dumps(paths, indent=1, ensure_ascii=False) + "\n").encode())
        if max(repeat for _, repeat in run.ids):
            log.warning("geneval2: its scorer takes one image per prompt, so the first of each is exported.")
        scores = str(file.with_name("score_lists.json"))
        command = ["python", "evaluation.py", "--benchmark_data", "geneval2_data.jsonl"]
        command += ["--image_filepath_data", str(file), "--method", "soft_tifa_gm", "--output_file", scores]
        analysis = [
            "python",
            "soft_tifa_analysis.py",
            "--benchmark_data",
            "geneval2_data.jsonl",
            "--score_data",
            scores,
        ]
        return [command, analysis]


class DpgExport(Export):
    """DPG-Bench (ELLA, arXiv 2403.05135): four images of a prompt as a 2 x 2 grid, and their seeds."""

    name, fact, prompts = "dpg", "item_id", "prompts=dpg prompts.path=FOLDER"

    def write(self, run: Snapshot, facts: Mapping[int, Facts]) -> list[list[str]]:
        """Write a grid for each prompt that has its four images; raises UserError if they are not square."""
        side = self._side(run)
        folder = (run.path / "dpg").absolute()
        folder.mkdir(exist_ok=True)
        by_id: dict[Id, Record] = dict(zip(run.ids, run.records, strict=True))
        seeds = {}
        for prompt in sorted({prompt for prompt, _ in by_id}):
            found = [by_id[key] for repeat in range(GRID) if (key := (prompt, repeat)) in by_id]
            if len(found) == GRID:
                item = str(facts[prompt]["item_id"])
                self._grid([run.path / record["image"] for record in found], side).save(folder / f"{item}.png")
                seeds[item] = [record["seed"] for record in found]
        # not among the images: the scorer takes every file of their folder for one
        write_atomically(run.path / "dpg-seeds.json", (json.dumps(seeds, indent=1) + "\n").encode())
        if lacking := len({prompt for prompt, _ in by_id}) - len(seeds):
            log.warning("dpg: %d prompts lack some of their %d images and are left out.", lacking, GRID)
        command = ["accelerate", "launch", "dpg_bench/compute_dpg_bench.py", "--image-root-path", str(folder)]
        command += ["--resolution", str(side), "--pic-num", str(GRID), "--vqa-model", "mplug"]
        return [[*command, "--res-path", str(run.path.absolute() / "dpg-results.txt")]]

    def _side(self, run: Snapshot) -> int:
        size = run.image_size
        if size is None or size[0] != size[1]:
            raise UserError(f"DPG-Bench's scorer cuts its grids into squares, and the images are {size}.")
        return size[0]

    def _grid(self, files: Sequence[Path], side: int) -> Image.Image:
        """Return four images side by side, row by row."""
        grid = Image.new("RGB", (2 * side, 2 * side))
        for place, file in enumerate(files):
            with Image.open(file) as image:
                grid.paste(image.convert("RGB"), (place % 2 * side, place // 2 * side))
        return grid


class CompBenchExport(Export):
    """T2I-CompBench (arXiv 2307.06350): a folder per category, whose files are named after their prompts."""

    name, fact = "t2i_compbench", "category"
    prompts = "prompts=t2i_compbench prompts.path=FOLDER"

    def write(self, run: Snapshot, facts: Mapping[int, Facts]) -> list[list[str]]:
        """Write the images, numbered within their category, those of one prompt after each other."""
        folder = (run.path / "t2i_compbench").absolute()
        counts: dict[str, int] = {}
        stale = set(folder.glob("*/samples/*.png"))  # a run that has grown since numbers its images otherwise
        for record in run.records:
            category = str(facts[record["id"][0]]["category"])
            number = counts[category] = counts.get(category, -1) + 1
            # the scorers take what stands before the first underscore for the prompt
            text = record["prompt"].strip().replace("/", " ").replace("_", " ")
            target = folder / category / "samples" / f"{text}_{number:06d}.png"
            link_or_copy(run.path / record["image"], target)
            stale.discard(target)
        for file in stale:  # the scorers would count these images twice
            file.unlink()
        return [
            ["python", script, argument, str(folder / category)]
            for category in sorted(counts)
            for script, argument in JUDGES.get(category, [])
        ]
