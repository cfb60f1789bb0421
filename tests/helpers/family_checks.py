"""What every model family must pass on a small checkpoint in the public layout, whatever its prompts and tokens.

# B samples, R rows, P prompt tokens, N image-phase tokens, D width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from baselines.eagle.head import EagleHead, EagleSettings
from baselines.lantern import Relaxed
from sjd2.api import decoder
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.likelihood import nll
from sjd2.decoding.refine import Resample
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import ImageModel

LOSSLESS = {
    "jacobi": {"window": 6},
    "sjd": {"window": 6},
    "scd": {"window": 8, "draft_in_prefill": True},
    "sjd++": {"window": 6},
    "sjd-pac": {"window": 24, "drafter": {"siblings": [1], "copies": 1}},
    "lookup": {},
}
LOSSY = ("gsd", "zipar", "relaxed")


def branches(model: ImageModel, prompts: list[str]) -> list[Tensor]:
    """Return the prompts of both guidance branches without padding, conditional ones first: [1, P, D] each."""
    condition = model.encode(prompts)
    count = len(prompts)
    embeds = [*condition.embeds, *condition.uncond_embeds.expand(count, -1, -1)]
    lengths = [*condition.lengths, *condition.uncond_lengths.expand(count)]
    return [row[None, : int(length)] for row, length in zip(embeds, lengths, strict=True)]


def images(model: ImageModel, count: int, seed: int = 0) -> Tensor:
    """Draw complete random token sequences, forced tokens in their places: [B, N]."""
    generator = torch.Generator().manual_seed(seed)
    layout = model.layout
    return layout.tokens(torch.randint(0, layout.vocabulary, (count, layout.num_codes), generator=generator))


@torch.no_grad()
def window_passes_equal_one_pass(model: ImageModel, prompts: list[str]) -> None:
    """Feed images through the cache in windows of changing width, rejected garbage between; compare with plain forwards."""
    tokens = images(model, len(prompts)).repeat(2, 1)
    x = model.embed(tokens)
    prompts_alone = branches(model, prompts)
    whole = []
    for prompt, row in zip(prompts_alone, x, strict=True):
        joined = torch.cat([prompt, row[None]], 1)
        start = model.image_start(torch.tensor([prompt.shape[1]]))
        positions = torch.cat([torch.arange(prompt.shape[1]), start + torch.arange(row.shape[0])])[None]
        ids = model.rotary_ids(positions)
        hidden = model.transformer(inputs_embeds=joined, position_ids=ids, use_cache=False).last_hidden_state
        whole.append(hidden[:, prompt.shape[1] :])
    lengths = torch.tensor([prompt.shape[1] for prompt in prompts_alone])
    longest = int(lengths.max())
    padded = torch.cat([torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[1]), value=9.0) for p in prompts_alone])
    cache = model.cache(len(x), longest + 2 * x.shape[1])
    model.forward(padded, torch.arange(longest).expand(len(x), -1), cache)
    cache.lengths = lengths
    done = 0
    for width in (4, 1, 5, 2, 16):
        fed = x[:, done : done + width]
        positions = model.image_start(lengths)[:, None] + done + torch.arange(fed.shape[1])
        model.forward(torch.randn_like(fed) * 20, positions, cache)  # rejected: beyond the lengths, overwritten below
        out = model.forward(fed, positions, cache)
        assert torch.allclose(out, torch.cat(whole)[:, done : done + width], atol=1e-5)
        cache.lengths = cache.lengths + fed.shape[1]
        done += fed.shape[1]
    assert done >= 16


def lossy(name: str, folder: Path) -> Decoder:
    """Return a decoder of `LOSSY`; relaxed: SJD with LANTERN++'s verifier over the model's own codebook."""
    if name != "relaxed":
        return decoder(name, **({"window_size": 2} if name == "zipar" else {}))
    verifier = Relaxed(neighbours=6, lam=3.0, cache=str(folder))
    return Decoder(
        name="relaxed", window=6, lossless=False, drafter=Jacobi(init="random"), verifier=verifier, refiner=Resample()
    )


def with_parts(model: ImageModel, folder: Path) -> Iterator[Decoder]:
    """Yield the lossless decoders that need a trained part, on random parts; the last puts an adapter into the model."""
    torch.manual_seed(1)
    head = EagleHead(EagleSettings(), model)
    head.start("last")
    head.save(folder / "eagle", model.dtype)
    yield decoder("eagle", window=9, drafter={"weights": str(folder / "eagle"), "depth": 2, "top_k": 4})
    adapter = Adapter(AdapterSettings(rank=2), model)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    adapter.save(folder / "sjd2", model.dtype)
    model.adapter = adapter.freeze()
    yield decoder("sjd2", window=8, steps=2)


def lossless_decoders_return_the_tokens_of_ar(
    model: ImageModel, decoders: Iterator[Decoder], prompts: list[str], sampling: SamplingParams
) -> None:
    """With noise fixed per position every lossless decoder draws exactly AR's tokens (in float64), in fewer passes."""
    sampling = replace(sampling, sampler="gumbel")
    seeds = list(range(len(prompts)))
    ar = generate(model, decoder("ar"), model.encode(prompts), seeds, sampling=sampling)
    assert all(sample.forwards == model.layout.length for sample in ar.samples)
    for other in decoders:
        found = generate(model, other, model.encode(prompts), seeds, sampling=sampling)
        assert torch.equal(found.tokens, ar.tokens), other.name
        assert sum(s.forwards for s in found.samples) < sum(s.forwards for s in ar.samples), other.name


def draws_whole_images(model: ImageModel, chosen: Decoder, prompts: list[str], sampling: SamplingParams) -> None:
    """Every position is decoded once: forced tokens where they belong, codes elsewhere."""
    forced = model.layout.forced()
    for sample in generate(model, chosen, model.encode(prompts), list(range(len(prompts))), sampling=sampling).samples:
        tokens = torch.from_numpy(sample.tokens)
        assert torch.equal(tokens[forced >= 0], forced[forced >= 0])
        assert tokens[forced < 0].max() < model.layout.vocabulary
        assert sum(sample.accepted) == model.layout.length


def odd_prompts_and_seeds(model: ImageModel, sampling: SamplingParams) -> None:
    """Marks, control words, no and very many words are prompts; a seed gives its image again, another seed another one."""
    prompts = ["a < b > c", "<image>", ""]
    condition = model.encode([*prompts, "word " * 2000])
    assert condition.embeds.isfinite().all()
    assert condition.lengths[3] >= condition.lengths.max()
    first, again, other = (
        generate(model, decoder("scd", window=8), model.encode(prompts), [seed] * 3, sampling=sampling).tokens
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def rows_do_not_depend_on_their_neighbours(model: ImageModel, prompts: list[str], sampling: SamplingParams) -> None:
    """Prompts of different lengths give the same tokens and likelihoods alone, in a batch, and refilled into two rows."""
    chosen = decoder("scd", window=6)
    seeds = list(range(len(prompts)))
    together = generate(model, chosen, model.encode(prompts), seeds, sampling=sampling)
    refilled = dict(stream(model, chosen, list(zip(prompts, seeds, strict=True)), rows=2, sampling=sampling))
    likely = nll(model, model.encode(prompts), together.tokens, sampling)
    for row, prompt in enumerate(prompts):
        alone = generate(model, chosen, model.encode([prompt]), [row], sampling=sampling)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert (refilled[row].tokens == together.samples[row].tokens).all()
        assert torch.allclose(nll(model, model.encode([prompt]), alone.tokens, sampling)[0], likely[row], atol=1e-6)
