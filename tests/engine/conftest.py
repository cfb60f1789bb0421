"""Random networks of drafters, saved once per worker."""

from __future__ import annotations

import pytest
import torch

from baselines.eagle.head import EagleHead, EagleSettings
from sjd2.front.corrector import Corrector, FrontSettings
from tests.helpers.enumeration import strong_toy


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Strong random networks: their drafts are wrong, so a decoder that trusts them too much is found out."""
    model, folders = strong_toy(), {}
    torch.manual_seed(1)
    corrector = Corrector(FrontSettings(width=16, inner=32, blocks=1), 16)
    head = EagleHead(EagleSettings(), model)
    for name, net, size in (("front", corrector, 0.5), ("eagle", head, 0.3)):
        for parameter in net.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) * size if parameter.ndim == 2 else parameter)
        folder = tmp_path_factory.mktemp(name)
        net.save(folder, torch.float32)
        folders[name] = str(folder)
    return folders
