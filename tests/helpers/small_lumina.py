"""A small Lumina-mGPT in the public layout: prompts, settings and ways to load it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from sjd2 import api
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Resample
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.models.chameleon import Chameleon
from sjd2.models.lumina import lumina
from tests.helpers import checkpoints_chameleon as small
from tests.helpers.plain_chameleon import Plain

PROMPTS = ["a red cat in the hat", "Two dogs!"]
SAMPLING = SamplingParams(guidance_scale=3.0, top_k=2000)
GREEDY, MATCH = replace(SAMPLING, temperature=0.0), replace(SAMPLING, sampler="gumbel")
AR = Decoder(name="ar", window=1, lossless=True)
CONTEXTS = {"start_token": [], "sep_token": [8710]}  # ids before the image in the unconditional row


def load(folder: Path, dtype: str = "float64", **settings: object) -> Chameleon:
    """Load as `model=lumina` does, from local files."""
    local = {"weights": str(folder / "model"), "vq_weights": str(folder / "tokenizer" / "vqgan.ckpt"), "size": 64}
    return api.load("lumina", dtype=dtype, **(local | settings))


def at(model: Chameleon, context: str, size: str = "64") -> Chameleon:
    """Return the loaded model with another unconditional context or size; the weights are shared."""
    spec = lumina(name="lumina", size=size, weights=model.spec.weights, vq_weights=model.spec.vq_weights,
                  sampling={}, uncond_context=context)  # fmt: skip
    other = copy.copy(model)
    other.spec, other.layout = spec, spec.layout
    other.ids = other._model_ids(small.names())
    return other


def prompt(plain: Plain, text: str, width: int, height: int) -> list[int]:
    """Write out the conditional prompt: <s> instruction text end-of-turn."""
    instruction = f"Generate an image of {width}x{height} according to the following prompt:\n{text}"
    return [0, *plain.text(instruction), 8710]


def chain(name: str, window: int, **parts: object) -> Decoder:
    parts = {"drafter": Jacobi(), "verifier": Exact(), "refiner": Resample(), "lossless": True} | parts
    return Decoder(name=name, window=window, **parts)
