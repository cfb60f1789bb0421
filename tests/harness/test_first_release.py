"""What the first release made stays true: its commands give the same tokens, its folders are found, resumed and tabulated.

`tests/fixtures/first_release` was written by commit 5584353: tokens.json holds what commands made (limit=2 dtype=float64
baseline=null), finished/ the two run folders of `python run.py limit=3`, table.csv the table of them.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evaluation.identity import identity, same
from evaluation.run_folder import RunFolder, run_folders
from sjd2.files import ROOT
from tests.helpers.cli import Cli

FIRST = ROOT / "tests" / "fixtures" / "first_release"
COMMANDS = json.loads((FIRST / "tokens.json").read_text())
TINY = ("model=tiny", "batch_size=1", "device=cpu", "logger=none")
COUNTS = ("label", "decoder", "lossless", "window", "n", "forwards_mean", "step_compression", "id")


@pytest.fixture
def finished(cli: Cli) -> Cli:
    """A runs_dir that the first release left behind."""
    shutil.copytree(FIRST / "finished", cli.runs_dir)
    return cli


def content(folder: Path) -> dict[str, bytes]:
    """Return what a run is made of: its records, images and tokens."""
    files = [*folder.glob("samples*.jsonl"), *folder.glob("images/*"), *folder.glob("tokens/*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.full
@pytest.mark.parametrize("made", COMMANDS, ids=lambda made: " ".join(made["command"]))
@pytest.mark.usefixtures("plain")
def test_commands_give_the_tokens_they_gave(cli: Cli, made: dict) -> None:
    names = {word.partition("=")[0] for word in made["command"]}
    # each image is a batch of its own in the others, and one shows what two show
    count = 2 if "batch_size" in names else 1
    rest = (f"limit={count}", "dtype=float64", "baseline=null", "evaluation=none")
    assert cli(*(word for word in (*TINY, *rest) if word.partition("=")[0] not in names), *made["command"]) == 0, (
        cli.err
    )
    (folder,) = run_folders(cli.runs_dir)
    assert folder.name.rpartition("-")[0] == made["folder"].rpartition("-")[0]
    records = RunFolder(folder).records()
    assert [{key: record.get(key) for key in made["images"][0]} for record in records] == made["images"][:count]


@pytest.mark.usefixtures("plain")
def test_the_same_command_finds_the_folders_and_makes_nothing_again(finished: Cli) -> None:
    before = {path.name: content(path) for path in finished.runs_dir.iterdir()}
    assert finished(*TINY, "evaluation=tiny", "limit=3") == 0, finished.err
    assert {path.name: content(path) for path in run_folders(finished.runs_dir)} == before


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_a_higher_limit_continues_the_folders(finished: Cli) -> None:
    before = {path.name: content(path) for path in finished.runs_dir.iterdir()}
    assert finished(*TINY, "evaluation=none", "limit=4") == 0, finished.err
    after = {path.name: content(path) for path in run_folders(finished.runs_dir)}
    assert after.keys() == before.keys()
    for name, files in before.items():
        assert after[name]["samples.jsonl"].startswith(files.pop("samples.jsonl"))
        assert files.items() <= after[name].items()
        assert len(RunFolder(finished.runs_dir / name).records()) == 4
    ids = {OmegaConf.load(path / "config.yaml").identity.id for path in run_folders(finished.runs_dir)}
    assert all(name.rpartition("-")[2] in ids for name in before)  # the tracker knows the run by this id


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_another_run_does_not_take_the_folder(finished: Cli) -> None:
    assert finished(*TINY, "evaluation=none", "limit=1", "baseline=null", "decoder.window=16") == 0, finished.err
    assert len(run_folders(finished.runs_dir)) == 3


def test_the_table_is_the_one_it_was(finished: Cli) -> None:
    assert finished(*TINY, "stage=table") == 0, finished.err
    (file,) = finished.runs_dir.glob("tables/*/table.csv")
    expected, found = (list(csv.DictReader(path.open())) for path in (FIRST / "table.csv", file))
    assert [{key: row[key] for key in COUNTS} for row in found] == [
        {key: row[key] for key in COUNTS} for row in expected
    ]
    few = {"fid", "fid_warning"}  # three images give none to show; metrics.json keeps both
    blank = {"table", "run_dir", "speedup", "speedup_images"} | few
    numbers = [key for key in expected[0] if key not in blank]
    assert found[1]["speedup"] == ""  # these launches got less than 80 % of their CPU, which gives none
    assert " % of its CPU; retime=true in the command that made" in finished.out
    assert not any(few & row.keys() for row in found)
    assert [{key: row.get(key) for key in numbers} for row in found] == [
        {key: row[key] for key in numbers} for row in expected
    ]


def test_scoring_again_gives_the_same_metrics(finished: Cli) -> None:
    folder = next(path for path in run_folders(finished.runs_dir) if "sjd2" in path.name)
    before = RunFolder(folder).metrics
    assert finished(*TINY, "stage=score", f"run_dir={folder}", "evaluation=tiny") == 0, finished.err
    after = RunFolder(folder).metrics
    assert after.keys() == before.keys() | {"dtype"}  # which later releases add
    for key, value in before.items():
        assert after[key] == (pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value), key


def test_identities_hold_no_module_path() -> None:
    old = {
        "decoder": {
            "_target_": "sjd2.decoding.Decoder",
            "verifier": {"_target_": "baselines.untested.All"},
            "window": 3.0,
        }
    }
    accept_all = {"_target_": "baselines.elsewhere.AcceptAll"}
    new = identity(decoder={"_target_": "sjd2.moved.Decoder", "verifier": accept_all, "window": 3})
    assert "." not in json.dumps(new)
    assert same(old, new)
    assert not same(old, identity(decoder={"_target_": "sjd2.decoding.Other", "verifier": accept_all, "window": 3}))


def test_a_class_of_somebody_s_own_is_not_ours_of_the_same_name() -> None:
    ours, own, moved = (
        identity(verifier={"_target_": f"{module}.Exact"}) for module in ("sjd2.verify", "my.a", "my.b")
    )
    assert own["id"] == moved["id"] != ours["id"]
    assert same(own, moved)
    assert not same(own, ours)
    assert same(own, {"verifier": {"_target_": "my.a.Exact"}})  # as release 0.1 wrote it
