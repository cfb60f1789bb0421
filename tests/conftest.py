"""What all tests share: no network, no account, one CPU thread per worker; and no test notices which ran before it."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# before torch, transformers and wandb are imported
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MPLBACKEND": "Agg"}
for name in ("WANDB_API_KEY", "WANDB_MODE", "HYDRA_FULL_ERROR", "SJD2_TRACE"):
    os.environ.pop(name, None)
os.environ["NETRC"] = os.devnull  # an account of whoever runs the tests must not be used

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on a CPU, slowly

from tests.helpers.cli import cli, plain  # noqa: E402
from tests.helpers.process_state import seed_everything, unchanged  # noqa: E402

__all__ = ["cli", "plain"]

# a shell starts background jobs with Ctrl-C ignored, which every process below would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Generator[None, Any, Any]:
    """Seed what several tests share: it is made by whichever of them is the first."""
    if fixturedef.scope != "function":
        seed_everything()
    return (yield)


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    """Fail a test that changes what the next one in its process sees."""
    with unchanged():
        yield
