"""The check on every test finds what would reach the next one, and puts it back."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.helpers.process_state import ProcessState, restored, seed_everything, unchanged

logger, other = logging.getLogger("sjd2.models.loading"), logging.getLogger("urllib3")


def others_disabled() -> None:
    other.disabled = True


def handler_more() -> None:
    logging.getLogger().addHandler(logging.NullHandler())


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda: logging.disable(logging.ERROR), "logging.disable"),
        (handler_more, "handlers of the root logger"),
        (lambda: logging.getLogger().setLevel(logging.DEBUG), "logger root"),
        (lambda: logging.getLogger("sjd2").setLevel(logging.INFO), "logger sjd2"),
        (lambda: setattr(logger, "propagate", False), "logger sjd2.models.loading"),
        (others_disabled, "logger urllib3"),
        (lambda: os.environ.update(SJD2_TRACE="1"), "environment SJD2_TRACE"),
        (lambda: os.environ.pop("PATH"), "environment PATH"),
        (lambda: os.chdir(os.sep), "working folder"),
        (lambda: sys.path.append("nowhere"), "sys.path"),
        (lambda: sys.argv.append("decoder=ar"), "sys.argv"),
        (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "signal SIGTERM"),
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "threads of torch"),
        (lambda: torch.set_default_dtype(torch.float64), "dtype of torch"),
        (lambda: torch.set_grad_enabled(False), "gradients"),
        (lambda: torch.use_deterministic_algorithms(True), "deterministic algorithms"),
        (transformers_logging.disable_progress_bar, "progress bars of transformers"),
    ],
)
def test_a_change_is_found_and_undone(change: Callable[[], object], fact: str) -> None:
    before = ProcessState()
    with restored():
        change()
        assert list(before.changes()) == [fact]
    assert before.changes() == {}


def test_a_level_is_not_remembered_after_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """Loggers cache which levels they let through."""
    with restored():
        logging.getLogger("sjd2").setLevel(logging.ERROR)
        logger.warning("unheard")
    logger.warning("heard")
    assert caplog.messages == ["heard"]


def test_what_is_drawn_without_a_seed_is_always_the_same() -> None:
    def draws() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    first = draws()
    seed_everything()
    assert draws() == first


def test_the_check_is_on_in_every_test(request: pytest.FixtureRequest) -> None:
    assert "_unchanged" in request.fixturenames
    with pytest.raises(AssertionError, match=r"not restored.*logger urllib3"), unchanged():
        others_disabled()
