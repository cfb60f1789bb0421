"""What all tests share: no network, no account, one CPU thread per worker."""

from __future__ import annotations

import os
import signal

# before torch, transformers and wandb are imported
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MPLBACKEND": "Agg"}
for name in ("WANDB_API_KEY", "WANDB_MODE", "HYDRA_FULL_ERROR", "SJD2_TRACE"):
    os.environ.pop(name, None)
os.environ["NETRC"] = os.devnull  # an account of whoever runs the tests must not be used

from tests.helpers.cli import cli  # noqa: E402

__all__ = ["cli"]

# a shell starts background jobs with Ctrl-C ignored, which every process below would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)
