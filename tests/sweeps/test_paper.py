"""The paper's tables beside ours: which run answers which published row, and blanks where none does."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import sjd2
from harness.flops import gflops_per_token
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sweeps.runs import read_run
from sweeps.tables import paper
from sweeps.tables.published import read
from tests.helpers.cli import Cli
from tests.helpers.table_runs import ar, make


def lumina(
    runs_dir: Path, decoder: str, *, adapter: str | None = None, prompts: str = "coco2017", **parts: str
) -> Path:
    """Make a run of a model called lumina on a published prompt set; parts: of the decoder."""
    path = make(runs_dir, decoder, n=3, model={"name": "lumina", "adapter": adapter}, prompts=prompts, parts=parts)
    config = OmegaConf.load(path / "config.yaml")
    config.prompts.name = prompts
    OmegaConf.save(config, path / "config.yaml")
    return path


def cells(table: str, runs: list[Path], out: Path) -> list[dict[str, str]]:
    paper.make_paper_table(table, [read_run(run) for run in runs], out)
    return list(csv.DictReader((out / "paper.csv").open()))


def test_every_printed_figure_of_the_paper_stands_in_some_table(tmp_path: Path) -> None:
    rows = [row for row in read() if row.arxiv == paper.ARXIV]
    known = {number.field for number in paper.numbers()}
    for row in rows:
        figures = {k for k, v in vars(row).items() if isinstance(v, float)}
        assert figures <= known, row
    assert {"Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 6", "Table 7", "Table 8", "Figure 9"} <= set(
        paper.names()
    )
    (table4,) = [r for r in rows if r.table == "Table 4" and r.method == "SJD2" and r.model == "Emu3"]
    assert table4.gflops_per_token == 465.92


def test_rows_are_answered_by_model_prompts_method_and_tuning(tmp_path: Path) -> None:
    runs = [
        lumina(tmp_path / "runs", "ar"),
        lumina(tmp_path / "runs", "sjd2", adapter="tuned"),
        lumina(tmp_path / "runs", "sjd", prompts="coco2014"),
    ]
    found = {(r["method"], r["model"], r["prompts"]): r for r in cells("Table 1", runs, tmp_path / "out")}
    ar = found["AR", "Lumina-mGPT (768 px)", "COCO2017 val (5k)"]
    assert (ar["passes, published"], ar["ours"]) == ("2357", "lumina, coco2017, N=3")
    assert ar["passes, ours"]
    assert found["SJD2", "Lumina-mGPT (768 px)", "COCO2017 val (5k)"]["passes, ours"]
    assert found["SJD", "Lumina-mGPT (768 px)", "COCO2014 val (30k)"]["passes, ours"]
    for key in (("SJD", "Lumina-mGPT (768 px)", "COCO2017 val (5k)"), ("AR", "Emu3", "COCO2017 val (5k)")):
        assert found[key]["passes, ours"] == found[key]["ours"] == ""  # nobody has run it: blank, not guessed


def test_janus_of_7b_does_not_answer_the_rows_of_1b(tmp_path: Path) -> None:
    for size, answered in (("1B", True), ("7B", False)):
        path = make(tmp_path / size, "ar", model={"name": "janus", "weights": f"deepseek-community/Janus-Pro-{size}"})
        rows = [row for row in cells("Table 5", [path], tmp_path / "out") if row["method"] == "AR"]
        assert [bool(row["passes, ours"]) for row in rows] == [answered]


def test_runs_that_answer_no_row_are_named(tmp_path: Path) -> None:
    runs = [read_run(lumina(tmp_path / "runs", "ar")), read_run(lumina(tmp_path / "runs", "sjd", prompts="parti"))]
    text = paper.make_paper_table("Table 1", runs, tmp_path / "out")
    assert "No published row matches sjd (lumina, parti, N=3): another method" in text
    assert "No published row matches" not in paper.make_paper_table("Table 1", runs[:1], tmp_path / "out")


def test_tuned_and_untuned_rows_are_told_apart(tmp_path: Path) -> None:
    tuned = lumina(tmp_path / "runs", "ar", adapter="tuned", prompts="geneval")
    found = {r["method"]: r for r in cells("Table 2", [tuned], tmp_path / "out") if r["model"].startswith("Lumina")}
    assert found["AR (SJD2-tuned weights)"]["ours"] == "lumina with adapter, geneval, N=3"
    assert found["AR (not tuned)"]["ours"] == ""
    assert found["AR (not tuned)"]["GenEval, published"] == "0.48"


def test_the_embedded_model_stands_in_for_the_papers_and_says_so(tmp_path: Path) -> None:
    text = paper.make_paper_table("Table 3", [read_run(make(tmp_path / "runs", "ar"))], tmp_path / "out")
    assert "not one of the paper's models" in text
    rows = list(csv.DictReader((tmp_path / "out" / "paper.csv").open()))
    assert [r["model"] for r in rows if r["source"].startswith("ours")] == ["toy"]  # in no row of another model
    assert [r["passes"] for r in rows if r["model"] == "Emu3"] == ["8193", "3537", "1470"]


def test_exact_and_lossy_sjd2_have_rows_of_their_own_beside_costs_of_either(tmp_path: Path) -> None:
    runs = [
        ar(tmp_path / "runs"),
        make(tmp_path / "runs", "sjd2", accepted=(1, 7, 8), model={"adapter": "w"}, parts={"rule": "exact"}),
        make(tmp_path / "runs", "sjd2-paper", lossless=False, model={"adapter": "w"}, parts={"rule": "paper"}),
    ]
    rows = {(r["method"], r["model"]): r for r in cells("Table 3", runs, tmp_path / "out")}
    exact, lossy = rows["SJD2 (exact rule, lossless)", "toy"], rows["SJD2 (the paper's rule, lossy)", "toy"]
    assert (exact["step compression"], lossy["step compression"]) == ("5.33", "4.00")
    assert "×" in exact["speed-up"]
    assert rows["AR", "toy"]["speed-up"] == "1.00×"
    paper_s = rows["SJD2", "Lumina-mGPT (768 px)"]
    assert (paper_s["passes"], paper_s["step compression"], paper_s["speed-up"]) == ("596", "(3.95)", "(2.63)")
    assert "In parentheses: not printed; computed here" in (tmp_path / "out" / "paper.md").read_text()
    own = [lumina(tmp_path / "own", "sjd2", adapter="tuned", rule=rule) for rule in ("paper", "exact")]
    rows = {(r["method"], r["model"]): r for r in cells("Table 1", own, tmp_path / "b") if "2017" in r["prompts"]}
    exact, lossy = (
        rows[f"SJD2 ({rule})", "Lumina-mGPT (768 px)"] for rule in ("exact rule, lossless", "the paper's rule, lossy")
    )
    assert (exact["passes, published"], lossy["passes, published"]) == ("", "592")
    assert exact["passes, ours"] == lossy["passes, ours"] == "4.0"
    assert rows["SJD2", "Emu3"]["passes, ours"] == ""


def test_geneval_has_a_counterpart_on_the_embedded_model(tmp_path: Path) -> None:
    runs = [make(tmp_path / "runs", "ar", metrics={"alignment_all": 0.75}, model={"adapter": "w"})]
    rows = {r["method"]: r for r in cells("Table 2", runs, tmp_path / "out")}
    assert rows["AR"]["all attributes right"] == "0.75"
    assert rows["AR"]["GenEval"] == rows["AR (not tuned)"]["all attributes right"] == ""
    assert "all attributes right, ours" not in cells("Table 2", [lumina(tmp_path / "runs", "ar")], tmp_path / "2")[0]


@pytest.mark.slow
def test_operations_are_those_of_the_weights_and_of_attention() -> None:
    model = sjd2.load("tiny", adapter=None)
    weights = sum(p.numel() for name, p in model.transformer.layers.named_parameters() if "norm" not in name)
    head = model.layout.vocabulary * model.transformer.config.hidden_size
    tokens, prompt = model.layout.length, int(model.encode(["a red circle"]).lengths[0])
    attention = 4 * model.transformer.config.hidden_size * model.transformer.config.num_hidden_layers  # per token seen
    seen = sum(prompt + n for n in range(tokens))
    by_hand = 2 * tokens * 2 * (weights + head) + 2 * attention * seen  # two guidance branches, a prompt shorter in one
    counted = gflops_per_token(model, sjd2.decoder("ar"), "a red circle", SamplingParams(guidance_scale=3.0), 0)
    assert counted * tokens * 1e9 == pytest.approx(by_hand, rel=0.03)
    assert gflops_per_token(model, sjd2.decoder("ar"), "a red circle", SamplingParams(), 0) == pytest.approx(
        counted / 2, rel=0.05
    )


def test_an_unknown_table_is_refused_with_the_valid_ones(cli: Cli) -> None:
    with pytest.raises(UserError, match="Table 1"):
        paper.check("Table 99")
    assert cli("paper=Table 9", "limit=2") == 1
    assert "unknown paper 'Table 9'" in cli.err


@pytest.mark.usefixtures("plain")
def test_a_multirun_puts_the_papers_table_below_its_own(cli: Cli) -> None:
    assert cli("-m", "decoder=ar,sjd", "limit=2", "paper=Table 3") == 0, cli.err
    assert "SJD2 paper, Table 3" in cli.out
    (sweep,) = (cli.runs_dir / "sweeps").iterdir()
    assert {p.suffix for p in sweep.glob("paper.*")} == {".md", ".tex", ".csv"}
