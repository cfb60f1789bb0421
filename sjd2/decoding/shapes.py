"""The shape of a pass: a chain, or a tree of several draft tokens for one position; and the path that verification accepts.

# B samples, S slots of a pass, C slots of the main chain, L path length, V image vocabulary
Slot 0 is the last committed token, parents stand before their children, siblings in the order in which they were drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class AcceptedPath:
    """The draft tokens that a pass accepts, from slot 0 downwards.

    slots [B, L + 1]: by depth, slot 0 first; length [B]: accepted draft tokens; end [B]: the last accepted slot;
    can_extend [B]: whether a token may be drawn after the end, since its input was clean; None: always.
    """

    slots: Tensor
    length: Tensor
    end: Tensor
    can_extend: Tensor | None


@dataclass(frozen=True)
class Chain:
    """Every slot is the only child of the slot to its left; the methods are those of `Tree`."""

    ranks = 1
    reorder_depth = 0
    sibling = None
    number = None
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

    def on_path(self, tokens: Tensor, path: AcceptedPath) -> Tensor:
        """Return the tokens of the slots below slot 0 on a path: [B, S] -> [B, L]."""
        return tokens[:, 1:]

    def attn_mask(self, rows: int) -> Tensor | None:
        """Return which slots see which [B, S, S]; None: causally."""
        return None

    def inside(self, clean: Tensor | None) -> Tensor | None:
        """Return which draft tokens have only clean inputs before them: [B, S] -> [B, S-1]; None: all."""
        return None if clean is None else torch.nn.functional.pad(clean[:, 1:-1].cumprod(1) > 0, (1, 0), value=True)

    def accepted_path(self, accepted: Tensor, clean: Tensor | None) -> AcceptedPath:
        """Follow accepted draft tokens [B, S - 1] from slot 0; stop after the first input that is not `clean` [B, S].

        After a noisy input every distribution is conditioned on something that is not committed; without the stop the error
        is a total variation of 0.25 on a toy. clean=None never stops.
        """
        rows, size = len(accepted), accepted.shape[1] + 1
        slots = torch.arange(size, device=accepted.device).expand(rows, -1)
        length = accepted.cumprod(1).sum(1)
        if clean is None:
            return AcceptedPath(slots, length, length, None)
        reach = 1 + clean[:, 1:].cumprod(1).sum(1)
        length = torch.minimum(length, reach)
        return AcceptedPath(slots, length, length, length < reach)


CHAIN = Chain()


class Wave(NamedTuple):
    """Slots that a joint decision weighs at once, and what each is weighed given: slots, given [n].

    first: first children, given their parents; else further children, given the sibling before.
    """

    slots: Tensor
    given: Tensor
    first: bool


class Tails(NamedTuple):
    """Runs of slots without siblings: slots [T, L] and which of these there are [T, L], the parent of each run [T].

    flat, place [n]: all of their slots, and where these stand among T x L.
    """

    slots: Tensor
    real: Tensor
    parents: Tensor
    flat: Tensor
    place: Tensor

    @classmethod
    def of(cls, children: list[list[int]], device: torch.device) -> Tails:
        heads = [0, *(child for siblings in children if len(siblings) > 1 for child in siblings)]
        runs: list[tuple[int, list[int]]] = []
        for head in heads:
            slot, run = head, []
            while len(children[slot]) == 1:
                slot = children[slot][0]
                run.append(slot)
            if run:
                runs.append((head, run))
        length = max((len(run) for _, run in runs), default=0)
        slots = [run + [1] * (length - len(run)) for _, run in runs]
        real = [[at < len(run) for at in range(length)] for _, run in runs]
        place = [t * length + at for t, (_, run) in enumerate(runs) for at in range(len(run))]
        return cls(
            torch.tensor(slots, dtype=torch.long, device=device).view(len(runs), length),
            torch.tensor(real, dtype=torch.bool, device=device).view(len(runs), length),
            torch.tensor([head for head, _ in runs], dtype=torch.long, device=device),
            torch.tensor([slot for _, run in runs for slot in run], dtype=torch.long, device=device),
            torch.tensor(place, dtype=torch.long, device=device),
        )


@dataclass(frozen=True, eq=False)
class Tree:
    """Several draft tokens for one position. Tensors have a leading 1 where all rows share the shape, else B.

    parents [b, S]; depth [b, S]; seen [b, S, S]: ancestors, the slot itself included; rank [b, S]: place among siblings;
    earlier [b, S, S]: siblings drawn before; before, last [b, S]: the sibling just before, the last child (0: none).
    ranks: largest number of children, deepest: largest depth. groups, earlier_groups: places among the draft tokens of the
    slots of each rank, and of the sibling just before each, where the shape is static.
    follow [S, C]: the slot that continues a slot at each depth: first children, then the main chain; static only.
    reorder_depth: depths 1..reorder_depth hold slots whose number is not their depth. lanes [b, S]: which chain each slot
    belongs to, where several chains live on from pass to pass. spine [P]: the slots of first children from slot 0 downwards;
    waves: all others, in an order in which joint decisions can weigh them; order [S]: children in their order, then their
    parent; tails: runs of slots without siblings; static only. number [1, S - 1]: what tells all draft tokens apart, kept, as
    Inductor multiplies an arange of a traced pass as an index, which overflows.
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
    earlier_groups: tuple[Tensor, ...] = ()
    follow: Tensor | None = None
    reorder_depth: int = 0
    lanes: Tensor | None = None
    spine: Tensor | None = None
    waves: tuple[Wave, ...] = ()
    order: Tensor | None = None
    tails: Tails | None = None
    number: Tensor | None = None

    @classmethod
    def of(cls, parents: Tensor, *, ranks: int, deepest: int) -> Tree:
        """Build from parents [b, S] on their device; the host knows no more than bounds on ranks and depth."""
        size = parents.shape[1]
        deepest = min(deepest, size - 1)
        slot = torch.arange(size, device=parents.device)
        seen = (slot == slot[:, None]) | (slot == parents[..., None])
        for _ in range(max(deepest - 1, 0).bit_length()):
            seen = (seen.float() @ seen.float()) > 0
        child = slot > 0
        earlier = (parents[:, None] == parents[..., None]) & (slot < slot[:, None]) & child & child[:, None]
        before = (earlier * slot).amax(-1)
        last = torch.zeros_like(parents).scatter_reduce(1, parents, slot.expand_as(parents) * child, "amax")
        depth, rank = seen.sum(-1) - 1, earlier.sum(-1)
        number = slot[None, 1:]
        return cls(
            parents, depth, seen, rank, earlier, before, last, ranks, deepest, reorder_depth=deepest, number=number
        )

    @classmethod
    def static(cls, parents: list[int], *, chain: int, device: torch.device, lanes: list[int] | None = None) -> Tree:
        """Build a shape that all rows share, whose first `chain` slots are a chain (1: only the last committed token)."""
        depth = [0] * len(parents)
        children: list[list[int]] = [[] for _ in parents]
        for slot in range(1, len(parents)):
            depth[slot] = depth[parents[slot]] + 1
            children[parents[slot]].append(slot)
        ranks = max(map(len, children))
        spine, waves = _waves(children)
        follow = [list(range(chain)) for _ in parents]
        for slot in range(len(parents)):
            node = slot
            while depth[node] < chain:
                follow[slot][depth[node]] = node
                if not children[node]:
                    break
                node = children[node][0]
        groups = [[c[r] - 1 for c in children if len(c) > r] for r in range(ranks)]
        earlier = [[], *([c[r - 1] - 1 for c in children if len(c) > r] for r in range(1, ranks))]
        return replace(
            cls.of(torch.tensor([parents], device=device), ranks=ranks, deepest=max(depth)),
            groups=tuple(torch.tensor(slots, device=device) for slots in groups),
            earlier_groups=tuple(torch.tensor(slots, dtype=torch.long, device=device) for slots in earlier),
            follow=torch.tensor(follow, device=device),
            reorder_depth=max((d for slot, d in enumerate(depth) if d != slot), default=0),
            lanes=None if lanes is None else torch.tensor([lanes], device=device),
            spine=torch.tensor(spine, device=device),
            waves=tuple(
                Wave(torch.tensor(slots, device=device), torch.tensor(given, device=device), first)
                for slots, given, first in waves
            ),
            order=torch.tensor(_post_order(children), device=device),
            tails=Tails.of(children, device),
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

    def on_path(self, tokens: Tensor, path: AcceptedPath) -> Tensor:
        return tokens.gather(1, path.slots[:, 1:])

    def attn_mask(self, rows: int) -> Tensor:
        return self.seen.expand(rows, -1, -1)

    def _after_clean(self, clean: Tensor) -> Tensor:
        """Return which slots have only clean inputs before them: [B, S] -> [B, S]."""
        ancestors = self.seen & ~torch.eye(clean.shape[1], dtype=torch.bool, device=clean.device)
        return (clean[:, None] | ~ancestors).all(-1)

    def inside(self, clean: Tensor | None) -> Tensor | None:
        return None if clean is None else self._after_clean(clean)[:, 1:]

    def accepted_path(self, accepted: Tensor, clean: Tensor | None) -> AcceptedPath:
        rows, size = len(accepted), accepted.shape[1] + 1
        slot = torch.arange(size, device=accepted.device)
        accepted = torch.nn.functional.pad(accepted, (1, 0), value=True)
        # of its siblings, in the order of the tests
        first = accepted & ~(self.earlier & accepted[:, None]).any(-1)
        on_path = (first[:, None] | ~self.seen).all(-1)
        if clean is not None:
            on_path &= self._after_clean(clean)
        depth = self.depth.expand(rows, -1)
        end = (on_path * (depth + 1)).argmax(1)
        slots = torch.zeros(rows, self.deepest + 1, dtype=torch.long, device=accepted.device)
        slots = slots.scatter_reduce(1, depth, slot * on_path, "amax")
        can_extend = None if clean is None else clean.gather(1, end[:, None])[:, 0]
        return AcceptedPath(slots, on_path.sum(1) - 1, end, can_extend)


Shape = Chain | Tree


def _waves(children: list[list[int]]) -> tuple[list[int], list[tuple[list[int], list[int], bool]]]:
    """Return the first children from slot 0 downwards; and waves: slots, what each is weighed given, its kind."""
    spine = [0]
    while children[spine[-1]]:
        spine.append(children[spine[-1]][0])
    before = {later: earlier for siblings in children for earlier, later in itertools.pairwise(siblings)}
    above = {siblings[0]: slot for slot, siblings in enumerate(children) if siblings}
    known, waves = set(spine), []
    while len(known) < len(children):
        first, slots = False, [slot for slot, b in before.items() if b in known and slot not in known]
        if not slots:
            first, slots = True, [slot for slot, a in above.items() if a in known and slot not in known]
        known.update(slots)
        given = above if first else before
        waves.append((slots, [given[slot] for slot in slots], first))
    return spine, waves


def _post_order(children: list[list[int]]) -> list[int]:
    """Return the place of each slot where every slot stands after its children."""
    visit, stack = [], [0]
    while stack:  # parents before children, later siblings first: backwards this is the order
        slot = stack.pop()
        visit.append(slot)
        stack.extend(children[slot])
    place = [0] * len(children)
    for number, slot in enumerate(reversed(visit)):
        place[slot] = number
    return place


def gather_slots(field: Tensor, slots: Tensor) -> Tensor:
    """Pick slots of a field: [B, S, X], [B, T] -> [B, T, X]."""
    return field.gather(1, slots[..., None].expand(*slots.shape, field.shape[-1]))
