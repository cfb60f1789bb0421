"""Tables of run folders: every number, score and label."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.metrics.speed import Speed
from evaluation.run_folder import RunFolder
from evaluation.score import keep_scores, score
from sweeps.compare.group import compare, group_tables
from sweeps.compare.pair import compare_two, verdict
from sweeps.runs import read_run
from sweeps.tables import figures
from sweeps.tables.rows import standard_error
from tests.helpers.table_runs import CPU, TOKENS, ar, cells, make, table


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots in tests about numbers."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())


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
    assert shown["latency s"] == "1.5 ± 0.71"
    assert shown["speed-up"] == "3.00× [2.00, 5.00]"  # two batches each: from 4 / 2 to 5 / 1
    assert (ours["speedup_low"], ours["speedup_high"], ours["speedup_in_turns"]) == ("2.0", "5.0", "False")
    assert shown["NLL/token (Δ to AR)"] == "2.344 (+0.250 [+0.250, +0.250])"
    assert (shown["N"], shown["batch"], shown["lossless"]) == ("4", "2", "yes")
    assert "FID" not in "".join(shown)  # no run has one
    assert f"Times: {CPU}, torch 2.15.0, float32" in text
    assert "forced tokens" not in text  # this model has none
    assert text.count("Warning: intervals and standard errors are too narrow: fewer than 16 images (all rows).") == 1
    assert text.count("Warning: speed-ups of sjd rest on 2 timings each") == 1
    assert text.count("Warning: sjd and AR were not timed in turns") == 1
    assert text.count("Warning") == 3


def test_a_diffusion_stage_has_seconds_and_a_speed_up_of_its_own(tmp_path: Path) -> None:
    stages = {"pixels": {"diffusion": 3.5}}
    sjd, base = make(tmp_path / "runs", "sjd", **stages), ar(tmp_path / "runs", **stages)
    text, (_, ours) = table(tmp_path, sjd, base)
    shown = cells(text, "sjd")
    assert (shown["AR stage s"], shown["AR stage speed-up"]) == ("1.5 ± 0.71", "3.00× [2.00, 5.00]")
    assert (shown["diffusion s"], shown["whole image s"]) == ("3.5", "5.5")  # 0.5 s of encoding
    assert shown["whole speed-up"] == "1.55× [1.33, 1.80]"  # from 8 / 6 to 9 / 5
    assert (ours["speedup"], float(ours["whole_speedup"]), ours["whole_speedup_timings"]) == ("3.0", 8.5 / 5.5, "2")
    assert (ours["diffusion_s_median"], ours["whole_latency_s_median"]) == ("3.5", "5.5")
    assert float(ours["images_per_s"]) == 4 / (5 + 6)
    assert "one image after the other, the same work for every decoder" in text
    found = score(RunFolder(sjd), {"speed": Speed()})
    assert (found["seconds_diffusion_mean"], found["whole_latency_s_median"]) == (3.5, 5.5)
    assert "seconds_image_mean" not in found
    runs = [read_run(base), read_run(sjd)]
    both = "3.00× [2.00, 5.00] of the AR stage, 1.55× [1.33, 1.80] of the whole image"
    assert f"Speed-up of B over A: {both} (95 %)" in " ".join(verdict(compare_two(*runs)))
    against, *_ = group_tables(compare(runs))
    assert against.header[-2:] == ["AR stage speed-up (95 %)", "whole speed-up (95 %)"]
    assert against.rows[0][-2:] == ["3.00× [2.00, 5.00]", "1.55× [1.33, 1.80]"]
    runs[1].config["model"]["diffusion_offload"] = True  # a slower second stage is not the decoder's doing
    found = compare_two(*runs)
    assert (found.speedup, found.whole_speedup) == (compare_two(runs[0], read_run(sjd)).speedup, None)


def test_tokens_without_images_have_a_table_of_their_own(tmp_path: Path) -> None:
    both = [{}, {"pixels": {}}]
    text, rows = table(
        tmp_path, *(write(tmp_path / "runs", **s) for s in both for write in (ar, lambda to, **s: make(to, "sjd", **s)))
    )
    assert text.count("## toy on shapes") == text.count("## toy, tokens only, on shapes") == 1
    assert [row["speedup"] for row in rows] == ["1.0", "3.0"] * 2
    assert text.count("Tokens only: with model.pixels=none") == 1


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
    assert shown["KID ↓"] == "–"
    assert shown["CLIP score (ViT-B-32) ↑"] == "31.20"
    assert shown["alignment ↑"] == "0.810"
    assert shown["step compression"] == "4.00 (3.90)"
    assert "Counts include forced tokens" in text
    assert rows[1]["fid"] == "12.345"
    assert rows[1]["fid_extractor"] == "net abc"
    assert "features of net abc, reference held-out" in text
    assert "ceiling (VQ reconstructions) 0.970" in text
    assert "chance level on these captions 0.310 to 0.330" in text
    assert "Warning: FID: N=4 is few for 64 features." in text
    assert "KID is –: fewer than 100 images, too few to tell decoders apart." in text
    assert {"kid", "kid_std"} & rows[1].keys() == set()


def test_scores_of_too_few_images_are_dashes(tmp_path: Path) -> None:
    wide = {"protocol": {"fid": "fid: Frechet distance in float64 on 64 features of a net"}}
    few = wide | {"fid": 12.3, "kid": 0.0123, "kid_std": 0.002, "fid_warning": "N=127 is few", "n_images": 127}
    runs = [
        ar(tmp_path / "runs", metrics=few | {"n_images": 128}),
        make(tmp_path / "runs", "sjd", metrics=few),
        make(tmp_path / "runs", "scd", metrics={"fid": 12.3, "n_images": 99, "kid": 0.0123} | wide),
    ]
    text, rows = table(tmp_path, *runs)
    shown = {name: (cells(text, name)["FID ↓"], cells(text, name)["KID ↓"]) for name in ("ar", "sjd", "scd")}
    assert shown == {
        "ar": ("12.30 (N=128)", "0.0123 ± 0.0020 (N=128)"),
        "sjd": ("–", "0.0123 ± 0.0020 (N=127)"),
        "scd": ("–", "–"),
    }
    assert [row["fid"] for row in rows] == ["12.3", "", ""]
    assert "FID of scd, sjd is –: fewer than 128 images, whose covariance" in text
    assert "KID of scd is –: fewer than 100 images" in text
    assert "Warning: FID of ar: N=127 is few" in text  # said once where there is a number, not beside a dash


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
    assert "sjd: scored on only 3 images" in text


def test_a_lossy_decoder_is_labelled_whatever_its_yaml_says(tmp_path: Path) -> None:
    path = make(tmp_path / "runs", "sjd2", lossless=True, parts={"rule": "paper"})
    text, rows = table(tmp_path, path, make(tmp_path / "runs", "lantern", lossless=False))
    assert cells(text, "sjd2 rule=paper")["lossless"] == "**lossy**"
    assert cells(text, "lantern")["lossless"] == "**lossy**"
    assert {row["lossless"] for row in rows} == {"False"}
    assert "**lossy**: the decoder does not sample" in text
    assert r"\textbf{lossy}" in (tmp_path / "out" / "table.tex").read_text()


def test_verdicts_and_rewards_of_single_images_are_paired(tmp_path: Path) -> None:
    paths = [ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd")]
    for path, right in zip(paths, (1.0, 0.0), strict=True):
        values = {(i, 0): right if i == 0 else 1.0 for i in range(4)}
        keep_scores(RunFolder(path), {"geneval": values, "hpsv2": {key: 20 + value for key, value in values.items()}})
    text, rows = table(tmp_path, *paths)
    assert "| images in both | geneval_correct | hpsv2 |" in text
    row = next(row for row in rows if row["label"] == "sjd")
    assert float(row["geneval_correct_difference"]) == float(row["hpsv2_difference"]) == -0.25


def test_labels_name_what_differs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    windows = [make(runs, "sjd", parts={"window": w}) for w in (16, 8, 32)]
    _, rows = table(tmp_path, *windows, make(runs, "scd"), ar(runs))
    assert [row["label"] for row in rows] == ["ar", "scd", "sjd window=8", "sjd window=16", "sjd window=32"]
    _, rows = table(tmp_path, make(runs, "sjd", seed=1), make(runs, "sjd"), ar(runs))
    assert [row["label"] for row in rows] == ["ar seed=0", "sjd seed=0", "sjd seed=1"]
    parts = [
        {"drafter": {"_target_": "baselines.jacobi.Jacobi"}},
        {"drafter": {"_target_": "sjd2.b.Denoise", "levels": 4}},
    ]
    _, rows = table(tmp_path, *(make(runs, "sjd2", parts=p) for p in parts))
    assert [row["label"] for row in rows] == ["sjd2 drafter=denoise", "sjd2 drafter=jacobi"]


def test_labels_name_parts_that_are_not_the_decoders_own(tmp_path: Path) -> None:
    relaxed = [{"verifier": {"_target_": "baselines.lantern.Relaxed", "lam": lam}} for lam in (2, 3)]
    exact = {"verifier": {"_target_": "sjd2.decoding.verify.Exact"}}
    _, rows = table(tmp_path, make(tmp_path / "alone", "sjd2", parts=relaxed[0]))
    assert [row["label"] for row in rows] == ["sjd2 verifier=relaxed"]
    _, rows = table(tmp_path, *(make(tmp_path / "runs", "sjd2", parts=p) for p in (exact, *relaxed)))
    labels = ["sjd2", "sjd2 verifier=relaxed verifier.lam=2", "sjd2 verifier=relaxed verifier.lam=3"]
    assert [row["label"] for row in rows] == labels


def test_runs_of_one_label_are_told_apart(tmp_path: Path) -> None:
    _, rows = table(tmp_path, make(tmp_path / "a", "sjd"), make(tmp_path / "b", "sjd"))
    assert len(rows) == 2
