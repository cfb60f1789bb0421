"""The shape of a pass: a chain, or a tree of several draft tokens for one position; and the path that verification accepts.

# B samples, S slots of a pass, C slots of the main chain, L path length, V image vocabulary
Slot 0 is the last committed token, parents stand before their children, siblings in the order in which they were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class AcceptedPath:
    """The draft tokens that a pass accepts, from slot 0 downwards.

    slots [B, L + 1]: by depth, slot 0 first; length [B]: accepted draft tokens; end [B]: the last accepted slot;
    can_extend [B]: whether a token may be drawn after the end, since its input was clean.
    """

    slots: Tensor
    length: Tensor
    end: Tensor
    can_extend: Tensor


@dataclass(frozen=True)
class Chain:
    """Every slot is the only child of the slot to its left; the methods are those of `Tree`."""

    ranks = 1
    reorder_depth = 0
    sibling = None
    lane = None

    def depths(self, size: int, device: torch.device) -> Tensor:
        """Return the depth of each slot: [S]."""
        return torch.arange(size, device=device)

    def parent_probs(self, p: Tensor) -> Tensor:
        """Return the distribution that each draft token is a token of, its parent's output: [B, S, V] -> [B, S - 1, V]."""
        return p[:, :-1]

    def parent_slots(self, slots: Tensor) -> Tensor:
        """Return the parent of each slot: [B, T] -> [B, T]."""
        return slots - 1

    def last_child(self, slots: Tensor, size: int) -> Tensor:
        """Return the last child of slots [B] in a pass of `size` slots, 0 where there is none."""
        return torch.where(slots < size - 1, slots + 1, 0)

    def continuation(self, end: Tensor, depths: Tensor) -> Tensor:
        """Return the slots at depths [B, C] of the branch that continues slot `end` [B]: [B, C]."""
        return depths

    def attn_mask(self, rows: int) -> Tensor | None:
        """Return which slots see which [B, S, S]; None: causally."""
        return None

    def accepted_path(self, accepted: Tensor, clean: Tensor | None) -> AcceptedPath:
        """Follow accepted draft tokens [B, S - 1] from slot 0; stop after the first input that is not `clean` [B, S].

        After a noisy input every distribution is conditioned on something that is not committed; without the stop the error
        is a total variation of 0.25 on a toy. clean=None never stops.
        """
        rows, size = len(accepted), accepted.shape[1] + 1
        slots = torch.arange(size, device=accepted.device).expand(rows, -1)
        length = accepted.cumprod(1).sum(1)
        reach = torch.full_like(length, size) if clean is None else 1 + clean[:, 1:].cumprod(1).sum(1)
        length = torch.minimum(length, reach)
        return AcceptedPath(slots, length, length, length < reach)


CHAIN = Chain()


@dataclass(frozen=True, eq=False)
class Tree:
    """Several draft tokens for one position. Tensors have a leading 1 where all rows share the shape, else B.

    parents [b, S]; depth [b, S]; seen [b, S, S]: ancestors, the slot itself included; rank [b, S]: place among siblings;
    earlier [b, S, S]: siblings drawn before; before, last [b, S]: the sibling just before, the last child (0: none).
    ranks: largest number of children, deepest: largest depth. groups: slots of each rank where the shape is static.
    follow [S, C]: the slot that continues a slot at each depth: first children, then the main chain; static only.
    reorder_depth: depths 1..reorder_depth hold slots whose number is not their depth. lanes [b, S]: which chain each slot
    belongs to, where several chains live on from pass to pass.
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
    reorder_depth: int = 0
    lanes: Tensor | None = None

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
        depth, rank = seen.sum(-1) - 1, earlier.sum(-1)
        return cls(parents, depth, seen, rank, earlier, before, last, ranks, deepest, reorder_depth=deepest)

    @classmethod
    def static(cls, parents: list[int], *, chain: int, device: torch.device, lanes: list[int] | None = None) -> Tree:
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
        return replace(
            cls.of(torch.tensor([parents], device=device), ranks=ranks, deepest=max(depth)),
            groups=tuple(torch.tensor([c[r] for c in children if len(c) > r], device=device) for r in range(ranks)),
            follow=torch.tensor(follow, device=device),
            reorder_depth=max((d for slot, d in enumerate(depth) if d != slot), default=0),
            lanes=None if lanes is None else torch.tensor([lanes], device=device),
        )

    @property
    def sibling(self) -> Tensor:
        """Return what tells draft tokens for one position apart, their lane or their place among siblings: [b, S - 1]."""
        return (self.rank if self.lanes is None else self.lanes)[:, 1:]

    @property
    def lane(self) -> Tensor | None:
        """Return the lane of each draft token: [b, S - 1]; None where only one chain is kept."""
        return None if self.lanes is None else self.lanes[:, 1:]

    def depths(self, size: int, device: torch.device) -> Tensor:
        return self.depth

    def parent_probs(self, p: Tensor) -> Tensor:
        if len(self.parents) == 1:
            return p[:, self.parents[0, 1:]]
        return gather_slots(p, self.parents[:, 1:])

    def parent_slots(self, slots: Tensor) -> Tensor:
        return self.parents.expand(len(slots), -1).gather(1, slots)

    def last_child(self, slots: Tensor, size: int) -> Tensor:
        return self.last.expand(len(slots), -1).gather(1, slots[:, None])[:, 0]

    def continuation(self, end: Tensor, depths: Tensor) -> Tensor:
        return depths if self.follow is None else self.follow[end].gather(1, depths)

    def attn_mask(self, rows: int) -> Tensor:
        return self.seen.expand(rows, -1, -1)

    def accepted_path(self, accepted: Tensor, clean: Tensor | None) -> AcceptedPath:
        rows, size = len(accepted), accepted.shape[1] + 1
        slot = torch.arange(size, device=accepted.device)
        accepted = torch.nn.functional.pad(accepted, (1, 0), value=True)
        first = accepted & ~(self.earlier & accepted[:, None]).any(-1)  # of its siblings, in the order of the tests
        on_path = (first[:, None] | ~self.seen).all(-1)
        if clean is not None:
            ancestors = self.seen & (slot != slot[:, None])
            on_path &= (clean[:, None] | ~ancestors).all(-1)
        depth = self.depth.expand(rows, -1)
        end = (on_path * (depth + 1)).argmax(1)
        slots = torch.zeros(rows, self.deepest + 1, dtype=torch.long, device=accepted.device)
        slots = slots.scatter_reduce(1, depth, slot * on_path, "amax")
        can_extend = torch.ones_like(end, dtype=torch.bool) if clean is None else clean.gather(1, end[:, None])[:, 0]
        return AcceptedPath(slots, on_path.sum(1) - 1, end, can_extend)


Shape = Chain | Tree


def gather_slots(field: Tensor, slots: Tensor) -> Tensor:
    """Pick slots of a field: [B, S, X], [B, T] -> [B, T, X]."""
    return field.gather(1, slots[..., None].expand(*slots.shape, field.shape[-1]))
