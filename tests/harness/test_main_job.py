"""The main job as a user runs it: the embedded model, SJD2 and its AR baseline, all metrics; killed; on any batch size."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.run_folder import RunFolder, run_folders
from tests.helpers.cli import Cli
from tests.helpers.process_state import restored

MAIN = ("model=tiny", "decoder=sjd2", "evaluation=tiny", "batch_size=2", "logger=wandb")
CONTRACT = (
    "n_images forwards_mean step_compression step_compression_free nll_per_token latency_s_median latency_s_p95 images_per_s "
    "seconds_encode_mean seconds_prefill_mean seconds_decode_mean seconds_image_mean accepted_per_forward_hist "
    "fid fid_extractor fid_reference kid kid_std clip_score clip_model alignment alignment_all protocol"
)


def runs(cli: Cli) -> dict[str, RunFolder]:
    return {path.name.split("-")[1]: RunFolder(path) for path in run_folders(cli.runs_dir)}


def only_run(cli: Cli) -> RunFolder:
    (found,) = runs(cli).values()
    return found


def tokens(run: RunFolder) -> list[list[int]]:
    return [np.load(run.path / "tokens" / path.name).tolist() for path in sorted((run.path / "tokens").iterdir())]


@pytest.mark.full
def test_one_command_from_prompts_to_the_table(cli: Cli) -> None:
    assert cli(*MAIN, "limit=12") == 0
    found = runs(cli)
    assert sorted(found) == ["ar", "sjd2"]
    for name, run in found.items():
        assert len(run.records()) == 12
        assert set(CONTRACT.split()) <= set(run.metrics), name
        assert run.metrics["alignment"] > 0.8
        assert run.metrics["clip_score"] > 70
    assert found["ar"].metrics["step_compression"] == 1
    assert found["sjd2"].metrics["step_compression"] > 3
    assert "| sjd2 | yes | 12 | 2 |" in cli.out
    assert list((found["sjd2"].path / "wandb").glob("offline-run-*"))


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_sjd2_killed_and_started_again_has_the_tokens_of_an_undisturbed_run(cli: Cli) -> None:
    job = (*MAIN, "evaluation=none", "logger=none", "baseline=null", "limit=8")
    assert cli(*job, "runs_dir=" + str(cli.runs_dir / "whole")) == 0
    process = cli.start(*job)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(cli.runs_dir.glob("tiny-*/samples*.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli(*job) == 0
    (cut,) = (RunFolder(p) for p in cli.runs_dir.glob("tiny-*"))
    (whole,) = (RunFolder(p) for p in (cli.runs_dir / "whole").glob("tiny-*"))
    assert [r["id"] for r in cut.records()] == [r["id"] for r in whole.records()]
    assert tokens(cut) == tokens(whole)


MATCHING = ("model=tiny", "dtype=float64", "sampler=gumbel", "limit=2", "baseline=null")


@pytest.fixture(scope="module")
def ar_tokens(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Return what AR draws in batches of 2."""
    with pytest.MonkeyPatch.context() as patch, restored():  # made before the first test's own check begins
        cli = Cli(tmp_path_factory.mktemp("ar"), SimpleNamespace(readouterr=lambda: ("", "")), patch)
        assert cli(*MATCHING, "decoder=ar", "batch_size=2") == 0
        return tokens(only_run(cli))


@pytest.mark.full
@pytest.mark.parametrize("decoder", ["sjd2", "sjd-pac", "eagle", "eagle1", "sjd2-fc"])
@pytest.mark.usefixtures("plain")
def test_gumbel_matching_gives_ars_images_on_any_batch_size(cli: Cli, decoder: str, ar_tokens: list[list[int]]) -> None:
    assert cli(*MATCHING, f"decoder={decoder}", "batch_size=1") == 0
    assert tokens(only_run(cli)) == ar_tokens


# what every decoder should make of 2 images: tokens per pass, within wide limits, and whether it counts draft passes
DECODERS = {
    "sjd++": (2, 4, False), "sjd-pac": (3, 5, False), "sjd-fc": (3.5, 7, True), "sjd2-wc": (3.5, 8, True),
    "sjd2-wc-narrow": (3.5, 7, True),
    "eagle": (1.1, 4, True), "eagle1": (1.5, 4, True), "lantern": (1.2, 9, True), "lantern++": (1.5, 6, True),
    "gsd": (2.5, 5, False), "zipar": (1.9, 2.2, False), "lookup": (0.99, 2, False),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_every_rival_runs_and_stands_in_the_table(cli: Cli) -> None:
    job = ("model=tiny", "evaluation=none", "baseline=null", "limit=2", "batch_size=2", "logger=none")
    assert cli("-m", *job, "decoder=" + ",".join(DECODERS)) == 0
    found = {RunFolder(path).config.decoder.name: RunFolder(path) for path in run_folders(cli.runs_dir)}
    assert found.keys() == DECODERS.keys()
    for name, (low, high, drafts) in DECODERS.items():
        assert low < np.mean([r["tokens"] / r["forwards"] for r in found[name].records()]) < high, name
        assert all((r["draft_forwards"] > 0) == drafts for r in found[name].records()), name
        assert f"| {name} | {'yes' if found[name].config.decoder.lossless else '**lossy**'} |" in cli.out


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_greedy_trees_return_greedy_ar(cli: Cli) -> None:
    alone = ("batch_size=1", "limit=1")  # a batch runs whole, whatever limit is
    job = ("model=tiny", "dtype=float64", "temperature=0", *alone, "baseline=null", "evaluation=none")
    for decoder in ("ar", "sjd-fc", "eagle", "eagle1"):
        assert cli(*job, f"decoder={decoder}") == 0
    first, *others = (tokens(RunFolder(path)) for path in run_folders(cli.runs_dir))
    assert all(other == first for other in others)


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_the_papers_rule_is_labelled_lossy(cli: Cli) -> None:
    assert cli("model=tiny", "decoder=sjd2", "decoder.rule=paper", "limit=2", "batch_size=2") == 0
    assert "| sjd2 rule=paper | **lossy** | 2 | 2 |" in cli.out
