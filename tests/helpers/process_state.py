"""What a test must leave as it found it, because the tests after it in the same process would notice."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

PACKAGES = ("sjd2", "baselines", "evaluation", "harness", "sweeps", "benchmarks", "transformers")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class ProcessState:
    """Logging, environment, folder, signals and torch's switches of this process, as they are now."""

    def __post_init__(self) -> None:
        root = logging.getLogger()
        self.loggers = {None: root, **_loggers()}
        self.facts: dict[str, object] = {
            "logging.disable": root.manager.disable,
            "handlers of the root logger": list(root.handlers),
            "environment": {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")},
            "working folder": os.getcwd(),
            "sys.path": list(sys.path),
            "sys.argv": list(sys.argv),
            "signal handlers": {number: signal.getsignal(number) for number in SIGNALS},
            "threads of torch": torch.get_num_threads(),
            "dtype of torch": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "progress bars of transformers": transformers_logging.is_progress_bar_enabled(),
        }
        for name, logger in self.loggers.items():
            ours = name is None or name.partition(".")[0] in PACKAGES
            # libraries set up their own loggers when they are imported, but nobody may switch one off
            self.facts[f"logger {name or 'root'}"] = (
                logger.disabled,
                *((logger.level, logger.propagate) if ours else ()),
            )

    def changes(self) -> dict[str, tuple[object, object]]:
        """Return what is different now: {fact: (before, now)}."""
        now = ProcessState().facts
        return {fact: (before, now[fact]) for fact, before in self.facts.items() if now.get(fact, before) != before}

    def restore(self) -> None:
        """Set everything as it was."""
        root, facts = logging.getLogger(), self.facts
        root.handlers[:] = facts["handlers of the root logger"]
        for name, logger in self.loggers.items():
            logger.disabled, *more = facts[f"logger {name or 'root'}"]
            if more:
                logger.level, logger.propagate = more
        logging.disable(facts["logging.disable"])  # also empties the loggers' caches of levels
        for name in os.environ.keys() - facts["environment"].keys():
            if not name.startswith("PYTEST_"):
                del os.environ[name]
        os.environ.update(facts["environment"])
        os.chdir(facts["working folder"])
        sys.path[:], sys.argv[:] = facts["sys.path"], facts["sys.argv"]
        for number, handler in facts["signal handlers"].items():
            signal.signal(number, handler)
        torch.set_num_threads(facts["threads of torch"])
        torch.set_default_dtype(facts["dtype of torch"])
        torch.set_grad_enabled(facts["gradients"])
        torch.use_deterministic_algorithms(facts["deterministic algorithms"])
        if facts["progress bars of transformers"]:
            transformers_logging.enable_progress_bar()
        else:
            transformers_logging.disable_progress_bar()


def _loggers() -> dict[str, logging.Logger]:
    known = logging.getLogger().manager.loggerDict
    return {name: logger for name, logger in list(known.items()) if isinstance(logger, logging.Logger)}


@contextmanager
def restored() -> Iterator[None]:
    """Undo on leaving what a command changes, which owns its process: levels of loggers, threads, the environment."""
    before = ProcessState()
    try:
        yield
    finally:
        before.restore()


def seed_everything() -> None:
    """Make what an unseeded call draws the same, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries draw from it
    torch.manual_seed(0)
