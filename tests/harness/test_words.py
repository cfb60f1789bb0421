"""The words of a command line: what was meant is in the message, and no message waits for torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.settings import SAMPLERS
from harness.words import check_words
from sjd2.decoding import sampling
from sjd2.errors import UserError
from sjd2.files import ROOT

BLANKS = "no blanks and no comma at its end: "


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("decoder=scd --limit 5", "without dashes: limit=5."),
        ("--decoder scd", "without dashes: decoder=scd."),
        ("-limit 5", "without dashes: limit=5."),
        ("--seed", "without dashes: seed=VALUE."),
        ("--halp", "did you mean '--help'?"),
        ("limit=2 -m decoder=ar,scd", "-m stands before all settings"),
        ("-m decoder=ar, scd limit=1", f"{BLANKS}decoder=ar,scd."),
        ("-m decoder=ar , scd", f"{BLANKS}decoder=ar,scd."),
        ("-m decoder=ar ,scd, sjd", f"{BLANKS}decoder=ar,scd,sjd."),
        ("-m decoder=ar,scd, limit=1", f"{BLANKS}decoder=ar,scd."),
        ("limit:5", "not with a colon: limit=5."),
        ("limit: 5", "not with a colon: limit=5."),
        ("limit = 5", "without blanks around the =: limit=5."),
        ("limit =5", "without blanks around the =: limit=5."),
        ("limit= 5", "no blanks around the =: limit=5."),
        ("limit 5", "without blanks around the =: limit=5."),
        ("limit", "without blanks around the =: limit=VALUE."),
        ("=5", "names no setting; write key=5"),
        ("decoder==scd", "write one = only: decoder=scd."),
        ("scd", "'scd' is a choice of decoder: write decoder=scd."),
        ("table", "stage=table."),
        ("help", "--help lists the settings."),
        ("decoder=scd.yaml", "without its ending: decoder=scd."),
        ("~limit", "limit cannot be left out"),
        ("prompts=mine.txt", "prompts=file prompts.path=mine.txt."),
        ("nonsense", "cannot read nonsense: settings are written key=value"),
    ],
)
def test_what_was_meant_is_in_the_message(command: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_words(command.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "-m decoder=ar,scd",
        "decoder=ar,scd -m",
        "--config-dir a=b decoder=scd",
        "-cd folder -cn name",
        "--cfg job",
        "--multi decoder=ar,scd",
        "limit= decoder=scd",
        "~finetune.data +new=1 ++other=2",
        "logger.tags=[a,b]",
    ],
)
def test_what_hydra_understands_stays(command: str) -> None:
    check_words(command.split())


def test_the_samplers_are_those_of_the_library() -> None:
    assert set(SAMPLERS) == set(sampling.SAMPLERS)


# command, what the message must have; {prompts} is a table whose fourth line has an empty cell
EARLY = [
    ("limit:5", "limit=5"),
    ("-m decoder=ar, scd", "decoder=ar,scd"),
    ("decoder=SCD", "did you mean 'scd'?"),
    ("prompts=file prompts.path=a=b.txt", "'prompts.path=\"a=b.txt\"'"),
    ("prompts=file prompts.path=a,b.txt", "one text with a comma 'prompts.path="),
    ("decoder=sjd2 decoder.schedule.foo.bar=3", "Valid settings of decoder.schedule: decoder.schedule.highest,"),
    ("decoder=sjd2 decoder.drafter.weights=3", "a setting of decoder/drafter=eagle"),
    ("decoder.refiner=null", "a group: decoder/refiner=NAME"),
    ("prompts.path=mine.txt", "a setting of prompts=coco2014, coco2017, dpg, file"),
    ("runs_dir=/proc/none", "runs_dir=/proc/none cannot be written in /proc"),
    ("-m decoder=ar,scd runs_dir=/proc/none", "runs_dir=/proc/none cannot be written in /proc"),
    ("runs_dir=''", "runs_dir is empty"),
    ("device=gpu", "did you mean 'cuda'?"),
    ("device=0", "device=cuda:0"),
    ("dtype=bf16", "did you mean 'bfloat16'?"),
    ("top_p=2", "top_p must lie in (0, 1]"),
    ("sampler=Gumbel", "did you mean 'gumbel'?"),
    ("finetune=sjd2 model=lumina", "python run.py stage=finetune finetune=sjd2 model=lumina"),
    ("prompts=file prompts.path={prompts}", "line 4 has an empty prompt; fill it in, or delete the line."),
]
PROGRAM = """
import json, os, sys
from hydra.core.global_hydra import GlobalHydra
from harness.cli import main
for words in json.loads(sys.argv.pop()):
    os.environ["HYDRA_FULL_ERROR"] = "0"
    GlobalHydra.instance().clear()
    sys.argv = ["run.py", *words]
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    assert code == 1, words
    assert "torch" not in sys.modules, words
"""


def test_no_message_waits_for_torch(tmp_path: Path) -> None:

    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt\n1,a dog\n2,a cat\n3,\n4,a bird\n")
    commands = [shlex.split(command.format(prompts=prompts)) for command, _ in EARLY]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(EARLY), done.stderr
    for line, (command, message) in zip(lines, EARLY, strict=True):
        assert line.startswith("error: "), line
        assert message in line, (command, line)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.csv"]
