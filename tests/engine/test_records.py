"""A draft token is a draw from its recorded distribution, whatever came before (docs/exactness.md, condition 2).

Far more sensitive than the distribution of images: one draft token of many is tested, and few tests depend on it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sjd2.decoding.block import Block
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.interfaces import Draft, State
from sjd2.decoding.refine import Coupled
from sjd2.decoding.shapes import AcceptedPath
from sjd2.decoding.window import WindowEngine
from sjd2.denoising.denoise import Denoise
from sjd2.front.front_drafter import Front, FrontDrafter
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import GUIDED, decode
from tests.helpers.enumeration import PROMPT, strong_toy

IMAGES, CODES = 2000, 4
GRID = TokenGrid(2, 3, CODES, row_end=21)  # a forced token inside the window


class Records:
    """Compares codes with records, by pass, slot, left token and the slot at which the last pass ended."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ends: Tensor | None = None
        self.scores: list[Tensor] = []
        propose, commit = WindowEngine.propose, WindowEngine.commit

        def watch(engine: WindowEngine) -> Draft:
            draft = propose(engine)
            self.compare(engine, draft)
            return draft

        def note(engine: WindowEngine, draft: Draft, path: AcceptedPath, token: Tensor, bonus: Tensor) -> Tensor:
            self.ends = path.end
            return commit(engine, draft, path, token, bonus)

        patch.setattr(WindowEngine, "propose", watch)
        patch.setattr(WindowEngine, "commit", note)

    def compare(self, engine: WindowEngine, draft: Draft) -> None:
        """Score sum(1[x = c] - q(c)) over images of each cell: its mean is 0, its variance sum(q(c) (1 - q(c)))."""
        if self.ends is None or draft.probs is None:
            return
        forced, going = engine.state.forced_slots(engine.num_carried), engine.state.committed < engine.total
        for slot in range(1, engine.num_carried):
            drawn = going & (forced[:, slot] < 0) & ~engine.fresh[:, slot]
            q = draft.probs[drawn, slot - 1].double()
            cell = self.ends[drawn] * (CODES + 1) + draft.tokens[drawn, slot - 1].clamp(max=CODES)
            sums = torch.zeros(2, int(self.ends.max() + 1) * (CODES + 1), CODES, dtype=torch.float64)
            far = one_hot(draft.tokens[drawn, slot], CODES) - q
            sums = sums.index_add_(1, cell, torch.stack([far, q * (1 - q)]))
            some = sums[1] > 5
            self.scores.append(sums[0][some] / sums[1][some].sqrt())

    def mean_square(self) -> float:
        """Return the mean of all squared scores, about 1 where records are true."""
        scores = torch.cat(self.scores)
        assert len(scores) > 20
        return float((scores**2).mean())


def measured(patch: pytest.MonkeyPatch, nets: dict[str, str], verifier: Block) -> float:
    """Decode with branches, noise, a random corrector of the whole window and forced tokens."""
    front = Front(chain=Denoise(), weights=nets["front"], corrected=1, rest=True, siblings=(2, 1), copies=3)
    decoder = Decoder(name="records", window=14, lossless=True, drafter=front, verifier=verifier, refiner=Coupled())
    records = Records(patch)
    decode(strong_toy(GRID), decoder, GUIDED, [PROMPT] * IMAGES)
    return records.mean_square()


@pytest.mark.parametrize(
    "siblings", [pytest.param("jointly", marks=pytest.mark.full), pytest.param("by_token", marks=pytest.mark.slow)]
)
def test_draft_tokens_are_draws_from_their_records(
    siblings: str, nets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(monkeypatch, nets, Block(siblings=siblings)) < 1.5


def old_record(drafter: FrontDrafter, tokens: Tensor, probs: Tensor, source: Tensor, state: State) -> None:
    """Move the rest of the window to its corrected distributions, but keep the records."""
    correct_rest(drafter, tokens, probs.clone(), source, state)


correct_rest = FrontDrafter.correct_rest


@pytest.mark.slow
def test_old_records_below_the_front_are_caught(nets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrontDrafter, "correct_rest", old_record)
    assert measured(monkeypatch, nets, Block()) > 3
