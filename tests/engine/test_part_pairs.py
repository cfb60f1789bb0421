"""Every combination of drafter, verifier and refiner that is not refused runs to its end; the exact ones as AR."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from baselines.accept_all import AcceptAll
from baselines.annealed import Annealed
from baselines.eagle.eagle_drafter import Eagle
from baselines.entropy_aware import EntropyAware
from baselines.gsd import Grouped
from baselines.joint_runs import RisingRuns
from baselines.lantern import Relaxed
from baselines.pathspec import CrossPath, JacobiPaths
from baselines.reuse import Reuse
from baselines.rising import Rising
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
REBUILT = {  # of papers whose formulas could not be read
    "annealed": Annealed(delta=1.5),
    "entropy": EntropyAware(),
    "cross path": CrossPath(delta=0.1),
    "runs": RisingRuns(),
}
TREES = ("front", "front of denoise", "paths", "eagle")


def build(window: int, drafter: Drafter, verifier: Verifier, refiner: Refiner | None) -> Decoder | None:
    """Return the decoder, None where the pair is refused."""
    parts = {"drafter": drafter, "verifier": verifier, "refiner": refiner}
    exact = all(part is None or part.exact for part in parts.values())
    try:
        return Decoder(name="pair", window=window, lossless=exact, **parts)
    except UserError:
        return None


def exchange(
    kind: str, verifiers: dict[str, Verifier], refiners: dict[str, Refiner | None], nets: dict[str, str]
) -> None:
    """Run a drafter with every pair of these parts, or see that the pair is refused for a reason."""
    model, gumbel = adapted_toy(GRID), replace(SAMPLING, sampler="gumbel")
    expected = decode(model, AR, gumbel, PROMPTS[:2]).tokens
    # a chain of the head takes a pass for every draft token
    window = {"eagle chain": 4, "paths": 13}.get(kind, 12)
    for (name, verifier), (refining, refiner) in itertools.product(verifiers.items(), refiners.items()):
        decoder = build(window, DRAFTERS[kind](nets), verifier, refiner)
        # a chain that is kept is refined, no other is; rising redraws single chains; a joint decision needs a chain, or a
        # front's tree where it can judge one, and an exact one a refiner that knows of it
        fits = (refiner is None) == kind.startswith("eagle")
        fits = fits and not (kind == "paths" and "rising" in refining)
        if verifier.joint:
            judged = kind not in TREES or (verifier.joint_trees and kind.startswith("front"))
            fits = fits and judged and not (verifier.exact and refining == "keep")
        assert (decoder is not None) == fits, (name, refining)
        if decoder is None:
            continue
        got = decode(model, decoder, SAMPLING, PROMPTS[:2])
        assert all(sum(sample.accepted) == GRID.length for sample in got.samples), (name, refining)
        assert got.tokens.min() >= 0
        if decoder.lossless:
            assert torch.equal(decode(model, decoder, gumbel, PROMPTS[:2]).tokens, expected), refining


@pytest.mark.parametrize("kind", by_default(DRAFTERS, ["front"]))
def test_every_pair_runs_or_is_refused(kind: str, nets: dict[str, str], tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exchange(kind, VERIFIERS, REFINERS, nets)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTERS)
def test_so_do_the_rebuilt_parts(kind: str, nets: dict[str, str], tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exchange(kind, REBUILT, REFINERS | {"rising": Rising()}, nets)
    exchange(kind, VERIFIERS, {"rising": Rising(), "coupled rising": Rising(coupled=True)}, nets)
