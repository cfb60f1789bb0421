"""What the tests that need a CUDA device share."""

from __future__ import annotations

import pytest
import torch

from sjd2.files import ROOT

MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DECODERS = sorted(path.stem for path in (ROOT / "conf" / "decoder").glob("*.yaml"))
PROMPTS = ["a small red circle", "a large blue square left of a green ring", "a yellow triangle"]
SEEDS = [11, 12, 13]
