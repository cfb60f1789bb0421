"""Runs from the command line: resume, batches, baseline, multirun, scoring, fine-tuning."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.run_folder import RunFolder, run_folders
from harness import sample as sampling
from harness.grids import waiting
from harness.meter import Meter
from sjd2.decoding.generate import WARM_UP_PASSES, generate
from sjd2.files import ROOT
from tests.helpers.cli import Cli

SLOW = {"TOY_SECONDS_PER_BATCH": "0.6"}


def tokens(run: RunFolder) -> dict[tuple, str]:
    return {tuple(r["id"]): r["tokens_sha256"] for r in run.records()}


def lines(run: RunFolder) -> list[bytes]:
    return (run.path / "samples.jsonl").read_bytes().splitlines()


def wait_for_records(cli: Cli, process: subprocess.Popen, count: int) -> RunFolder:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        found = run_folders(cli.runs_dir)
        if found and len(RunFolder(found[0]).records()) >= count:
            return RunFolder(found[0])
        time.sleep(0.05)
    raise AssertionError(f"no records came: {process.communicate()[0]}")


# ---- resume


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_kill_and_start_again(cli: Cli) -> None:
    command = ("decoder=sjd", "limit=18", "baseline=null")
    process = cli.start(*command, **SLOW)
    run = wait_for_records(cli, process, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(run.records())
    assert 4 <= before < 18
    with (run.path / "samples.jsonl").open("ab") as file:
        file.write(b'{"id": [9, 0], "tok')  # as if the kill had hit the write of a line
    assert cli(*command) == 0
    assert f"{before} of 18 images are there, resuming" in cli.out
    assert "1 line(s) cut by a kill" in cli.out
    assert [r["id"] for r in run.records()] == [[i, 0] for i in range(18)]
    assert len(lines(run)) == 18
    assert {r["launch"] for r in run.records()} == {0, 1}

    cli.runs_dir = cli.runs_dir.with_name("undisturbed")
    assert cli(*command) == 0
    other = cli.run("sjd")
    assert other.path.name == run.path.name
    assert tokens(run) == tokens(other)
    for a, b in zip(run.images(), other.images(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_sigterm_ends_after_the_batch_in_hand(cli: Cli) -> None:
    process = cli.start("decoder=ar", "limit=40", **SLOW)
    run = wait_for_records(cli, process, 4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "finishing the batch in hand" in output
    assert "the same command resumes" in output
    assert "Traceback" not in output
    done = run.records()
    assert 4 <= len(done) < 40
    assert len(done) % 4 == 0
    assert "peak_memory_gb" in run.provenance()[0]


@pytest.mark.usefixtures("plain")
def test_only_missing_records_of_a_cut_batch_are_written(cli: Cli) -> None:
    command = ("decoder=sjd", "limit=10", "baseline=null")
    assert cli(*command) == 0
    run = cli.run("sjd")
    whole, before = lines(run), tokens(run)
    (run.path / "samples.jsonl").write_bytes(b"\n".join(whole[:5] + whole[7:]) + b"\n")  # batch 1 lacks two of its four
    assert cli(*command) == 0
    assert len(lines(run)) == 10
    assert tokens(run) == before
    again = [r for r in run.records() if r["launch"] == 1]
    assert [r["id"][0] for r in again] == [5, 6]
    assert {r["batch_rows"] for r in again} == {4}  # the batch ran whole


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_a_higher_limit_continues_the_same_run(cli: Cli) -> None:
    assert cli("decoder=sjd", "limit=3", "baseline=null") == 0
    run = cli.run("sjd")
    assert len(run.records()) == 3
    assert cli("decoder=sjd", "limit=9", "baseline=null") == 0
    assert cli("decoder=sjd", "limit=2", "baseline=null") == 0
    assert "all 2 images are there" in cli.out
    assert "weights are loaded" not in cli.out
    assert len(run.records()) == 9
    assert run.config.limit == 2
    assert [entry["launch"] for entry in run.provenance()] == [0, 1]
    cli.runs_dir = cli.runs_dir.with_name("at-once")
    assert cli("decoder=sjd", "limit=9", "baseline=null") == 0
    assert tokens(cli.run("sjd")) == tokens(run)


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_refill_has_the_same_tokens_and_resumes(cli: Cli) -> None:
    command = ("decoder=sjd", "limit=7", "dtype=float64", "baseline=null")
    assert cli(*command) == 0
    plain = tokens(cli.run("sjd"))
    cli.runs_dir = cli.runs_dir.with_name("refill")
    assert cli(*command, "refill=true") == 0
    run = cli.run("sjd")
    assert tokens(run) == plain
    kept = [line for line in lines(run) if json.loads(line)["id"][0] not in (2, 5)]
    (run.path / "samples.jsonl").write_bytes(b"\n".join(kept) + b"\n")
    assert cli(*command, "refill=true") == 0
    assert tokens(run) == plain
    assert all(r["seconds"]["decode"] > 0 for r in run.records())


def test_what_decides_the_tokens_decides_the_folder(cli: Cli) -> None:
    same = [(), ("limit=1",), ("device=cpu",), ("runtime=all",), ("evaluation=clip", "stage=sample"), ("trace=1",)]
    same += [("decoder.draft_in_prefill=false",), ("~decoder.draft_in_prefill",)]  # release 0.1 has no such setting
    other = [
        ("seed=1",),
        ("decoder.window=8",),
        ("temperature=0.5",),
        ("batch_size=2",),
        ("dtype=float64",),
        ("refill=true",),
    ]
    other += [("prompts.repeats=2",), ("model.rows=5",), ("sampler=gumbel",), ("decoder.drafter.init=left",)]
    other += [("decoder.draft_in_prefill=true",)]
    names = [planned(cli, "decoder=sjd", *arguments) for arguments in same + other]
    assert len(set(names[: len(same)])) == 1
    assert len(set(names)) == 1 + len(other)


def planned(cli: Cli, *arguments: str) -> str:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from harness.plan import make_plan
    from sjd2.config import CONF

    GlobalHydra.instance().clear()
    kept = [
        argument
        for argument in cli.arguments(*arguments)[1:]
        if not argument.startswith("/") and argument != "--config-dir"
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*kept, f"hydra.searchpath=['file://{ROOT / 'tests' / 'conf'}']"])
    return make_plan(cfg).run.path.name


@pytest.mark.usefixtures("plain")
def test_a_folder_of_another_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    command = ("decoder=ar", "limit=2", f"run_dir={tmp_path / 'mine'}")
    assert cli(*command) == 0
    before = lines(RunFolder(tmp_path / "mine"))
    assert cli(*command, "seed=7") == 1
    assert "holds another run (seed: 0 there, 7 asked for)" in cli.err
    assert "weights are loaded" not in cli.out
    assert lines(RunFolder(tmp_path / "mine")) == before


@pytest.mark.usefixtures("plain")
def test_a_folder_in_use_is_refused(cli: Cli) -> None:
    assert cli("decoder=ar", "limit=2") == 0
    with cli.run("ar").lock():
        assert cli("decoder=ar", "limit=3") == 1
    assert f"in use by process {os.getpid()} on " in cli.err
    assert cli("decoder=ar", "limit=3") == 0


# ---- what is written


def test_the_run_folder(cli: Cli) -> None:
    assert cli("decoder=sjd", "limit=6", "trace=2", "baseline=null") == 0
    run = cli.run("sjd")
    for record in run.records():
        assert sum(record["accepted"]) == record["tokens"] == 16
        assert len(record["accepted"]) == record["forwards"]
        assert set(record["seconds"]) == {"encode", "prefill", "decode", "image"}
        assert record["nll"] > 0
        assert run.tokens(record).shape == (16,)
    traced = [record["id"][0] for record in run.records() if run.traced(record)]
    assert traced == [0, 1, 2, 3]  # whole batches: every image of a traced batch was slowed
    trace = json.loads((run.path / "traces" / "00000_0.json").read_text())
    assert trace[-1][1] == 16
    assert trace == sorted(trace)
    assert {path.name for path in run.path.iterdir()} >= {"config.yaml", "grid.png", "acceptance.png", "metrics.json"}
    assert run.metrics["n_images"] == 6
    (launch,) = run.provenance()
    assert launch["hardware"].endswith("1 thread")
    assert launch["dtype"] == "float32"
    assert launch["packages"]["torch"]
    assert cli.out.splitlines()[-1] == f"run folder: {run.path}"


@pytest.mark.full
def test_tokens_without_images(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.toy_spec.SlowToy.decode", None)
    assert cli("decoder=sjd", "model.pixels=none", "limit=4", "evaluation=tiny") == 0
    assert (
        "tokens without images (model.pixels=none): fid, clip, alignment cannot be measured and are left out" in cli.out
    )
    assert "grid.png" not in cli.out
    run, base = cli.run("sjd"), cli.run("ar")
    for found in (run, base):
        assert len(found.records()) == len(list((found.path / "tokens").iterdir())) == 4
        assert not {"images", "grid.png"} & {path.name for path in found.path.iterdir()}
        assert {tuple(r["seconds"]) for r in found.records()} == {("encode", "prefill", "decode")}
        assert not [r for r in found.records() if "image" in r]
        assert {"seconds_decode_mean", "nll_per_token"} <= found.metrics.keys()
        assert not {"seconds_image_mean", "fid", "kid"} & found.metrics.keys()
    assert run.identity["pixels"] == "none"
    assert cli("stage=score", f"run_dir={run.path}", "evaluation=tiny") == 0
    assert "fid, clip, alignment cannot be measured" in cli.out
    assert cli("stage=table") == 0
    assert "## toy, tokens only, on shapes" in cli.out
    assert "Skipped" not in cli.out


@pytest.mark.usefixtures("plain")
def test_the_warm_up_is_short_and_leaves_no_record(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def spy(model, decoder, cond, seeds, *, sampling, on_step=None, graphs=None):
        passes.append(0)

        def count(step):
            passes[-1] += 1
            if on_step is not None:
                on_step(step)

        return generate(model, decoder, cond, seeds, sampling=sampling, on_step=count, graphs=graphs)

    monkeypatch.setattr(sampling, "generate", spy)
    monkeypatch.setattr(importlib.import_module("sjd2.decoding.generate"), "generate", spy)  # of the warm-up
    assert cli("decoder=ar", "limit=6") == 0
    assert passes == [WARM_UP_PASSES, 15, 15]  # the first token comes from the prefill
    assert len(cli.run("ar").records()) == 6
    assert cli.run("ar").provenance()[0]["warm_up_s"] > 0
    assert cli.run("ar").metrics["dtype"] == cli.run("ar").settings["dtype"] == "float32"


def test_waiting_passes() -> None:
    assert waiting([1, 1, 1, 1], window=1).tolist() == [0, 0, 0, 0]  # AR drafts nothing
    # pass 1 from n = 1 drafts 1 2 3 and commits 1; pass 2 drafts 2 3 4 and commits 2 3 4; pass 3 commits 5
    assert waiting([1, 1, 3, 1], window=4).tolist() == [0, 0, 1, 1, 0, 0]
    # the prefill drafts 0 1 2 and commits 0, so 1 and 2 have waited once more
    assert waiting([1, 1, 3, 1], window=4, draft_in_prefill=True).tolist() == [0, 1, 2, 1, 0, 0]


# ---- baseline and multirun


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_the_baseline_is_made_once_with_its_own_decoder_settings(cli: Cli) -> None:
    assert cli("decoder=sjd", "decoder.window=4", "limit=4", "seed=3", "temperature=0.9") == 0
    run = cli.run("ar")
    assert run.config.decoder.window == 1
    assert (run.config.seed, run.config.temperature) == (3, 0.9)
    assert len(run.records()) == 4
    assert "| ar |" in cli.out
    assert "| sjd |" in cli.out
    assert cli("decoder=sjd", "decoder.window=8", "limit=4", "seed=3", "temperature=0.9") == 0
    assert len(run.provenance()) == 1
    assert cli("decoder=sjd", "limit=2", "baseline=null") == 0
    assert len([path for path in run_folders(cli.runs_dir) if path.name.startswith("toy-ar-")]) == 1


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_a_multirun_goes_on_past_a_failed_job(cli: Cli) -> None:
    code = cli("-m", "decoder=jacobi,sjd", "decoder.window=4,0", "limit=2")
    assert code == 1
    (sweep,) = (cli.runs_dir / "sweeps").iterdir()
    statuses = [json.loads((sweep / str(n) / "status.json").read_text()) for n in range(4)]
    assert [s["status"] for s in statuses] == ["ok", "failed", "ok", "failed"]
    assert "decoder.window must be 1 or more" in statuses[1]["reason"]
    assert Path(statuses[0]["run_dir"]).name.startswith("toy-jacobi-")
    table = (sweep / "table.md").read_text()
    assert "failed" in table
    assert "| ar |" in table  # made by the first job, found by the next
    assert len(cli.run("ar").provenance()) == 1
    assert cli("-m", "decoder=ar,sjd", "decoder.window=1", "limit=2") == 0


@pytest.mark.usefixtures("plain")
def test_a_lower_limit_tabulates_its_own_images(cli: Cli) -> None:
    assert cli("decoder=sjd", "limit=8", "evaluation=tiny", "output=json") == 0
    known = cli.run("sjd").metrics
    assert [row["n"] for row in json.loads(cli.out)] == [8, 8]  # nothing else is on stdout
    assert "8/8 images" in cli.err
    assert cli("decoder=sjd", "limit=2", "evaluation=tiny", "output=json") == 0
    rows = {row["decoder"]: row for row in json.loads(cli.out)}
    assert [row["n"] for row in rows.values()] == [2, 2]
    first = cli.run("sjd").records()[:2]
    assert rows["sjd"]["forwards_mean"] == sum(record["forwards"] for record in first) / 2
    assert rows["sjd"]["n_scored"] == 2
    assert rows["sjd"]["n_compared"] == 2
    assert "has more images than limit=2" in cli.err
    assert cli.run("sjd").metrics == known  # of all images, as before
    assert cli("-m", "decoder=ar,sjd", "limit=3", "evaluation=tiny", "output=json") == 0
    assert [(row["n"], row["n_scored"]) for row in json.loads(cli.out)] == [(3, 3), (3, 3)]


def test_own_prompts_are_never_cut_without_a_word(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("".join(f"a thing of number {n}\n" for n in range(30)))
    own = ("decoder=ar", "prompts=file", "prompts.path=mine.txt", "batch_size=10")
    assert cli(*own, "limit=4") == 0
    assert "limit=4 leaves out 26 of 30 images; limit=null makes them all." in cli.out
    assert cli(*own) == 0
    assert "leaves out" not in cli.out
    assert len(cli.run("ar").records()) == 30
    assert f"images: {cli.run('ar').path / 'grid.png'}\n" in cli.out
    assert f"table: {cli.runs_dir / 'tables' / cli.run('ar').path.name / 'table.md'}\n" in cli.out


# ---- other stages


@pytest.mark.usefixtures("plain")
def test_score_and_table_need_no_weights(cli: Cli) -> None:
    assert cli("decoder=ar", "limit=2") == 0
    run = cli.run("ar")
    (run.path / "metrics.json").unlink()
    assert cli("stage=score", f"run_dir={run.path}", "model=tiny") == 0
    assert run.metrics["n_images"] == 2
    assert run.metrics["step_compression"] == 1.0
    assert "weights are loaded" not in cli.out
    assert cli("stage=table") == 0
    assert "| ar |" in cli.out
    assert (cli.runs_dir / "tables" / "all" / "table.md").is_file()


def test_finetune_writes_its_folder_and_refuses_other_settings(cli: Cli) -> None:
    command = ("stage=finetune", "finetune=count", "seed=5")
    assert cli(*command) == 0
    out = cli.runs_dir / "finetune-count"
    assert (out / "final" / "seed").read_text() == "5 False"
    assert cli(*command) == 0  # the same command again resumes
    assert cli(*command, "finetune.steps=4") == 1
    assert "holds another training (recipe.steps: 3 there, 4 asked for)" in cli.err
    assert f"give run_dir={out}-2, or delete the old one: rm -r {out}" in cli.err
    cli.runs_dir = cli.runs_dir.with_name("with-model")
    assert cli(*command, "finetune.needs_model=true") == 0
    assert (cli.runs_dir / "finetune-count" / "final" / "seed").read_text() == "5 True"


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="this Linux counts no waiting for a core")
def test_a_core_that_is_shared_is_noticed() -> None:
    """Two others on one core leave this process a third of it."""
    allowed = os.sched_getaffinity(0)
    core = {min(allowed)}
    spin = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    os.sched_setaffinity(0, core)  # the children inherit it
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        time.sleep(1.0)  # until they have started
        meter = Meter(torch.device("cpu"))
        for _ in range(2):  # turns add up
            with meter:
                end = time.monotonic() + 1.0
                while time.monotonic() < end:
                    pass
        assert 0.0 < meter.entry()["cpu_share"] < 0.7
    finally:
        for other in others:
            other.kill()
            other.wait()
        os.sched_setaffinity(0, allowed)
