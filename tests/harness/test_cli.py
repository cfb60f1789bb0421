"""The command line: every yaml composes, bad input ends in one sentence before weights load, exit codes tell."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from harness import sample as sampling
from harness.console import GROUPS, Progress, sentence
from harness.settings import STAGES, TYPES, check_settings, resolve
from sjd2.config import CONF, check_node
from tests.helpers.cli import ROOT, Cli

CHOICES = [
    (group, path.stem)
    for group in (*GROUPS, "experiment", "debug", "decoder/drafter", "decoder/verifier", "decoder/refiner")
    for path in sorted((CONF / group).glob("*.yaml"))
]


def settings(*overrides: str) -> OmegaConf:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


# ---- configuration files


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_yaml_composes_and_its_targets_take_its_keys(group: str, choice: str, tmp_path: Path) -> None:
    extra = ("decoder=sjd",) if group.startswith("decoder/") else ()
    cfg = settings(f"{group}={choice}", f"runs_dir={tmp_path}", *extra)
    check_settings(cfg)
    OmegaConf.to_container(cfg, resolve=True)
    for name in GROUPS:
        check_node(cfg.get(name))
    assert cfg.model.pixels == "decode"  # model.pixels=none is a setting of every model


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_yaml_begins_with_what_it_is_and_a_command(group: str, choice: str) -> None:
    lines = (CONF / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[:8] if line.startswith("#")]
    assert any("python run.py" in line for line in head), head


def test_every_stage_leads_to_a_function() -> None:
    for name, stage in STAGES.items():
        assert callable(resolve(stage.function)), name


def test_the_main_settings_are_all_checked_and_explained() -> None:
    cfg = settings()
    assert set(TYPES) == {key for key in cfg if key not in GROUPS}
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    for key in TYPES:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{key}:")]
        assert "#" in line, f"{key} has no comment"


@pytest.mark.parametrize("path", sorted((CONF / "decoder_defaults").glob("*.yaml")), ids=lambda path: path.stem)
def test_tuned_defaults_reach_their_pair_and_the_command_line_wins(path: Path) -> None:
    decoder, model = path.stem.rsplit("-", 1)
    cfg = settings(f"decoder={decoder}", f"model={model}")
    assert OmegaConf.merge(cfg.decoder, OmegaConf.load(path).decoder) == cfg.decoder
    check_node(cfg.decoder)
    width = next(key for key in ("window", "window_size", "context") if key in cfg.decoder)
    assert settings(f"decoder={decoder}", f"model={model}", f"decoder.{width}=7").decoder[width] == 7


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decoder=sdj"], r"unknown decoder 'sdj', did you mean 'sjd'\? Valid: .*\bar\b.*\bsjd2\b"),
        (["decoder=sdc"], r"unknown decoder 'sdc', did you mean 'scd'\?"),
        (["model=lumia"], r"unknown model 'lumia'.* Valid: .*tiny"),
        (["decoder/refiner=foo"], r"unknown decoder/refiner 'foo'.* Valid: .*coupled"),
        (["decoder.windw=3"], r"unknown setting 'decoder.windw', did you mean 'decoder.window'\?"),
        (["sede=1"], r"unknown setting 'sede', did you mean 'seed'\?"),
        (["window=3"], r"unknown setting 'window', did you mean 'decoder.window'\?"),
        (["++foo=1"], r"unknown setting 'foo'. Valid: .*batch_size"),
        (["++decoder.foo=1"], r"unknown setting of decoder 'foo'. Valid: .*window"),
        (["--decoder.window=5"], r"settings are written without dashes: decoder.window=5\."),
        (["seed"], r"one word, without blanks around the =: seed=VALUE"),
        (["limit=["], r"cannot read 'limit=\['"),
        (["decoder=ar,sjd"], r"python run.py -m decoder=a,b"),
        (["logger=null"], r"logger=none"),
        (["decoder=eagle"], r"finetune=eagle model=toy .* training-free decoder=scd"),
        (["decoder=eagle", "decoder.drafter.weights=/nope"], r"/nope has no eagle.json"),
        (["decoder=eagle", "decoder/refiner=coupled"], r"nothing to refine"),
        (["decoder=sjd-fc"], r"and only there.*finetune=front"),
        (["decoder=sjd-pac", "decoder.window=8"], r"decoder.window=8 is too small"),
        (["decoder=sjd", "decoder/verifier=relaxed"], r"claims to be lossless, but its part Relaxed is not exact"),
        (["decoder=gsd", "sampler=gumbel"], r"leaves nothing to relax"),
        (["decoder=zipar", "decoder.window_size=0"], r"window_size must be 1 or more"),
        (["decoder=sjd2"], r"needs a fine-tuned model"),
        (["decoder.window=abc"], r"decoder.window must be a whole number, got 'abc'"),
        (["decoder.window=17"], r"decoder.window=17 is longer than the image, which has 16 tokens"),
        (["decoder.window=0"], r"decoder.window must be 1 or more, got 0"),
        (["decoder.window=2.5"], r"decoder.window must be a whole number, got 2.5"),
        (["temperature=hot"], r"temperature must be a number, got 'hot'"),
        (["temperature=-1"], r"temperature must be 0 \(greedy\) or more"),
        (["top_p=0"], r"top_p must lie in \(0, 1\]"),
        (["min_p=-0.1"], r"min_p must lie in \[0, 1\], got -0.1"),
        (["finetune=sjd2"], r"stage=finetune only.*run.py stage=finetune .*finetune=sjd2"),
        (["tune=scd", "stage=sample"], r"tune= is read by stage=tune only"),
        (["stage=table", "run_dir=nowhere"], r"run_dir=nowhere does not exist"),
        (["top_k=13"], r"top_k=13 exceeds the model's image vocabulary of 12"),
        (["sampler=gumble"], r"unknown sampler 'gumble', did you mean 'gumbel'\?"),
        (["limit=0"], r"limit must be 1 or more, got 0"),
        (["seed=-1"], r"seed must be 0 or more"),
        (["batch_size=true"], r"batch_size must be a whole number, got True"),
        (["refill=3"], r"refill must be true or false, got 3"),
        (["trace=1", "refill=true"], r"refill=false"),
        (["runtime.threads=0"], r"runtime.threads must be 1 or more, got 0"),
        (["dtype=flaot16"], r"unknown dtype 'flaot16', did you mean 'float16'\?"),
        (["device=tpu"], r"unknown device 'tpu'"),
        (["device=cuda:99"], r"device=cuda:99 is not available"),
        (["baseline=sjd"], r"unknown baseline 'sjd'. Valid: ar, null"),
        (["stage=scor"], r"unknown stage 'scor', did you mean 'score'\?"),
        (["stage=tune"], r"stage=tune needs a search: tune=relaxed or tune=scd or tune=sjd2"),
        (["stage=score"], r"stage=score needs run_dir=FOLDER; run folders in .*: none"),
        (["stage=score", "run_dir=nowhere"], r"'nowhere' is no run folder"),
        (["stage=table"], r"no run folder in runs_dir="),
        (["stage=finetune"], r"stage=finetune needs finetune=RECIPE. Valid: .*vq"),
        (["prompts=file"], r"prompts.path=FILE"),
        (["prompts=file", "prompts.path=no.csv"], r"prompts file 'no.csv' does not exist"),
        (["prompts.repeats=0"], r"prompts.repeats must be 1 or more"),
        (["model.weights=nowhere"], r"model.weights=nowhere does not exist"),
        (["runs_dir=/dev/null/x"], r"/dev/null is a file"),
        (["logger=wandb", "logger.mode=on"], r"unknown logger.mode 'on'.* Valid: auto, offline, online"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_sentence_before_weights_load(cli: Cli, arguments: list[str], message: str) -> None:
    decoder = [] if any(a.startswith("decoder=") for a in arguments) else ["decoder=sjd"]
    assert cli(*decoder, *arguments) not in (0, None)
    assert re.search(message, cli.err), cli.err
    assert cli.err.startswith("error: ")
    assert cli.err.count("\n") == 1, cli.err
    assert "weights are loaded" not in cli.out
    assert not cli.runs_dir.exists()


def test_an_experiment_without_m_reports_the_jobs_it_leaves_out(cli: Cli) -> None:
    assert cli("experiment=batches", "limit=0") != 0  # the toy's own settings have a batch_size
    assert "one job only; add -m to run every combination of decoder=ar,scd,sjd2." in cli.out
    assert cli("experiment=batches", "limit=0", "decoder=ar") != 0
    assert "one job only" not in cli.out


def test_the_stack_is_shown_when_asked_for(cli: Cli) -> None:
    assert cli("decoder=sjd", "decoder.window=0", "debug=trace") == 1
    assert "Traceback" in cli.err
    assert "error: decoder.window must be 1 or more" in cli.err


def test_a_command_in_its_own_process(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "stage=scor", f"runs_dir={tmp_path}/runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown stage 'scor'")
    assert list(tmp_path.iterdir()) == []  # Hydra leaves no outputs/ behind


def test_composing_needs_no_torch() -> None:
    code = "import sys, harness.cli, harness.help; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ---- the disk


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
    ],
)
@pytest.mark.usefixtures("plain")
def test_a_disk_that_refuses(cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    fsync, calls = os.fsync, []

    def refuse(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert cli("decoder=ar", "limit=8") == 1
    assert message in cli.err
    assert cli.err.count("\n") == 1
    monkeypatch.setattr(os, "fsync", fsync)
    assert cli("decoder=ar", "limit=8") == 0
    assert len(cli.run("ar").records()) == 8


def test_no_permission_is_known_before_weights_load(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test may run as root, whom no right stops
    assert cli("decoder=ar") == 1
    assert "no permission to write in" in cli.err
    assert "weights are loaded" not in cli.out


def test_out_of_memory_and_bugs_have_a_sentence_too() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert "lower batch_size" in sentence(OutOfMemoryError("CUDA out of memory. Tried to allocate ..."))
    assert "debug=trace" in sentence(ZeroDivisionError("division by zero"))


def test_an_interrupted_run_reports_that_nothing_is_lost(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "generate", interrupt)
    assert cli("decoder=ar") == 130
    assert cli.err == "stopped; the same command resumes where this one ended.\n"


# ---- progress


def test_plain_progress_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("harness.console.time.monotonic", lambda: next(clock))
    with Progress("run", 4, 12) as progress:
        for _ in range(4):
            progress.advance(images=2, tokens=60, forwards=20, seconds=6.0)
    lines = capsys.readouterr().out.splitlines()
    assert 1 < len(lines) <= 4
    assert lines[-1].startswith("run: 12/12 images, ")
    assert "3.00 tokens/forward" in lines[-1]
    assert " s left" in lines[0]
    assert " s left" not in lines[-1]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("run", 0, 4) as progress:
        progress.advance(images=4, tokens=60, forwards=20, seconds=1.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err
    assert "3.00 tokens/forward" in err


# ---- README


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (tests,) = [line for line in readme if line.startswith("python3 -m venv") and "pytest" in line]
    (main,) = [line for line in readme if line.startswith("python3 -m venv") and "pytest" not in line]
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert main.endswith("python run.py")


def test_constraints_name_no_host() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert "@" not in text
    assert "--" not in text
