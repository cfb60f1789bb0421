"""Tables of run folders: every number, every blank that honesty asks for, and the files that are written."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from evaluation.identity import identity
from evaluation.run_folder import RunFolder
from evaluation.score import keep_scores
from sjd2.errors import UserError
from sweeps.multirun import callback
from sweeps.runs import read_run, with_baselines
from sweeps.tables import figures, published
from sweeps.tables.formats import Table, escape, latex, markdown
from sweeps.tables.plots import Point, front
from sweeps.tables.rows import make_rows, standard_error
from sweeps.tables.table import make_tables, show

TOKENS = 16
CPU = "Some CPU, 2 threads"
SPEC = {
    "_target_": "tests.helpers.toy_spec.ToySpec",
    "name": "toy",
    "rows": 4,
    "columns": 4,
    "vocabulary": 12,
    "adapter": None,
}
LAW = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "sampler": "cdf"}


def make(
    runs_dir: Path,
    decoder: str,
    *,
    n: int = 4,
    accepted: tuple[int, ...] = (1, 3, 4, 8),
    latency: float = 1.0,
    nll: float = 32.0,
    lossless: bool = True,
    metrics: dict[str, Any] | None = None,
    hardware: str = CPU,
    threads: int = 2,
    drafts: int = 0,
    **changes: Any,
) -> Path:
    """Write a run folder of n prompts in batches of 2; batch b takes latency + b seconds, image i has nll + i nats."""
    settings = {"name": decoder, "lossless": lossless, "window": 1 if decoder == "ar" else 9} | changes.pop("parts", {})
    spec = SPEC | changes.pop("model", {})
    law = LAW | changes.pop("law", {})
    digest = "base" if spec["adapter"] is None else "tuned"
    prompts = {"digest": changes.pop("prompts", "p1"), "repeats": 1}
    rest = {"seed": 0, "batch_size": 2, "refill": False, "dtype": "float32"} | changes
    known = identity(model=spec, digest=digest, decoder=settings, law=law, prompts=prompts, **rest)
    run = RunFolder(runs_dir / f"toy-{decoder}-{known['id']}")
    config = {"model": spec, "decoder": settings, "prompts": {"name": "shapes"}, "identity": known}
    run.claim(OmegaConf.create(config), known)
    launch = run.launch({"hardware": hardware, "threads": threads, "packages": {"torch": "2.15.0"}})
    for i in range(n):
        image = np.full((8, 8, 3), 20 * i, np.uint8)
        record = {
            "id": [i, 0], "prompt": f"a_shape {i} & <more>", "seed": 100 * rest["seed"] + i, "launch": launch,
            "batch": i // 2, "batch_rows": 2, "tokens": TOKENS, "forwards": len(accepted), "draft_forwards": drafts,
            "accepted": list(accepted), "nll": nll + i,
            "seconds": {"encode": 0.5, "prefill": 0.25, "decode": latency + i // 2 - 0.25, "image": 0.5},
        }  # fmt: skip
        run.append(record | run.write_image((i, 0), image, np.zeros(TOKENS, np.int32)))
    if metrics is not None:
        (run.path / "metrics.json").write_text(json.dumps({"n_images": n, "protocol": {}} | metrics))
    return run.path


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pictures out of tests about numbers."""
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw", lambda *_args, **_settings: figures.Drawn())


@pytest.fixture
def with_pictures() -> None:
    """Let this test draw."""


def ar(runs_dir: Path, **changes: Any) -> Path:
    return make(runs_dir, "ar", **{"accepted": (1,) * TOKENS, "latency": 4.0} | changes)


def table(
    tmp_path: Path, *runs: Path, failed: tuple[dict, ...] = (), **settings: Any
) -> tuple[str, list[dict[str, str]]]:
    """Return the Markdown and the rows of the CSV."""
    text = make_tables(list(runs), tmp_path / "out", failed, **settings)
    assert (tmp_path / "out" / "table.md").read_text() == text
    return text, list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))


def cells(text: str, label: str) -> dict[str, str]:
    """Return one row of the first Markdown table that has it, by heading."""
    header: list[str] = []
    for before, line in zip(["", *text.split("\n")], text.split("\n"), strict=False):
        parts = [part.strip() for part in line.strip("|").split(" | ")] if line.startswith("|") else []
        if line.startswith("|") and not before.startswith("|"):
            header = parts
        elif parts and parts[0] == label:
            return dict(zip(header, parts, strict=False))
    raise AssertionError(f"no row '{label}' in\n{text}")


# ---- numbers


def test_every_number_of_two_runs(tmp_path: Path) -> None:
    text, rows = table(tmp_path, make(tmp_path / "runs", "sjd", nll=36.0, drafts=2), ar(tmp_path / "runs"))
    base, ours = rows
    assert (base["decoder"], ours["decoder"]) == ("ar", "sjd")
    assert float(base["forwards_mean"]) == 16
    assert float(base["step_compression"]) == 1
    assert float(ours["forwards_mean"]) == 4
    assert float(ours["draft_forwards_mean"]) == 2
    assert float(ours["step_compression"]) == 4
    assert float(ours["step_compression_se"]) == 0
    assert float(ours["latency_s_median"]) == 1.5  # 1, 1, 2, 2
    assert float(base["latency_s_median"]) == 4.5  # 4, 4, 5, 5
    assert float(ours["speedup"]) == 3
    assert ours["speedup_images"] == "4"
    assert float(ours["images_per_s"]) == 4 / (2 + 3)  # encoding and pixels take 1 s more per batch
    assert float(ours["nll_per_token"]) == pytest.approx((36 + 37 + 38 + 39) / 4 / TOKENS)
    assert float(ours["nll_per_token_difference"]) == pytest.approx(4 / TOKENS)
    assert float(ours["nll_per_token_low"]) == pytest.approx(4 / TOKENS)  # every prompt differs by the same 4 nats
    assert (ours["n"], ours["batch_size"], ours["hardware"], ours["window"]) == ("4", "2", CPU, "9")
    shown = cells(text, "sjd")
    assert shown["passes"] == "4.0 + 2.0 draft"
    assert shown["step compression"] == "4.00"
    assert shown["latency s"] == "1.5"
    assert shown["speed-up"] == "3.00×"
    assert shown["NLL/token (Δ to AR)"] == "2.344 (+0.250 [+0.250, +0.250])"
    assert (shown["N"], shown["batch"], shown["lossless"]) == ("4", "2", "yes")
    assert "FID" not in "".join(shown)  # no run has one
    assert f"Times: {CPU}, torch 2.15.0, float32" in text
    assert "Counts include forced" in text
    assert text.count("Warning: all rows: with fewer than 16 images") == 1
    assert text.count("Warning: speed-ups of sjd rest on 2 timings each") == 1
    assert text.count("Warning") == 2


def test_standard_error_counts_repeats_of_a_prompt_once() -> None:
    assert standard_error({(0, 0): 1.0, (0, 1): 3.0, (1, 0): 4.0}) == pytest.approx(1.0)  # means 2 and 4
    assert standard_error({(0, 0): 1.0, (0, 1): 3.0}) is None


def test_scores_stand_with_what_made_them(tmp_path: Path) -> None:
    scores = {
        "fid": 12.345, "fid_extractor": "net abc", "fid_reference": "held-out", "kid": 0.01234, "kid_std": 0.002,
        "alignment": 0.81, "alignment_ceiling": 0.97, "alignment_chance": 0.31, "clip_score": 31.2,
        "clip_model": "ViT-B-32", "step_compression_free": 3.9, "fid_warning": "N=4 is few for 64 features.",
    }  # fmt: skip
    runs = tmp_path / "runs"
    text, rows = table(
        tmp_path, ar(runs, metrics=scores), make(runs, "sjd", metrics=scores | {"alignment_chance": 0.33})
    )
    shown = cells(text, "sjd")
    assert shown["FID (net) ↓"] == "12.35" or shown["FID (net) ↓"] == "12.34"
    assert shown["KID ↓"] == "0.0123 ± 0.0020"
    assert shown["CLIP score (ViT-B-32) ↑"] == "31.20"
    assert shown["alignment ↑"] == "0.810"
    assert shown["step compression"] == "4.00 (3.90)"
    assert rows[1]["fid"] == "12.345"
    assert rows[1]["fid_extractor"] == "net abc"
    assert "features of net abc, reference held-out" in text
    assert "ceiling (VQ reconstructions) 0.970" in text
    assert "chance 0.310 to 0.330" in text
    assert "Warning: FID: N=4 is few for 64 features." in text


def test_paired_differences_of_scores(tmp_path: Path) -> None:
    paths = [
        ar(tmp_path / "runs", metrics={"alignment": 0.5}),
        make(tmp_path / "runs", "sjd", metrics={"alignment": 0.75}),
    ]
    for path, value in zip(paths, (0.5, 0.75), strict=True):
        keep_scores(RunFolder(path), {"alignment": {(i, 0): value + 0.1 * i for i in range(4)}})
    text, rows = table(tmp_path, *paths)
    assert float(rows[1]["alignment_difference"]) == pytest.approx(0.25)
    assert rows[0]["alignment_difference"] == ""
    assert "| sjd | 4 | +0.250 [+0.250, +0.250] |" in text


def test_scores_of_fewer_images_are_marked(tmp_path: Path) -> None:
    path = make(tmp_path / "runs", "sjd", metrics={"fid": 9.0, "fid_extractor": "net abc", "n_images": 3})
    text, rows = table(tmp_path, path)
    assert cells(text, "sjd")["FID (net) ↓"] == "9.00 (N=3)"
    assert rows[0]["n_scored"] == "3"
    assert "sjd: scored on 3 images only" in text


def test_a_lossy_decoder_is_labelled_whatever_its_yaml_says(tmp_path: Path) -> None:
    path = make(tmp_path / "runs", "sjd2", lossless=True, parts={"rule": "paper"})
    text, rows = table(tmp_path, path, make(tmp_path / "runs", "lantern", lossless=False))
    assert cells(text, "sjd2 rule=paper")["lossless"] == "**lossy**"
    assert cells(text, "lantern")["lossless"] == "**lossy**"
    assert {row["lossless"] for row in rows} == {"False"}
    assert "**lossy**: the decoder does not sample" in text
    assert r"\textbf{lossy}" in (tmp_path / "out" / "table.tex").read_text()


# ---- comparisons that must not be made


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch_size": 4}, "batch_size"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"refill": True}, "refill"),
        ({"law": {"sampler": "gumbel"}}, "sampler"),
        ({"hardware": "Another CPU, 2 threads"}, "hardware, threads or images"),
        ({"threads": 8}, "hardware, threads or images"),
    ],
)
def test_no_speedup_against_an_ar_run_of_other_settings(tmp_path: Path, change: dict, reason: str) -> None:
    text, rows = table(tmp_path, ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd", **change))
    ours = next(row for row in rows if row["decoder"] == "sjd")
    assert ours["speedup"] == ""
    assert f"the nearest AR run differs in {reason}." in text
    label = ours["label"]
    assert cells(text, label)["speed-up"] == ""
    assert cells(text, label)["NLL/token (Δ to AR)"].startswith(
        "2.0"
    )  # the prompts are the same, so this still compares


def test_the_right_ar_run_is_chosen(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    fast = ar(runs, batch_size=4, latency=100.0)
    _, rows = table(tmp_path, fast, ar(runs), make(runs, "sjd"), make(runs, "sjd", batch_size=4))
    found = {(row["decoder"], row["batch_size"]): row["speedup"] for row in rows}
    assert float(found["sjd", "2"]) == 3
    assert float(found["sjd", "4"]) == pytest.approx(100.5 / 1.5)


def test_times_come_from_one_hardware_only(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    other = make(runs, "scd", hardware="Another CPU, 2 threads")
    text, rows = table(tmp_path, ar(runs), make(runs, "sjd"), other)
    ours = next(row for row in rows if row["decoder"] == "scd")
    assert (ours["latency_s_median"], ours["images_per_s"], ours["hardware"], ours["n_timed"]) == ("", "", "", "0")
    assert cells(text, "scd")["latency s"] == ""
    assert "times of scd are of 0 images" in text


def test_a_run_resumed_on_other_hardware_is_timed_on_the_common_part(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    path = make(runs, "sjd", n=2)
    run = RunFolder(path)
    launch = run.launch({"hardware": "Another CPU", "threads": 2})
    for i, record in ((2, run.records()[0]), (3, run.records()[1])):
        run.append(record | {"id": [i, 0], "launch": launch, "seconds": dict.fromkeys(record["seconds"], 0.001)})
    text, rows = table(tmp_path, ar(runs), path)
    ours = rows[1]
    assert (ours["n"], ours["n_timed"], ours["speedup_images"]) == ("4", "2", "2")
    assert float(ours["latency_s_median"]) == 1
    assert float(ours["speedup"]) == 4  # the first two images of both
    assert "times of sjd are of 2 images" in text


def test_traced_images_count_in_no_time(tmp_path: Path) -> None:
    path = make(tmp_path / "runs", "sjd")
    RunFolder(path).write_trace((3, 0), [(0.1, 16)])
    _, rows = table(tmp_path, path)
    assert rows[0]["n_timed"] == "3"
    assert float(rows[0]["latency_s_median"]) == 1


def test_different_n_are_compared_on_the_common_images(tmp_path: Path) -> None:
    text, rows = table(tmp_path, ar(tmp_path / "runs", n=3), make(tmp_path / "runs", "sjd", n=6, nll=40.0))
    ours = rows[1]
    assert (ours["speedup_images"], ours["n_compared"]) == ("3", "3")
    assert float(ours["speedup"]) == 4  # of 4, 4, 5 and 1, 1, 2
    assert float(ours["nll_per_token_difference"]) == pytest.approx(8 / TOKENS)
    assert "Warning: runs have different N (3, 6)" in text


def test_different_extractors_are_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    a = ar(runs, metrics={"fid": 1.0, "fid_extractor": "net a"})
    text, _ = table(tmp_path, a, make(runs, "sjd", metrics={"fid": 2.0, "fid_extractor": "net b"}))
    assert cells(text, "sjd")["FID ↓"] == "2.00 (net b)"
    assert "FID and KID of different extractors do not compare" in text


def test_an_adapter_is_marked_and_ar_with_it_preferred(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    ours = make(runs, "sjd2", model={"adapter": "weights/sjd2"})
    text, rows = table(tmp_path, ar(runs), ours)
    assert cells(text, "sjd2")["speed-up"] == "3.00×†"
    assert "the same model without one" in text
    text, rows = table(tmp_path, ar(runs), ours, ar(runs, model={"adapter": "weights/sjd2"}, latency=9.0))
    row = next(row for row in rows if row["decoder"] == "sjd2")
    assert float(row["speedup"]) == pytest.approx(9.5 / 1.5)
    assert "†" not in text


@pytest.mark.parametrize("change", [{"law": {"temperature": 0.5}}, {"prompts": "p2"}, {"model": {"rows": 8}}])
def test_what_does_not_compare_stands_in_two_tables(tmp_path: Path, change: dict) -> None:
    text, rows = table(tmp_path, ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd", **change))
    assert text.count("| decoder |") == 2
    assert all(row["speedup"] == "" for row in rows if row["decoder"] == "sjd")
    assert "no speed-up for sjd: no AR run is there." in text


def test_verdicts_and_rewards_of_single_images_are_paired(tmp_path: Path) -> None:
    paths = [ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd")]
    for path, right in zip(paths, (1.0, 0.0), strict=True):
        values = {(i, 0): right if i == 0 else 1.0 for i in range(4)}
        keep_scores(RunFolder(path), {"geneval": values, "hpsv2": {key: 20 + value for key, value in values.items()}})
    text, rows = table(tmp_path, *paths)
    assert "| images in both | geneval_correct | hpsv2 |" in text
    row = next(row for row in rows if row["label"] == "sjd")
    assert float(row["geneval_correct_difference"]) == float(row["hpsv2_difference"]) == -0.25


def test_a_busy_machine_is_told(tmp_path: Path) -> None:
    quiet, busy = ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd", n=8)
    for path, share in ((quiet, 0.99), (busy, 0.52)):
        RunFolder(path).close_launch(0, {"cpu_share": share})
    text, _ = table(tmp_path, quiet, busy)
    assert "Warning: times of sjd are too long: other work had the CPU, they got 52 % of their time." in text
    assert "rest on" not in text  # four timings


def test_a_sweep_that_was_cut_names_what_it_sweeps(tmp_path: Path) -> None:
    jobs = [
        {"status": "failed", "reason": "window must be 1 or more.", "overrides": ["decoder=sjd", "decoder.window=-1"]},
        {"status": "failed", "reason": "has not started: it waits.", "overrides": ["decoder=sjd", "decoder.window=16"]},
    ]
    text = make_tables([make(tmp_path / "runs", "sjd")], tmp_path / "out", jobs)
    assert "| sjd window=9 | yes |" in text
    assert "| sjd window=-1 | failed: window must be 1 or more. |" in text
    assert "| sjd window=16 | has not started: it waits. |" in text


# ---- labels


def test_labels_name_what_differs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    windows = [make(runs, "sjd", parts={"window": w}) for w in (16, 8, 32)]
    _, rows = table(tmp_path, *windows, make(runs, "scd"), ar(runs))
    assert [row["label"] for row in rows] == ["ar", "scd", "sjd window=8", "sjd window=16", "sjd window=32"]
    _, rows = table(tmp_path, make(runs, "sjd", seed=1), make(runs, "sjd"), ar(runs))
    assert [row["label"] for row in rows] == ["ar seed=0", "sjd seed=0", "sjd seed=1"]
    parts = [{"drafter": {"_target_": "a.b.Jacobi"}}, {"drafter": {"_target_": "a.b.Denoise", "levels": 4}}]
    _, rows = table(tmp_path, *(make(runs, "sjd2", parts=p) for p in parts))
    assert [row["label"] for row in rows] == ["sjd2 drafter=Denoise", "sjd2 drafter=Jacobi"]


def test_labels_name_parts_that_are_not_the_decoders_own(tmp_path: Path) -> None:
    relaxed = [{"verifier": {"_target_": "baselines.lantern.Relaxed", "lam": lam}} for lam in (2, 3)]
    exact = {"verifier": {"_target_": "sjd2.decoding.verify.Exact"}}
    _, rows = table(tmp_path, make(tmp_path / "alone", "sjd2", parts=relaxed[0]))
    assert [row["label"] for row in rows] == ["sjd2 verifier=relaxed"]
    _, rows = table(tmp_path, *(make(tmp_path / "runs", "sjd2", parts=p) for p in (exact, *relaxed)))
    labels = ["sjd2", "sjd2 verifier=relaxed verifier.lam=2", "sjd2 verifier=relaxed verifier.lam=3"]
    assert [row["label"] for row in rows] == labels


def test_twins_are_told_apart(tmp_path: Path) -> None:
    _, rows = table(tmp_path, make(tmp_path / "a", "sjd"), make(tmp_path / "b", "sjd"))
    assert len(rows) == 2


# ---- failed jobs


def test_failed_jobs_are_rows(tmp_path: Path) -> None:
    job = {"status": "failed", "reason": "window 999 exceeds | 144\ntokens.", "run_dir": None}
    job["overrides"] = ["decoder=sjd", "decoder.window=999", "seed=1"]
    text, rows = table(tmp_path, ar(tmp_path / "runs"), failed=(job,))
    assert "| sjd window=999 seed=1 | failed: window 999 exceeds \\| 144 tokens. |" in text
    assert rows[1] == dict.fromkeys(rows[1], "") | {
        "label": "sjd window=999 seed=1", "status": "failed", "reason": "window 999 exceeds | 144 tokens.",
    }  # fmt: skip
    assert "failed: window 999" in (tmp_path / "out" / "table.tex").read_text()


def test_only_failed_jobs(tmp_path: Path) -> None:
    text, rows = table(tmp_path, failed=({"status": "failed", "reason": "no weights.", "overrides": ["decoder=sjd2"]},))
    assert "| sjd2 | failed: no weights. |" in text
    assert len(rows) == 1


def test_an_unreadable_folder_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "config.yaml").write_text("decoder: {name: sjd}\n")
    text, _ = table(tmp_path, ar(tmp_path / "runs"), tmp_path / "runs" / "old")
    assert "| old | failed:" in text
    assert "no identity" in text
    assert cells(text, "ar")["N"] == "4"


def test_nothing_to_show_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder here holds an image"):
        make_tables([], tmp_path)


# ---- the multirun's end


def sweep(folder: Path, *jobs: dict[str, Any] | None) -> Path:
    for number, job in enumerate(jobs):
        (folder / str(number)).mkdir(parents=True)
        if job is not None:
            (folder / str(number) / "status.json").write_text(json.dumps(job))
    return folder


def ok(path: Path) -> dict[str, Any]:
    return {"status": "ok", "reason": None, "run_dir": str(path), "overrides": []}


def test_callback_tabulates_all_jobs_and_counts_the_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    ar(runs)  # made as a baseline, so no job names it
    ar(runs, batch_size=8)  # of other settings: stays out
    failed = {"status": "failed", "reason": "out of memory.", "run_dir": None, "overrides": ["decoder=scd"]}
    monkeypatch.setattr(callback.Tables, "failed", 0)
    folder = sweep(
        tmp_path / "sweep", ok(make(runs, "sjd")), failed, None, *(ok(make(runs, f"d{i}")) for i in range(9))
    )
    callback.Tables().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert callback.Tables.failed == 2
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [row["decoder"] for row in rows if row["status"] == "ok"] == ["ar", *(f"d{i}" for i in range(9)), "sjd"]
    assert [row["reason"] for row in rows if row["status"] == "failed"] == ["out of memory.", callback.KILLED]
    assert "out of memory." in capsys.readouterr().out
    assert callback.main([str(folder)]) == 1
    assert callback.main([str(folder / "nowhere")]) == 2


def test_callback_of_a_multirun_without_runs_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback.Tables, "failed", 0)
    folder = sweep(tmp_path / "sweep", ok(tmp_path))  # e.g. stage=bench: its folder is no run folder
    callback.Tables().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert callback.Tables.failed == 0
    assert not (folder / "table.md").exists()


def test_jobs_are_in_order_of_number(tmp_path: Path) -> None:
    folder = sweep(tmp_path, *({"status": "ok", "run_dir": None, "overrides": [str(i)]} for i in range(12)))
    assert [job["overrides"][0] for job in callback.statuses(folder)] == [str(i) for i in range(12)]


def test_failed_jobs_are_named_by_what_differs(tmp_path: Path) -> None:
    jobs = [["decoder=sjd", "limit=4", f"decoder.window={w}"] for w in (0, 8)]
    folder = sweep(
        tmp_path, *({"status": "failed", "reason": "x.", "run_dir": None, "overrides": o} for o in jobs), None
    )
    assert [job["overrides"] for job in callback.statuses(folder)] == [
        ["decoder=sjd", "decoder.window=0"], ["decoder=sjd", "decoder.window=8"], ["job 2"],
    ]  # fmt: skip


def test_baselines_beside_runs_are_found(tmp_path: Path) -> None:
    base, ours = ar(tmp_path), make(tmp_path, "sjd")
    ar(tmp_path, seed=7)
    assert with_baselines([ours]) == [ours.resolve(), base.resolve()]


# ---- formats


def test_latex_escapes() -> None:
    assert escape("a_b & 50% $x$ #1 {y} ~ ^ \\ <1>") == (
        r"a\_b \& 50\% \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{} \textless{}1\textgreater{}"
    )
    assert (
        escape("2.0 ± 0.1, 3×, Δ ↓ **lossy** †")
        == r"2.0 $\pm$ 0.1, 3$\times$, $\Delta$ $\downarrow$ \textbf{lossy} $\dagger$"
    )


def test_latex_table_has_as_many_cells_as_columns() -> None:
    text = latex(Table("t_1", ["a", "b", "c"], [["1", "2", "3"]], notes=["50 %"], failed=[("x_y", "it & that")]))
    assert r"\begin{tabular}{lrr}" in text
    assert r"1 & 2 & 3 \\" in text
    assert r"x\_y & \multicolumn{2}{p{0.7\linewidth}}{failed: it \& that} \\" in text
    assert r"50 \%" in text
    assert text.count("{") == text.count("}")


def test_markdown_rows_are_one_line_each() -> None:
    text = markdown(Table("t", ["a", "b"], [["x|y", "1\n2"]], failed=[("j", "r")]))
    assert "| x\\|y | 1 2 |\n| j | failed: r |\n" in text


def test_show_prints_plain_text_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show("## t\n\n| a |\n| :--- |\n| 1 |\n\n![grid](grid.png)\n")
    assert capsys.readouterr().out == "## t\n\n| a |\n| :--- |\n| 1 |\n"


# ---- pictures


def test_pareto_front() -> None:
    a, b, c = Point("a", 1.0, 5.0, True), Point("b", 2.0, 3.0, True), Point("c", 3.0, 4.0, True)
    assert front([c, b, a], lower_is_better=True) == [a, b]
    assert front([c, b, a], lower_is_better=False) == [a]


def test_the_image_grid_takes_only_equal_seeds(tmp_path: Path) -> None:
    runs = [read_run(make(tmp_path, "sjd", n=2)), read_run(ar(tmp_path)), read_run(make(tmp_path, "sjd", seed=3))]
    alike, ids = figures.same_seeds(runs)
    assert alike == runs[:2]
    assert ids == [(0, 0), (1, 0)]


def test_accepted_counts_leave_the_prefill_out(tmp_path: Path) -> None:
    assert figures.accepted_counts(read_run(make(tmp_path, "sjd", n=2))) == {3: 2, 4: 2, 8: 2}


@pytest.mark.usefixtures("with_pictures")
def test_pictures_are_drawn_and_earlier_ones_do_not_stay(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    known = {"fid": 2.0, "fid_extractor": "net a", "kid": 0.1, "kid_std": 0.02}
    text, _ = table(tmp_path, ar(runs, metrics=known), make(runs, "sjd", metrics=known | {"fid": 3.0}))
    for name in ("pareto", "grid", "acceptance", "accepted"):
        with Image.open(out / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 10
        assert f"({name}.png)" in text
    text, _ = table(tmp_path, ar(runs))  # nothing to compare any more
    assert {path.name for path in out.glob("*.png")} == {"grid.png"}
    assert "pareto" not in text


def test_the_pareto_plot_mixes_neither_networks_nor_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict] = []
    monkeypatch.setattr(figures, "pareto", lambda panels, *_args, **_settings: drawn.append(panels))
    for first, second in (({"fid_extractor": "a"}, {"fid_extractor": "b"}), ({}, {"n": 6}), ({}, {})):
        runs = [
            ar(tmp_path, metrics={"fid": 1.0} | first),
            make(tmp_path, "sjd", n=second.pop("n", 4), metrics={"fid": 2.0} | second),
        ]
        figures._pareto(make_rows([read_run(path) for path in runs], (CPU, 2)), tmp_path / "x.png", "t")
        for path in runs:
            shutil.rmtree(path)
    assert [list(panels) for panels in drawn] == [[figures.LIKELIHOOD]] * 2 + [["FID"]]


def test_acceptance_counts_the_passes_a_guess_waited(tmp_path: Path) -> None:
    # window 9 holds 8 guesses: after the prefill 1..8, of which 1..3 commit; then 4..11, of which 4..7; then 8..15
    waited = figures.mean_waiting(read_run(make(tmp_path, "sjd", n=2)))
    assert waited.tolist() == [0] * 4 + [1] * 4 + [2] + [1] * 3 + [0] * 4


# ---- published figures


def test_published_figures_are_read() -> None:
    rows = published.read()
    assert len(rows) > 200
    first = rows[0]
    assert (first.method, first.steps, first.step_compression, first.latency_s, first.fid) == (
        "AR",
        2357,
        1.0,
        None,
        30.8,
    )
    found = published.select("lumina", ["sjd2"])
    assert {row.model for row in found} <= {row.model for row in rows if row.model.startswith("Lumina")}
    assert any(row.step_compression == 4.02 and row.fid == 31.4 for row in found)
    assert not any("single prompt" in row.dataset or row.method.startswith("SJD +") for row in found)
    assert published.select("tiny", ["sjd2"]) == []


def test_published_figures_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    ours = make(tmp_path / "runs", "sjd2", model={"name": "lumina"})
    text, rows = table(tmp_path, ours, published=True)
    assert "| SJD2 | Lumina-mGPT (768 px) | COCO2017 val (5k) | 592 | 4.02 |" in text
    assert "context, not rows to subtract from" in text
    assert len(rows) == 1  # the CSV holds our runs only
    text, _ = table(tmp_path, make(tmp_path / "runs", "sjd2"), published=True)
    assert "has no figures of this model" in text


def test_shell_completion_stays_quick() -> None:
    code = "import sys, sweeps.multirun.callback; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
