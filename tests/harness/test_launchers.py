"""More machines: launchers of Hydra, ranks of torchrun, sweeps of W&B."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from evaluation.run_folder import RunFolder, run_folders
from harness import ranks as distributed
from harness.ranks import Ranks
from harness.settings import check_settings
from harness.signals import Dropped, Stopping
from sjd2.config import CONF, check_node
from sjd2.errors import UserError
from sweeps.multirun import jobs
from tests.helpers.cli import ROOT, Cli
from tests.helpers.forked import Forked
from tests.helpers.tiers import by_default

PLUGINS = {"slurm": "hydra_submitit_launcher", "processes": "hydra_joblib_launcher", "ray_tasks": "hydra_ray_launcher"}
pytestmark = pytest.mark.usefixtures("plain")
LAUNCHERS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))
SLOW = {"TOY_SECONDS_PER_BATCH": "0.3"}


def installed(launcher: str) -> bool:
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is not None


def tokens(run: RunFolder) -> dict[tuple, str]:
    return {tuple(record["id"]): record["tokens_sha256"] for record in run.records()}


# ---- launchers


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_explained(launcher: str) -> None:
    lines = (CONF / "hydra" / "launcher" / f"{launcher}.yaml").read_text(encoding="utf-8").splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert any(f"python run.py -m hydra/launcher={launcher}" in line for line in head)
    assert any("pip install -e" in line for line in head)
    assert "docs/clusters.md" in head[0]
    keys = [line for line in lines if line.strip() and not line.lstrip().startswith(("#", "-")) and line != "defaults:"]
    assert all("#" in line for line in keys if not line.endswith("ray:")), keys
    assert f"hydra/launcher={launcher}" in (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_compose_or_name_their_extra(cli: Cli, launcher: str) -> None:
    if installed(launcher):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [f"hydra/launcher={launcher}"], return_hydra_config=True)
        assert f"hydra_plugins.{PLUGINS[launcher]}" in cfg.hydra.launcher._target_
        return
    assert cli("-m", f"hydra/launcher={launcher}", "decoder=ar,sjd") == 1
    extra = {"slurm": "slurm", "processes": "joblib", "ray_tasks": "ray"}[launcher]
    assert cli.err.endswith(f"is not installed; add it with: pip install -e '.[{extra}]'.\n")
    assert cli.err.count("\n") == 1


# ---- sweeps of W&B


@pytest.mark.parametrize("name", ["grid", "bayes"])
def test_wandb_sweeps_make_commands_that_compose(name: str) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["metric"]["name"] in (ROOT / "evaluation" / "metrics" / "speed.py").read_text(encoding="utf-8")
    ends = {key: space.get("values") or [space["min"], space["max"]] for key, space in sweep["parameters"].items()}
    assert all("." in key for key in ends), "a parameter called like a group hides it in W&B's config"
    for values in (tuple(space[end] for space in ends.values()) for end in (0, -1)):
        trial = {"args": {key: {"value": value} for key, value in zip(ends, values, strict=True)}}
        words = create_sweep_command(list(sweep["command"]))
        at = words.index("${args_no_hyphens}")
        words[at : at + 1] = create_sweep_command_args(trial)["args_no_hyphens"]
        assert words[:3] == ["${env}", "${interpreter}", "${program}"]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", words[3:])
        check_settings(cfg)
        check_node(cfg.decoder)
        assert all(OmegaConf.select(cfg, key) == value for key, value in zip(ends, values, strict=True))


# ---- ranks


def ranks(cli: Cli, world: int, *arguments: str, **environment: str) -> list[Forked]:
    """Start the processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [Forked(cli, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]


def test_tokens_do_not_depend_on_the_number_of_ranks(cli: Cli) -> None:
    command = ("decoder=sjd", "limit=14", "batch_size=4")
    first, second = ranks(cli, 2, *command)
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    run, base = cli.run("sjd"), cli.run("ar")
    for made in (run, base):
        shares = [
            {json.loads(line)["id"][0] for line in (made.path / f"samples-{rank}.jsonl").read_text().splitlines()}
            for rank in (0, 1)
        ]
        assert shares == [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13}]
        (launch,) = made.provenance()
        assert launch["ranks"] == 2
        assert launch["hardware"].endswith("1 thread in each of 2 processes")
        assert made.metrics["n_images"] == 14
    assert "| sjd |" in first.output
    assert second.output == ""
    cli.runs_dir = cli.runs_dir.with_name("alone")
    assert cli(*command) == 0
    assert tokens(cli.run("sjd")) == tokens(run)
    assert tokens(cli.run("ar")) == tokens(base)


@pytest.mark.full
def test_a_rank_that_dies_loses_its_batch_only_and_the_folder_stays_locked(cli: Cli) -> None:
    command = ("decoder=sjd", "limit=24", "baseline=null")
    first, second = ranks(cli, 2, *command, **SLOW)

    def both() -> bool:
        return all(len(list(run.glob("samples-*.jsonl"))) == 2 for run in run_folders(cli.runs_dir)) and bool(
            run_folders(cli.runs_dir)
        )

    first.until(both)
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert cli(*command) == 1  # the other rank is still at work
    assert "is in use by" in cli.err
    second.send(signal.SIGTERM)  # as torchrun does
    assert second.wait() == 128 + signal.SIGTERM
    assert "finishing the batch in hand" in second.output
    run = cli.run("sjd")
    before = tokens(run)
    assert 8 <= len(before) < 24
    assert len(before) % 4 == 0
    assert cli(*command) == 0
    assert f"{len(before)} of 24 images are there, resuming" in cli.out
    cli.runs_dir = cli.runs_dir.with_name("alone")
    assert cli(*command) == 0
    assert tokens(cli.run("sjd")) == tokens(run)
    assert before.items() <= tokens(run).items()


def test_more_ranks_than_batches(cli: Cli) -> None:
    for refill, files in (("false", 2), ("true", 3)):  # with refill prompts are dealt out one by one
        made = ranks(
            cli, 3, "decoder=sjd", "limit=6", "baseline=null", f"refill={refill}", f"runs_dir={cli.runs_dir}-{files}"
        )
        assert [rank.wait() for rank in made] == [0, 0, 0], [rank.output for rank in made]
        (run,) = (RunFolder(path) for path in run_folders(f"{cli.runs_dir}-{files}"))
        assert len(run.records()) == 6
        assert len(list(run.path.glob("samples-*.jsonl"))) == files


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(1, 2, 1).device("cuda") == "cuda:1"
    assert Ranks(3, 4, 1).device("cuda") == "cuda:1"  # the second one of the second machine
    assert Ranks(1, 2, 1).device("cpu") == "cpu"
    assert Ranks().device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="use device=cuda"):
        Ranks(1, 2, 1).device("cuda:0")
    with pytest.raises(UserError, match="lower --nproc-per-node"):
        Ranks(2, 3, 2).device("cuda")


def test_stages_and_multiruns_under_torchrun(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.takes_part("table")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert [distributed.takes_part(stage) for stage in ("sample", "finetune", "table")] == [True, True, False]
    monkeypatch.setenv("RANK", "0")
    assert distributed.takes_part("table")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="start several processes with torchrun"):
        distributed.join()
    assert cli("-m", "decoder=ar", "limit=2") == 1
    assert "a multirun takes a launcher" in cli.err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("runtime.grace_s=-1", r"runtime.grace_s must be 0 or more, got -1"),
        ("runtime.grace_s=soon", r"runtime.grace_s must be a number, got 'soon'"),
        ("runtime.isolate=3", r"runtime.isolate must be true or false, got 3"),
    ],
)
def test_settings_of_the_machine(setting: str, message: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [setting])
    with pytest.raises(UserError, match=message):
        check_settings(cfg)


# ---- signals


def test_a_batch_is_finished_if_it_fits_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("harness.signals.time.monotonic", lambda: now[0])

    def after(grace_s: float, signalled_at: float, batch: float | None) -> str:
        """Return what becomes of a second batch that begins at 100; `batch`: seconds that the first one took."""
        now[0], stop = 0.0, Stopping(grace_s)
        if batch is not None:
            stop.begin()
            now[0] = batch
            stop.end()
        now[0] = 100.0
        stop.begin()
        stop.check()
        now[0] = signalled_at
        stop.note(signal.SIGTERM)
        for moment in (signalled_at, signalled_at + 9, signalled_at + 11):
            now[0] = moment
            try:
                stop.check()
            except Dropped:
                return f"dropped at {moment:g}"
        return "continues"

    assert after(grace_s=10, signalled_at=101, batch=5) == "dropped at 112"  # it should have been done long before
    assert after(grace_s=10, signalled_at=101, batch=11) == "dropped at 112"
    assert after(grace_s=10, signalled_at=101, batch=12) == "dropped at 101"  # will not fit, so not a second is lost
    assert after(grace_s=10, signalled_at=110, batch=12) == "dropped at 121"
    assert after(grace_s=20, signalled_at=101, batch=12) == "continues"
    assert after(grace_s=10, signalled_at=101, batch=None) == "dropped at 112"  # nothing known of the first batch
    assert after(grace_s=0, signalled_at=101, batch=5) == "dropped at 101"


@pytest.mark.parametrize("refill", by_default(["false", "true"], ["false"]))
def test_sigterm_drops_a_batch_that_does_not_fit(cli: Cli, refill: str) -> None:
    process = Forked(cli, "decoder=ar", "limit=40", f"refill={refill}", "runtime.grace_s=0", "baseline=null", **SLOW)
    process.until(
        lambda: bool(run_folders(cli.runs_dir)) and len(RunFolder(run_folders(cli.runs_dir)[0]).records()) >= 4
    )
    process.send(signal.SIGTERM)
    time.sleep(0.1)
    process.send(signal.SIGTERM)  # a scheduler tells a whole process group, and its leader hands it on: one signal
    assert process.wait() == 128 + signal.SIGTERM
    run = cli.run("ar")
    assert 4 <= len(run.records()) < 40
    assert "the same command resumes" in process.output
    assert "ended" in run.provenance()[0]


@pytest.mark.full
def test_sigusr2_leaves_the_last_word_to_submitit(cli: Cli) -> None:
    process = Forked(cli, "decoder=ar", "limit=40", "baseline=null", **SLOW)
    process.until(lambda: bool(run_folders(cli.runs_dir)))
    process.send(signal.SIGUSR2)
    assert process.wait() == 128 + signal.SIGUSR2  # no handler was there
    stop, received = Stopping(1), []
    stop.before = {
        signal.SIGUSR2: lambda number, frame: received.append(number),
        signal.SIGTERM: lambda *_: received.append("no"),
    }
    for numbers in ([signal.SIGTERM, signal.SIGUSR2], [signal.SIGTERM]):
        stop.signals = numbers
        with pytest.raises(SystemExit) as end:
            stop.leave()
        assert end.value.code == 128 + signal.SIGTERM
    assert received == [signal.SIGUSR2]


# ---- the real thing


@pytest.mark.slow
def test_torchrun(cli: Cli) -> None:
    command = ("decoder=sjd", "limit=22", "baseline=null")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(ROOT / "run.py")]
    done = subprocess.run([*words, *cli.arguments(*command)[1:]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    run = cli.run("sjd")
    assert {path.name for path in run.path.glob("samples*")} == {"samples-0.jsonl", "samples-1.jsonl"}
    cli.runs_dir = cli.runs_dir.with_name("alone")
    assert cli(*command) == 0
    assert tokens(cli.run("sjd")) == tokens(run)


@pytest.mark.slow
def test_torchrun_when_a_rank_is_killed(cli: Cli) -> None:
    command = ("decoder=sjd", "limit=40", "baseline=null")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(ROOT / "run.py")]
    process = subprocess.Popen(
        [*words, *cli.arguments(*command)[1:]], env=os.environ | {"TOY_SECONDS_PER_BATCH": "2"}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while len(list(cli.runs_dir.glob("toy-*/samples-*.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert b"finishing the batch in hand" in errors
    run = cli.run("sjd")
    assert 8 <= len(run.records()) < 40
    assert len(run.records()) % 4 == 0
    assert cli(*command) == 0
    assert len(run.records()) == 40


def sweep(cli: Cli, *arguments: str, seconds: str = "0.5") -> subprocess.Popen:
    return cli.start("-m", "decoder=sjd", "limit=12", "baseline=null", *arguments, TOY_SECONDS_PER_BATCH=seconds)


def running_jobs(cli: Cli) -> list[dict]:
    found = [json.loads(path.read_text()) for path in cli.runs_dir.glob("sweeps/*/*/status.json")]
    return [job for job in found if job["status"] == "running"]


def wait_for(condition, process: subprocess.Popen, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def the_sweep(cli: Cli) -> list[dict]:
    (folder,) = (cli.runs_dir / "sweeps").iterdir()
    assert (folder / "table.md").is_file()
    return jobs.statuses(folder)


@pytest.mark.slow
@pytest.mark.skipif(not installed("processes"), reason="hydra-joblib-launcher is not installed")
def test_joblib_and_a_job_that_is_killed(cli: Cli) -> None:
    process = sweep(cli, "decoder.window=4,6,8", "hydra/launcher=processes", "hydra.launcher.n_jobs=2", seconds="3")
    wait_for(lambda: len(list(cli.runs_dir.glob("toy-*/samples.jsonl"))) >= 2, process)
    worker = running_jobs(cli)[0]["pid"]
    (child,) = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1
    ended = the_sweep(cli)
    assert sorted(job["status"] for job in ended) == ["failed", "ok", "ok"], output
    assert any("died (signal 9" in (job["reason"] or "") for job in ended)


@pytest.mark.slow
@pytest.mark.skipif(not installed("processes"), reason="hydra-joblib-launcher is not installed")
def test_joblib_and_a_worker_that_is_killed(cli: Cli) -> None:
    process = sweep(cli, "decoder.window=4,6,8", "hydra/launcher=processes", "hydra.launcher.n_jobs=2", seconds="3")
    wait_for(lambda: len(list(cli.runs_dir.glob("toy-*/samples.jsonl"))) >= 2, process)
    os.kill(running_jobs(cli)[0]["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "the launcher gave up" in output
    assert all(job["reason"] for job in the_sweep(cli) if job["status"] != "ok")
    done = sweep(cli, "decoder.window=4,6,8", seconds="0")
    output, _ = done.communicate(timeout=400)
    assert done.returncode == 0, output


@pytest.mark.slow
@pytest.mark.skipif(not installed("ray_tasks"), reason="hydra-ray-launcher is not installed")
def test_ray_and_a_task_that_is_killed(cli: Cli) -> None:
    ray = ("hydra/launcher=ray_tasks", "+hydra.launcher.ray.init.num_cpus=2")
    process = sweep(cli, "decoder.window=4,6,8", *ray, seconds="3")
    wait_for(lambda: len(list(cli.runs_dir.glob("toy-*/samples.jsonl"))) >= 2, process)
    killed = running_jobs(cli)[0]
    os.kill(killed["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=550)
    assert process.returncode == 0, output
    assert [job["status"] for job in the_sweep(cli)] == ["ok"] * 3  # Ray has started it again
    launches = [len(RunFolder(path).provenance()) for path in run_folders(cli.runs_dir)]
    assert sorted(launches) == [1, 1, 2]
    assert all(len(RunFolder(path).records()) == 12 for path in run_folders(cli.runs_dir))


@pytest.mark.slow
@pytest.mark.skipif(not installed("ray_tasks"), reason="hydra-ray-launcher is not installed")
def test_ray_gives_up_on_a_task(cli: Cli) -> None:
    ray = ("hydra/launcher=ray_tasks", "+hydra.launcher.ray.init.num_cpus=2", "hydra.launcher.ray.remote.max_retries=0")
    process = sweep(cli, "decoder.window=4,6,8", *ray, seconds="3")
    wait_for(lambda: len(list(cli.runs_dir.glob("toy-*/samples.jsonl"))) >= 2, process)
    os.kill(running_jobs(cli)[0]["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=550)
    assert process.returncode == 1, output
    assert sorted(job["status"] for job in the_sweep(cli))[-2:] == ["ok", "running"]  # the other two went on
