"""A small Lumina-mGPT, written once per worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from sjd2.models.chameleon import Chameleon
from tests.helpers import checkpoints_chameleon as small
from tests.helpers.plain_chameleon import Plain
from tests.helpers.small_lumina import load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lumina")
    small.write_lumina(folder / "model")
    small.write_tokenizer_folder(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> Chameleon:
    return load(folder)


@pytest.fixture(scope="session")
def plain(folder: Path) -> Plain:
    return Plain(folder / "model")
