"""The Python face: a model, a decoder and images in a handful of lines, without the command line or W&B.

# B samples, N image-phase tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import hydra
from omegaconf import DictConfig, open_dict
from torch import Tensor

from sjd2.config import instantiate
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import StepInfo
from sjd2.decoding.generate import generate as run_decoder
from sjd2.decoding.noise import sample_seed
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError, choose
from sjd2.files import ROOT
from sjd2.models.base import ImageModel


@dataclass
class Images:
    """images uint8 [B, 3, H, W]; tokens [B, N]; accepted: tokens committed at each pass, per image; seconds per part."""

    images: Tensor
    tokens: Tensor
    accepted: list[list[int]]
    seconds: dict[str, float]

    @property
    def forwards(self) -> list[int]:
        """Return the passes each image took, the prefill included."""
        return [len(passes) for passes in self.accepted]


def _compose(group: str, name: str, settings: dict[str, Any]) -> DictConfig:
    choose(group, name, sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        node = hydra.compose("config", [f"{group}={name}"])[group]
    with open_dict(node):  # a wrong name is told by `instantiate`, with the valid ones
        node.merge_with(settings)
    return node


def load(name: str = "tiny", *, device: str = "cpu", dtype: str = "float32", **settings: Any) -> ImageModel:
    """Load a model of conf/model; `settings` are its yaml's keys, e.g. adapter=None, weights="folder".

    Raises `UserError` for an unknown name, a wrong setting or missing weights.
    """
    choose("dtype", dtype, ("float32", "bfloat16", "float16", "float64"))
    return instantiate(_compose("model", name, settings)).load(device, dtype)


def decoder(name: str = "sjd2", **settings: Any) -> Decoder:
    """Build a decoder of conf/decoder; `settings` are its yaml's keys, e.g. window=16."""
    return instantiate(_compose("decoder", name, settings))


build_decoder = decoder  # `generate` has a parameter of that name


def generate(
    model: ImageModel,
    prompts: list[str],
    *,
    decoder: str | Decoder = "sjd2",
    seed: int = 0,
    on_step: Callable[[StepInfo], None] | None = None,
    **law: Any,
) -> Images:
    """Draw one image per prompt; `law` are keys of `SamplingParams` (guidance_scale=1.0, top_k=..., sampler="gumbel").

    Prompt i of a list always gets the same random numbers, so its image does not depend on the other prompts (in float64
    token for token). Raises `UserError` for settings that do not fit.
    """
    if not prompts:
        raise UserError("generate needs at least one prompt.")
    for key in law:
        choose("setting", key, [f.name for f in fields(SamplingParams)])
    chosen = build_decoder(decoder) if isinstance(decoder, str) else decoder
    spec = getattr(model, "spec", None)
    if spec is not None:
        chosen.check(spec)
        law = dict(spec.sampling) | law
    sampling = SamplingParams(**law)
    chosen.check_sampling(sampling)
    sampling.check(model.layout.vocabulary)
    seeds = [sample_seed(seed, index, 0) for index in range(len(prompts))]
    result = run_decoder(model, chosen, model.encode(prompts), seeds, sampling=sampling, on_step=on_step)
    accepted = [sample.accepted for sample in result.samples]
    return Images(model.decode(result.tokens.to(model.device)), result.tokens, accepted, result.seconds)
