"""Every combination of drafter, verifier and refiner that is not refused runs to its end; the exact ones as AR."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from baselines.accept_all import AcceptAll
from baselines.eagle.eagle_drafter import Eagle
from baselines.gsd import Grouped
from baselines.lantern import Relaxed
from baselines.pathspec import JacobiPaths
from baselines.reuse import Reuse
from sjd2.decoding.block import Block
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.interfaces import Drafter, Refiner, Verifier
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Keep, Resample
from sjd2.decoding.verify import Exact
from sjd2.denoising.denoise import Denoise
from sjd2.errors import UserError
from sjd2.front.front_drafter import Front
from tests.helpers.decoders import AR, GRID, PROMPTS, SAMPLING, decode
from tests.helpers.tiers import by_default
from tests.helpers.toy import adapted_toy

DRAFTERS = {
    "jacobi": lambda nets: Jacobi(),
    "denoise": lambda nets: Denoise(steps=2),
    "front": lambda nets: Front(chain=Jacobi(), siblings=(2, 1), copies=2),
    "front of denoise": lambda nets: Front(chain=Denoise(), siblings=(2, 1), weights=nets["front"], corrected=2),
    "paths": lambda nets: JacobiPaths(paths=3),
    "eagle": lambda nets: Eagle(weights=nets["eagle"], depth=3, top_k=3),
    "eagle chain": lambda nets: Eagle(weights=nets["eagle"], shape="chain"),
}
VERIFIERS = {
    "exact": Exact(),
    "block": Block(),
    "grouped": Grouped(group=3),
    "relaxed": Relaxed(neighbours=3),
    "all": AcceptAll(),
}
REFINERS = {"none": None, "resample": Resample(), "coupled": Coupled(), "keep": Keep(), "reuse": Reuse()}


def build(window: int, drafter: Drafter, verifier: Verifier, refiner: Refiner | None) -> Decoder | None:
    """Return the decoder, None where the pair is refused."""
    parts = {"drafter": drafter, "verifier": verifier, "refiner": refiner}
    exact = all(part is None or part.exact for part in parts.values())
    try:
        return Decoder(name="pair", window=window, lossless=exact, **parts)
    except UserError:
        return None


@pytest.mark.parametrize("kind", by_default(DRAFTERS, ["front"]))
def test_every_pair_runs_or_is_refused(kind: str, nets: dict[str, str], tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, built = adapted_toy(GRID), 0
    gumbel = replace(SAMPLING, sampler="gumbel")
    expected = decode(model, AR, gumbel, PROMPTS[:2]).tokens
    for verifier, refiner in itertools.product(VERIFIERS, REFINERS):
        # a chain of the head takes a pass for every draft token
        window = {"eagle chain": 4, "paths": 13}.get(kind, 12)
        decoder = build(window, DRAFTERS[kind](nets), VERIFIERS[verifier], REFINERS[refiner])
        if decoder is None:
            # a chain that is kept is refined, no other is; a joint decision needs a chain and a refiner that knows of it
            joint = verifier == "block" and (
                kind in ("front", "front of denoise", "paths", "eagle") or refiner == "keep"
            )
            assert joint or (refiner == "none") != kind.startswith("eagle")
            continue
        built += 1
        got = decode(model, decoder, SAMPLING, PROMPTS[:2])
        assert all(sum(sample.accepted) == GRID.length for sample in got.samples), (verifier, refiner)
        assert got.tokens.min() >= 0
        if decoder.lossless:
            assert torch.equal(decode(model, decoder, gumbel, PROMPTS[:2]).tokens, expected), refiner
    refiners = 1 if kind.startswith("eagle") else 4
    block = {"eagle chain": 1, "jacobi": 3, "denoise": 3}.get(kind, 0)
    assert built == 4 * refiners + block
