"""Decoders, sampling parameters, grids and prompts that the tests of the engine share."""

from __future__ import annotations

from collections.abc import Sequence

from baselines.eagle.eagle_drafter import Eagle
from baselines.pathspec import JacobiPaths
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import DecodeResult, generate
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.denoising.denoise import Denoise
from sjd2.front.front_drafter import Front
from sjd2.models.base import ImageModel
from sjd2.models.layout import TokenGrid

# large enough for windows and refilling, far too large to enumerate: 31 tokens, 24 of them free
GRID = TokenGrid(4, 6, 12, prefix=(20, 21), row_end=22, suffix=(23,))
PROMPTS = ["one", "two words", "three short words", "four", "five is more"]
SAMPLING = SamplingParams(guidance_scale=2.0, top_k=7)

# small enough to enumerate every image of three codes
LINE = TokenGrid(1, 5, 3)
BLOCK = TokenGrid(3, 2, 3)  # two rows to look up
FORCED = TokenGrid(2, 2, 3, prefix=(20,), row_end=21, suffix=(22, 23))  # 5 free tokens of 9, row ends inside the window
GUIDED = SamplingParams(guidance_scale=2.0)
CUT = SamplingParams(temperature=0.7, top_k=2)

AR = Decoder(name="ar", window=1, lossless=True)
PATHS = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))  # a static EAGLE tree of 7 nodes


def sjd(window: int = 6, refiner: object = None, init: str = "random", **more) -> Decoder:
    more = {"lossless": True, "verifier": Exact()} | more
    return Decoder(name="sjd", window=window, drafter=Jacobi(init=init), refiner=refiner or Resample(), **more)


def jacobi(window: int = 6) -> Decoder:
    """Return Jacobi decoding without stored draft distributions."""
    return sjd(window, Resample(record=False))


def sjd2(window: int = 6, refiner: object = None, *, rule: str = "exact", lossless: bool = True, refeed: bool = True,
         **drafter) -> Decoder:  # fmt: skip
    return Decoder(
        name="sjd2", window=window, lossless=lossless, drafter=Denoise(**drafter), verifier=Exact(),
        refiner=refiner or Coupled(), rule=rule, refeed=refeed,
    )  # fmt: skip


def front(window: int, nets: dict[str, str], chain=None, refiner=None, corrected: int = 0, **more) -> Decoder:
    weights = nets["front"] if corrected or more.get("rest") else None
    drafter = Front(chain=chain or Jacobi(), weights=weights, corrected=corrected, **more)
    return Decoder(
        name="front", window=window, lossless=True, drafter=drafter, verifier=Exact(), refiner=refiner or Coupled()
    )


def paths(window: int, refiner=None, **more) -> Decoder:
    return Decoder(
        name="pathspec", window=window, lossless=True, drafter=JacobiPaths(**more), verifier=Exact(),
        refiner=refiner or Coupled(),
    )  # fmt: skip


def eagle(window: int, nets: dict[str, str], verifier=None, **more) -> Decoder:
    drafter = Eagle(weights=nets["eagle"], **more)
    return Decoder(name="eagle", window=window, lossless=True, drafter=drafter, verifier=verifier or Exact())


# one decoder of each kind, built from the folders of the fixture `nets`
KINDS = {
    "ar": lambda nets: AR,
    "sjd": lambda nets: sjd(6),
    "jacobi": lambda nets: jacobi(6),
    "front": lambda nets: front(20, nets, siblings=(2, 1, 1), copies=4, corrected=3, rest=True),
    "paths": lambda nets: paths(13, paths=3),
    "eagle chain": lambda nets: eagle(5, nets, shape="chain"),
    "eagle": lambda nets: eagle(12, nets, shape="dynamic", depth=3, top_k=3),
}


def decode(
    model: ImageModel,
    decoder: Decoder,
    sampling: SamplingParams = SAMPLING,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] | None = None,
) -> DecodeResult:
    """Decode one image per prompt, with seeds 1, 2, ... unless given."""
    seeds = list(seeds or range(1, len(prompts) + 1))
    return generate(model, decoder, model.encode(list(prompts)), seeds, sampling=sampling)
