"""What a test must leave as it found it, because the tests after it in the same process would notice."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

PACKAGES = ("sjd2", "baselines", "evaluation", "harness", "sweeps", "benchmarks", "transformers")
# variables that pytest, torch's compiler, wandb and open_clip set in their own process as they like
NOISE = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "WANDB_SERVICE", "TOKENIZERS_PARALLELISM")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class ProcessState:
    """Loggers, environment, folder, signals and torch's switches of this process, as they are now."""

    def __init__(self) -> None:
        self.loggers = _loggers()
        self.handlers = list(logging.getLogger().handlers)
        self.environment = {name: text for name, text in os.environ.items() if not name.startswith(NOISE)}
        self.signals = {number: signal.getsignal(number) for number in SIGNALS}
        self.levels = {name: _level(name, logger) for name, logger in self.loggers.items()}
        self.rest: dict[str, Any] = {
            "logging.disable": logging.getLogger().manager.disable,
            "working folder": os.getcwd(),
            "sys.path": list(sys.path),
            "sys.argv": list(sys.argv),
            "threads of torch": torch.get_num_threads(),
            "dtype of torch": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "progress bars of transformers": transformers_logging.is_progress_bar_enabled(),
        }

    def changes(self) -> dict[str, tuple[object, object]]:
        """Return what is different now: {what: (before, now)}."""
        now = ProcessState()
        pairs = {what: (before, now.rest[what]) for what, before in self.rest.items()}
        pairs["handlers of the root logger"] = self.handlers, now.handlers
        pairs |= {f"logger {name}": (before, now.levels[name]) for name, before in self.levels.items()}
        pairs |= {f"signal {number.name}": (before, now.signals[number]) for number, before in self.signals.items()}
        for name in self.environment | now.environment:
            pairs[f"environment {name}"] = self.environment.get(name), now.environment.get(name)
        return {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}

    def restore(self) -> None:
        """Set everything as it was."""
        logging.getLogger().handlers[:] = self.handlers
        for name, (disabled, *more) in self.levels.items():
            self.loggers[name].disabled = disabled
            if more:
                self.loggers[name].level, self.loggers[name].propagate = more
        logging.disable(self.rest["logging.disable"])  # also empties the loggers' caches of levels
        os.chdir(self.rest["working folder"])
        sys.path[:], sys.argv[:] = self.rest["sys.path"], self.rest["sys.argv"]
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        torch.set_num_threads(self.rest["threads of torch"])
        torch.set_default_dtype(self.rest["dtype of torch"])
        torch.set_grad_enabled(self.rest["gradients"])
        if self.rest["deterministic algorithms"] != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(self.rest["deterministic algorithms"])
        if self.rest["progress bars of transformers"]:
            transformers_logging.enable_progress_bar()
        else:
            transformers_logging.disable_progress_bar()
        for name in os.environ.keys() - self.environment.keys():
            if not name.startswith(NOISE):
                del os.environ[name]
        os.environ.update(self.environment)


def _loggers() -> dict[str, logging.Logger]:
    ours = {name: logging.getLogger(name) for name in ("root", *PACKAGES)}
    known = logging.getLogger().manager.loggerDict
    return {name: logger for name, logger in list(known.items()) if isinstance(logger, logging.Logger)} | ours


def _level(name: str, logger: logging.Logger) -> tuple[object, ...]:
    """Return what a logger lets through; libraries set up their own when they are imported, but none may be disabled."""
    ours = name == "root" or name.partition(".")[0] in PACKAGES
    return logger.disabled, *((logger.level, logger.propagate) if ours else ())


@contextmanager
def restored() -> Iterator[None]:
    """Undo on leaving what a command changes, which owns its process: levels of loggers, threads, the environment."""
    before = ProcessState()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def unchanged() -> Iterator[None]:
    """Seed what is drawn without a seed. Raises AssertionError if anything is different afterwards, and restores it."""
    seed_everything()
    before = ProcessState()
    with restored():
        yield
        changes = before.changes()
    assert not changes, f"not restored, as (before, now): {changes}"


def seed_everything() -> None:
    """Make what an unseeded call draws the same, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries draw from it
    torch.manual_seed(0)
