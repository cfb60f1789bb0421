"""SJD2 as a decoder: Speculative Jacobi-Denoising Decoding (arXiv 2510.08994), by the paper's rule or an exact one."""

from __future__ import annotations

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.interfaces import Refiner, Verifier
from sjd2.decoding.refine import Coupled, Keep
from sjd2.denoising.denoise import Denoise
from sjd2.denoising.schedule import Schedule
from sjd2.errors import choose


def sjd2(
    *,
    name: str,
    window: int,
    steps: int,
    rule: str,
    lossless: bool,
    verifier: Verifier,
    schedule: Schedule,
    refiner: Refiner | None = None,
    levels: str = "age",
    clean: int = 0,
    early: float | None = None,
    refeed: bool = True,
    draft_in_prefill: bool = False,
) -> Decoder:
    """Build the decoder from flat settings.

    rule=exact: commit only after clean inputs; draft tokens are draws from recorded distributions, coupled by default.
    rule=paper: verify every slot, a noisy slot's draft token is the entry nearest to its embedding, clean ones with a ratio of
    0.5 or more stay. Raises `UserError` for settings that do not fit together.
    """
    choose("decoder.rule", rule, ("exact", "paper"))
    paper = rule == "paper"
    return Decoder(
        name=name,
        window=window,
        lossless=lossless,
        drafter=Denoise(steps=steps, levels=levels, clean=clean, early=early, nearest=paper, schedule=schedule),
        verifier=verifier,
        refiner=refiner or (Keep() if paper else Coupled()),
        rule=rule,
        refeed=refeed,
        draft_in_prefill=draft_in_prefill,
    )
