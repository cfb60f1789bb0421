"""What every model family must do under the engine, on small random checkpoints in the public layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from sjd2.api import decoder, load
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.models.base import ImageModel
from tests.helpers import (
    checkpoints_emu3,
    checkpoints_glm_image,
    checkpoints_janus,
    checkpoints_lumina2,
    checkpoints_simplear,
    family_checks,
)

PROMPTS = ["a red fox under the bridge", "two dogs", " a cat and a bad hand, lowres "]  # of different lengths


@dataclass
class Family:
    """A family on a small checkpoint."""

    name: str
    checkpoint: ModuleType
    guidance_scale: float
    folder: Path | None = None
    model: ImageModel | None = None

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(guidance_scale=self.guidance_scale, top_k=20)

    def load(self, **settings: object) -> ImageModel:
        return load(self.name, dtype="float64", **self.checkpoint.settings(self.folder), **settings)


FAMILIES = [
    Family("emu3", checkpoints_emu3, 3.0),
    Family("janus", checkpoints_janus, 5.0),
    Family("glm-image", checkpoints_glm_image, 1.0),
    pytest.param(Family("lumina2", checkpoints_lumina2, 4.0), marks=pytest.mark.full),
    pytest.param(Family("simplear", checkpoints_simplear, 2.0), marks=pytest.mark.full),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda found: found.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    found: Family = request.param
    found.folder = found.checkpoint.write(tmp_path_factory.mktemp("weights") / found.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sjd2.models.glm_image.PREVIEW", 4)  # 12 codes instead of 238
        found.model = found.load()
        yield found


def test_window_passes_equal_one_pass(family: Family) -> None:
    family_checks.window_passes_equal_one_pass(family.model, PROMPTS)


def test_lossless_decoders_return_the_tokens_of_ar(family: Family) -> None:
    decoders = (decoder(name, **settings) for name, settings in family_checks.LOSSLESS.items())
    family_checks.lossless_decoders_return_the_tokens_of_ar(family.model, decoders, PROMPTS, family.sampling)


@pytest.mark.parametrize("name", family_checks.LOSSY)
def test_lossy_decoders_draw_whole_images(family: Family, name: str, tmp_path: Path) -> None:
    chosen = family_checks.lossy(name, tmp_path)
    if name == "zipar" and family.model.layout.preview:
        with pytest.raises(UserError, match="a preview"):
            chosen.check(family.model.spec)
        return
    family_checks.draws_whole_images(family.model, chosen, PROMPTS, family.sampling)


@pytest.mark.full  # Anole and LlamaGen by default
def test_odd_prompts_and_seeds(family: Family) -> None:
    family_checks.odd_prompts_and_seeds(family.model, family.sampling)


def test_rows_do_not_depend_on_their_neighbours(family: Family) -> None:
    """Janus: unconditional prompts of different lengths in one batch."""
    family_checks.rows_do_not_depend_on_their_neighbours(family.model, PROMPTS, family.sampling)


def test_decoders_with_trained_parts(family: Family, tmp_path: Path) -> None:
    """EAGLE and SJD2 on random parts return AR's tokens; a saved fine-tuning loads through model.adapter=."""
    fresh = family.load()
    parts = family_checks.with_parts(fresh, tmp_path)
    family_checks.lossless_decoders_return_the_tokens_of_ar(fresh, parts, PROMPTS, family.sampling)
    again = family.load(adapter=str(tmp_path / "sjd2"))
    parts = iter([decoder("sjd2", window=8, steps=2, draft_in_prefill=True)])
    family_checks.lossless_decoders_return_the_tokens_of_ar(again, parts, PROMPTS, family.sampling)
