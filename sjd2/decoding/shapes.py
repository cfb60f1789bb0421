"""Tree drafts: several guesses for one position, each with guesses of its own behind it; and the walk of verification.

# B samples, S slots of a pass, C slots of the main chain, L path length
A tree's slot 0 is the last committed token, parents stand before their children, siblings in the order they were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tree:
    """The shape of a pass. Tensors have a leading 1 where all rows share the shape, else B.

    parents [b, S]; depth [b, S]; seen [b, S, S]: ancestors, the slot itself included; rank [b, S]: place among siblings;
    earlier [b, S, S]: siblings drawn before; before, last [b, S]: the sibling just before, the last child (0: none).
    ranks: largest number of children, deepest: largest depth. groups: slots of each rank where the shape is static.
    follow [S, C]: the slot that goes on behind a slot at each depth: first children, then the main chain; static only.
    """

    parents: Tensor
    depth: Tensor
    seen: Tensor
    rank: Tensor
    earlier: Tensor
    before: Tensor
    last: Tensor
    ranks: int
    deepest: int
    groups: tuple[Tensor, ...] = ()
    follow: Tensor | None = None
    crooked: int = field(default=0)  # depths 1..crooked hold slots whose number is not their depth

    @classmethod
    def of(cls, parents: Tensor, *, ranks: int, deepest: int) -> Tree:
        """Build from parents [b, S] on their device; the host knows no more than bounds on ranks and depth."""
        size = parents.shape[1]
        slot = torch.arange(size, device=parents.device)
        seen = (slot == slot[:, None]) | (slot == parents[..., None])
        for _ in range(max(deepest - 1, 0).bit_length()):
            seen = (seen.float() @ seen.float()) > 0
        child = slot > 0
        earlier = (parents[:, None] == parents[..., None]) & (slot < slot[:, None]) & child & child[:, None]
        before = (earlier * slot).amax(-1)
        last = torch.zeros_like(parents).scatter_reduce(1, parents, slot.expand_as(parents) * child, "amax")
        return cls(
            parents, seen.sum(-1) - 1, seen, earlier.sum(-1), earlier, before, last, ranks, deepest, crooked=deepest
        )

    @classmethod
    def static(cls, parents: list[int], *, chain: int, device: torch.device) -> Tree:
        """Build a shape that all rows share, whose first `chain` slots are a chain (1: only the last committed token)."""
        depth = [0] * len(parents)
        children: list[list[int]] = [[] for _ in parents]
        for slot in range(1, len(parents)):
            depth[slot] = depth[parents[slot]] + 1
            children[parents[slot]].append(slot)
        ranks = max(map(len, children))
        follow = [list(range(chain)) for _ in parents]
        for slot in range(len(parents)):
            node = slot
            while depth[node] < chain:
                follow[slot][depth[node]] = node
                if not children[node]:
                    break
                node = children[node][0]
        crooked = max((d for slot, d in enumerate(depth) if d != slot), default=0)
        groups = tuple(torch.tensor([c[r] for c in children if len(c) > r], device=device) for r in range(ranks))
        built = cls.of(torch.tensor([parents], device=device), ranks=ranks, deepest=max(depth))
        fields = {
            name: getattr(built, name) for name in ("parents", "depth", "seen", "rank", "earlier", "before", "last")
        }
        return cls(
            **fields, ranks=ranks, deepest=max(depth), groups=groups, crooked=crooked,
            follow=torch.tensor(follow, device=device),
        )  # fmt: skip


@dataclass
class Walk:
    """How far a pass went: path [B, L + 1] slots by depth, accepted [B] guesses, end [B] the last accepted slot.

    open [B]: whether a token may be drawn behind the end; its input was clean.
    """

    path: Tensor
    accepted: Tensor
    end: Tensor
    open: Tensor


def walk(tree: Tree | None, keep: Tensor, clean: Tensor | None) -> Walk:
    """Follow the kept guesses from the root: keep [B, S-1]; clean [B, S] stops behind the first noisy input (None: never).

    Behind a noisy input every law is computed on something that is not committed; without the stop: TV 0.25 on a toy.
    """
    rows, size = len(keep), keep.shape[1] + 1
    slot = torch.arange(size, device=keep.device)
    if tree is None:
        accepted = keep.cumprod(1).sum(1)
        reach = torch.full_like(accepted, size) if clean is None else 1 + clean[:, 1:].cumprod(1).sum(1)
        accepted = torch.minimum(accepted, reach)
        return Walk(slot.expand(rows, -1), accepted, accepted, accepted < reach)
    kept = torch.nn.functional.pad(keep, (1, 0), value=True)
    alive = kept & ~(tree.earlier & kept[:, None]).any(-1)
    on = (alive[:, None] | ~tree.seen).all(-1)
    if clean is not None:
        above = tree.seen & (slot != slot[:, None])
        on &= (clean[:, None] | ~above).all(-1)
    depth = tree.depth.expand(rows, -1)
    end = (on * (depth + 1)).argmax(1)
    path = torch.zeros(rows, tree.deepest + 1, dtype=torch.long, device=keep.device)
    path = path.scatter_reduce(1, depth, slot * on, "amax")
    open_ = torch.ones_like(end, dtype=torch.bool) if clean is None else clean.gather(1, end[:, None])[:, 0]
    return Walk(path, on.sum(1) - 1, end, open_)
