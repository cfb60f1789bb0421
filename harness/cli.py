"""The command line, as `python run.py` or as `sjd2`: compose the settings, validate them, call the stage.

Nothing here imports torch, so that --help, shell completion, --cfg and a wrong setting answer at once. Stages are named by
dotted path and imported when they run: sweeps/ and benchmarks/ build on this package, not the other way round.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from harness.console import answer, guarded, say, show_logs, spoken
from harness.home import ensure_home
from harness.ranks import takes_part
from harness.recompose import settled
from harness.settings import STAGES, check_settings, resolve
from harness.words import at_home, check_words
from sjd2 import __version__
from sjd2.config import CONF, INSTALLED, compose
from sjd2.files import read_json


def main() -> int:
    """Run the command line and return its exit code: 0, or not 0 if the command or a job of a multirun failed."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        return guarded(_help)
    if "--version" in sys.argv[1:]:
        print(f"sjd2 {__version__}")
        return 0
    ensure_home()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: waiting threads sleep instead of spinning
    if "debug=trace" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1":
        os.environ["SJD2_TRACE"] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    if not INSTALLED:  # jobs on other machines import from the same checkout
        paths = [str(CONF.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    with spoken("json" if "output=json" in sys.argv else "auto"):
        code = guarded(_launch)
    callback = sys.modules.get("sweeps.multirun.callback")
    return code or int(callback is not None and callback.Tables.failed > 0)


def command(cfg: DictConfig) -> None:
    """Run one command, or one job of a multirun."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        resolve("sweeps.multirun.jobs.run_job")(dispatch, cfg)
        return
    if cfg.get("stage") in ("sample", "finetune") and (left_out := _sweep_left_out()):
        say(left_out)
    if code := guarded(lambda: dispatch(cfg)):
        sys.exit(code)  # Hydra adds nothing to a SystemExit


def _sweep_left_out() -> str | None:
    """Return the line for a sweep that only -m runs, e.g. that of an experiment; None where each key has one value."""
    hydra_cfg = HydraConfig.get()
    given = {word.partition("=")[0].lstrip("+") for word in hydra_cfg.overrides.task}
    swept = [f"{key}={values}" for key, values in (hydra_cfg.sweeper.get("params") or {}).items() if key not in given]
    if not (swept := [setting for setting in swept if "," in setting]):
        return None
    return f"one job only; add -m to run every combination of {' '.join(swept)}."


def dispatch(cfg: DictConfig) -> Path:
    """Validate what every stage shares, then call the stage; returns the folder with its results."""
    cfg = settled(cfg)
    check_settings(cfg)
    if cfg.paper is not None:
        resolve("sweeps.tables.paper.check")(cfg.paper)
    if not takes_part(cfg.stage):
        return Path(cfg.runs_dir)
    resolve("harness.checks.check_command")(cfg)
    from harness.plan import set_threads  # brings torch in

    show_logs()
    set_threads(cfg)
    with spoken(cfg.output):  # where a yaml asks for json
        folder = resolve(STAGES[cfg.stage].function)(cfg)
    if cfg.output == "json" and not STAGES[cfg.stage].tables:
        answer(read_json(folder / "metrics.json", {}) | {"folder": str(folder)})
    return folder


def _launch() -> None:
    """Run Hydra; where a launcher gives up because jobs died, the sweep's table reports them instead of its error."""
    sys.argv[1:] = at_home(sys.argv[1:])
    check_words(sys.argv[1:])
    if shown := composed_settings(sys.argv[1:]):
        print(shown, end="")
        return
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(command)()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        callback = sys.modules.get("sweeps.multirun.callback")
        if callback is None or not callback.close(error):
            raise


def composed_settings(words: Sequence[str]) -> str | None:
    """Return what `--cfg job` shows where parts are chosen, None for all that Hydra shows itself.

    Hydra would show settings of parts that are not there, see `sjd2.part_choices`.
    """
    flags, settings, folders, rest = [], [], [], iter(words)
    for word in rest:
        if word in ("--config-dir", "-cd"):
            folders.append(next(rest, ""))
        else:
            (flags if word.startswith("-") or word == "job" else settings).append(word)
    chosen = any(word.lstrip("+~").startswith(("decoder/", "experiment=", "debug=")) for word in settings)
    if not chosen or set(flags) - {"--resolve"} not in ({"--cfg", "job"}, {"-c", "job"}, {"--cfg=job"}):
        return None
    return OmegaConf.to_yaml(compose(settings, search=folders), resolve="--resolve" in flags)


def _help() -> None:
    from harness.help import help_text

    print(help_text())
