"""Small causal models whose drafts can all be enumerated, and distributions of single draft tokens; all in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sjd2.decoding.interfaces import DraftRun, Judgement, Verifier

CODES, DRAFTS = 3, 3


def chains(seed: int, joint: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Enumerate all drafts of a random causal model: tokens [n, 3], p [n, 4, V] at each slot, q [n, 3, V].

    joint: q depends on the draft tokens before, as a draft model's does; else only on its position, as in a Jacobi window.
    """
    generator = torch.Generator().manual_seed(seed)

    def tables(depth: int, lacks: int) -> Tensor:
        x = (torch.randn(CODES**depth, CODES, generator=generator).double() * 1.5).exp()
        x[depth::2, lacks] = 0  # some distributions lack a code
        return x / x.sum(-1, keepdim=True)

    tokens = torch.tensor(list(itertools.product(range(CODES), repeat=DRAFTS)))
    history = [(tokens[:, :k] * CODES ** torch.arange(k)).sum(1) for k in range(DRAFTS + 1)]
    p = torch.stack([tables(k, 0)[history[k]] for k in range(DRAFTS + 1)], 1)
    q = torch.stack([tables(k, 1)[history[k] if joint else history[k] * 0] for k in range(DRAFTS)], 1)
    return tokens, p, q


def judge(verifier: Verifier, tokens: Tensor, p: Tensor, q: Tensor | None, **more: Tensor) -> Judgement:
    never = torch.zeros_like(tokens, dtype=torch.bool)
    fields = {"certain": never, "inside": None, "coin": torch.full_like(p[:, :-1, 0], 0.5)} | more
    return verifier.judge(DraftRun(p=p[:, :-1], q=q, token=tokens, depth=torch.arange(1, DRAFTS + 1), **fields))


def ar_probs(tokens: Tensor, p: Tensor) -> Tensor:
    prefix = p[:, :-1].gather(-1, tokens[..., None])[..., 0].prod(1)
    return (prefix[:, None] * p[:, -1]).view((CODES,) * (DRAFTS + 1))


def distributions(vocabulary: int, seed: int, sharpness: float = 1.5) -> tuple[Tensor, Tensor]:
    """Two random distributions in float64; each lacks a code."""
    p, q = (torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed)).double() * sharpness).exp()
    p[seed % vocabulary], q[(3 * seed + 1) % vocabulary] = 0, 0
    return p / p.sum(), q / q.sum()


def output(p: Tensor, q: Tensor, accept_prob: Tensor, left: Tensor) -> Tensor:
    """Return the distribution of the committed token: sum over x of q(x) [a(x) 1_x + (1 - a(x)) left(.|x)], a: accept_prob."""
    return q * accept_prob + ((q * (1 - accept_prob))[:, None] * left).sum(0)


def distance(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)
