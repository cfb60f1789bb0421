"""EAGLE drafting: a one-layer head drafts along a chain, a fixed tree (EAGLE-1) or one grown by confidence (EAGLE-2).

All draft tokens are drawn anew in each pass; the head sees the true states of everything committed.
# B samples, R model rows, S slots of a pass, T nodes the head steps on, F families (children of a parent), V codes, D width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.eagle.head import SETTINGS, WEIGHTS, EagleHead, PairCache, read_settings
from sjd2.decoding.finite import FaultSource
from sjd2.decoding.interfaces import Draft, Drafter, PassResult, State
from sjd2.decoding.noise import Purpose, sibling_marks
from sjd2.decoding.sampling import SamplingParams, without
from sjd2.decoding.shapes import Tree, gather_slots
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel
from sjd2.models.hub import WeightSource, check_part, locate_part
from sjd2.models.spec import ModelSpec


@dataclass
class EagleMemory:
    """The head's own batch: its cache, the state it predicts at each row's last token, and what was committed since.

    ahead [R, D]; entered [R]: rows whose `ahead` comes from a prefill; tokens [B, L], states [R, L, D], count [B]: committed.
    """

    cache: PairCache
    ahead: Tensor
    entered: Tensor
    tokens: Tensor | None = None
    states: Tensor | None = None
    count: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Eagle(Drafter):
    """Draft with an EAGLE head (arXiv 2401.15077; dynamic trees arXiv 2406.16858).

    weights: folder or hub id of a head (stage=finetune finetune=eagle). shape: chain; static: `tree` lists its nodes as paths
    of child numbers, children drawn without replacement; dynamic: at each of `depth` depths the `top_k` best nodes by
    cumulative probability are expanded and the best window - 1 candidates are kept. Static draws and dynamic (deterministic)
    candidates are both exact; sampled candidates chosen by their scores and verified as draws would not be.
    """

    weights: str | None = None
    shape: str = "dynamic"
    tree: Sequence[Sequence[int]] = ()
    depth: int = 5
    top_k: int = 10

    def __post_init__(self) -> None:
        choose("decoder.drafter.shape", self.shape, ("chain", "static", "dynamic"))
        if self.shape == "static":
            self.parents()
        if self.depth < 1 or self.top_k < 1:
            raise UserError("decoder.drafter.depth and decoder.drafter.top_k must be 1 or more.")

    def check(self, spec: ModelSpec, window: int) -> None:
        """Raise `UserError` if there is no head, or the window is not that of the tree."""
        if self.weights is None:
            raise UserError(
                f"an EAGLE drafter needs a head: make one with stage=finetune finetune=eagle model={spec.name} and give its "
                "folder as decoder.drafter.weights=, or use the training-free decoder=scd."
            )
        check_part(self.source(), read_settings)
        if self.shape == "static" and window != len(self.tree) + 1:
            raise UserError(
                f"decoder.drafter.tree has {len(self.tree)} nodes, so decoder.window must be {len(self.tree) + 1}, "
                f"got {window}."
            )
        if self.shape == "dynamic" and self.top_k > spec.layout.vocabulary:
            raise UserError(f"decoder.drafter.top_k={self.top_k} exceeds the vocabulary of {spec.layout.vocabulary}.")
        if self.shape == "dynamic" and window - 1 > self.top_k + (self.depth - 1) * self.top_k**2:
            raise UserError(
                f"decoder.drafter.depth={self.depth} and top_k={self.top_k} yield fewer candidates than decoder.window - 1 = "
                f"{window - 1}; take a smaller window or more of either."
            )

    def source(self) -> WeightSource:
        """Return where the head lies."""
        return WeightSource(str(self.weights), "decoder.drafter.weights", required=(SETTINGS, WEIGHTS))

    @property
    def is_tree(self) -> bool:
        return self.shape != "chain"

    def num_carried(self, window: int) -> int:
        return 1

    def lookahead(self, window: int) -> int:
        static = max(map(len, self.tree), default=1)
        return {"chain": window - 1, "static": static, "dynamic": self.depth}[self.shape]

    def num_forwards(self, window: int) -> int:
        """Return one that takes in what was committed, and one for each depth after the first."""
        return self.lookahead(window)

    def parents(self) -> list[int]:
        """Return the parent slot of each slot of the static tree; raises `UserError` if a node has none."""
        nodes = {tuple(node) for node in self.tree}
        if () in nodes or len(nodes) < len(self.tree):
            raise UserError(
                "decoder.drafter.tree has an empty or a repeated node; each node is one path, e.g. [[0],[1],[0,0]]."
            )
        number = {(): 0} | {node: slot for slot, node in enumerate(sorted(nodes, key=lambda n: (len(n), n)), 1)}
        orphans = [
            node
            for node in map(tuple, self.tree)
            if node[:-1] not in number or (node[-1] and (*node[:-1], node[-1] - 1) not in number)
        ]
        if orphans or not self.tree:
            raise UserError(
                f"decoder.drafter.tree has a node without its parent or earlier sibling: {list(orphans[0])}."
                if orphans
                else "decoder.drafter.shape=static needs decoder.drafter.tree, e.g. [[0],[1],[0,0]]."
            )
        return [0] + [number[node[:-1]] for node in list(number)[1:]]

    def bind(self, model: ImageModel, window: int) -> EagleDrafter:
        return EagleDrafter(self, model, window)


class EagleDrafter(Drafter):
    """`Eagle` on a model: the head, and the tree where it is fixed."""

    traceable = False  # the head writes keys and values of its own

    def __init__(self, settings: Eagle, model: ImageModel, window: int) -> None:
        self.settings, self.model = settings, model
        self.head = EagleHead.load(locate_part(settings.source()), model)
        if settings.shape != "dynamic":
            parents = [0, *range(window - 1)] if settings.shape == "chain" else settings.parents()
            self.tree = Tree.static(parents, chain=1, device=model.device)
            self.depths = _depths(parents, self.tree)
            count = max(len(depth.children) for depth in self.depths)
            self.repeated_draws = Purpose.FRESH, sibling_marks(count, model.device)

    def init_state(self, rows: int, capacity: int, sampling: SamplingParams) -> EagleMemory:
        rows *= 2 if sampling.guided else 1
        device = self.model.device
        ahead = torch.zeros(rows, self.head.fc.out_features, dtype=self.model.dtype, device=device)
        cache = self.head.cache(rows, capacity + self.settings.top_k * self.settings.depth)
        return EagleMemory(cache, ahead, torch.zeros(rows, dtype=torch.bool, device=device))

    def grow(self, memory: EagleMemory, capacity: int) -> None:
        memory.cache.reserve(capacity + self.settings.top_k * self.settings.depth)

    def admit(
        self,
        memory: EagleMemory,
        rows: Tensor,
        branch: int,
        embeds: Tensor,
        hidden: Tensor,
        lengths: Tensor,
        token: Tensor,
    ) -> None:
        """Run the head over new prompts; an unconditional prompt may be one for all rows."""
        count, place = len(rows), rows + branch * (len(memory.ahead) // 2)
        embeds, hidden, lengths = (x.expand(count, *x.shape[1:]).clone() for x in (embeds, hidden, lengths))
        memory.ahead[place] = self.head.prefill(memory.cache, place, embeds, hidden, lengths, token)
        memory.entered[place] = True
        if memory.count is not None:
            memory.count[rows] = 0

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        """Take in what was committed, then draft depth by depth."""
        memory = state.memory
        ahead = memory.ahead
        memory.cache.bound = state.bound  # the head has as many pairs as the model has tokens
        if memory.count is not None:
            ahead = self.head.extend(memory.cache, memory.tokens, memory.states, memory.count)
            ahead = torch.where(memory.entered[:, None], memory.ahead, ahead)
        memory.ahead, memory.count, memory.entered = ahead, None, torch.zeros_like(memory.entered)
        draft = self._dynamic if self.settings.shape == "dynamic" else self._static
        return draft(carried.tokens, ahead, state)

    def update(self, result: PassResult, state: State) -> None:
        """Keep the true states of the accepted path, which the head reads before it drafts again."""
        memory, path = state.memory, result.path.slots
        branches = len(result.hidden) // len(result.num_new)
        depth = torch.arange(path.shape[1], device=path.device)
        positions = (state.committed - result.num_new)[:, None] + depth
        memory.tokens = state.tokens.gather(1, positions.clamp(max=state.tokens.shape[1] - 1))
        memory.states = gather_slots(result.hidden, path.repeat(branches, 1))
        memory.count = result.num_new.clone()

    # ---- fixed shapes

    def _static(self, last: Tensor, ahead: Tensor, state: State) -> Draft:
        """Draw children without replacement from the head's distribution at each parent; record them renormalised."""
        rows, window, vocabulary = len(last), state.window, self.model.layout.vocabulary
        tokens = torch.nn.functional.pad(last, (0, window - 1))
        probs = torch.zeros(rows, window - 1, vocabulary, dtype=state.noise.dtype, device=tokens.device)
        states = ahead[:, None]
        for number, depth in enumerate(self.depths, 1):
            q = state.sampling.probs(self.model.logits(states)).to(probs)  # [B, F, V]
            position, forced = state.at_depth(number)
            free = forced < 0
            drawn: Tensor | None = None
            for rank, slots in enumerate(depth.children):
                q = (
                    q if drawn is None else without(q, drawn)[:, : len(slots)]
                )  # families with most children stand first
                drawn = state.sampler.draw(q, position.expand(-1, len(slots)), Purpose.FRESH, state.iteration, rank)
                tokens[:, slots], probs[:, depth.places[rank]] = torch.where(free, drawn, forced), q
            if depth.inner is not None:
                # set with inner
                assert depth.level is not None
                assert depth.seen is not None
                known = states[:, depth.home]
                states = self.head.step(
                    state.memory.cache, tokens[:, depth.inner], known, depth.level, depth.seen, depth.before
                )
        return Draft(tokens, probs, shape=self.tree)

    # ---- shapes grown by confidence

    def _dynamic(self, last: Tensor, ahead: Tensor, state: State) -> Draft:
        """Grow the tree by cumulative probability: candidates are the top_k of each distribution, so they count as one-hot."""
        rows, k, device, window = len(last), self.settings.top_k, last.device, state.window
        q = state.sampling.probs(self.model.logits(ahead[:, None]))  # [B, 1, V]
        state.watch(q, FaultSource.DRAFT)
        best = q.log().topk(k)
        tokens, scores = best.indices[:, 0], best.values[:, 0]  # all candidates so far [B, A]
        parents = torch.full_like(tokens, -1)
        chosen, states = torch.arange(k, device=device).expand(rows, -1), ahead[:, None].expand(-1, k, -1)
        seen = torch.eye(k, dtype=torch.bool, device=device).expand(rows, -1, -1)  # [B, k, stepped]
        branches = len(ahead) // rows
        for depth in range(1, self.settings.depth):
            level = torch.full((1, k), depth, device=device)
            states = self.head.step(
                state.memory.cache, tokens.gather(1, chosen), states, level, seen, (depth - 1) * k
            )  # [R, k, D]
            q = state.sampling.probs(self.model.logits(states))
            state.watch(q, FaultSource.DRAFT)
            best = q.log().topk(k)  # [B, k, k]
            grown = (scores.gather(1, chosen)[..., None] + best.values).flatten(1)
            begin = tokens.shape[1]
            tokens = torch.cat([tokens, best.indices.flatten(1)], 1)
            scores = torch.cat([scores, grown], 1)
            parents = torch.cat([parents, chosen.repeat_interleave(k, 1)], 1)
            top = grown.topk(k).indices.sort(1).values
            chosen, home = begin + top, torch.div(top, k, rounding_mode="floor")
            states = gather_slots(states, home.repeat(branches, 1))
            own = torch.eye(k, dtype=torch.bool, device=device).expand(rows, -1, -1)
            seen = torch.cat([seen.gather(1, home[..., None].expand(-1, -1, seen.shape[2])), own], 2)
        # a child never scores above its parent, and a stable sort keeps the parent first where they tie
        kept = scores.sort(dim=1, descending=True, stable=True).indices[:, : window - 1].sort(1).values
        number = torch.zeros(rows, tokens.shape[1] + 1, dtype=torch.long, device=device)
        slots = torch.arange(1, window, device=device).expand(rows, -1)
        number.scatter_(1, kept + 1, slots)  # candidate c is slot number[c + 1], the root is slot number[0] = 0
        above = number.gather(1, parents.gather(1, kept) + 1)
        tree = Tree.of(torch.nn.functional.pad(above, (1, 0)), ranks=k, deepest=self.settings.depth)
        tokens = torch.cat([last, tokens.gather(1, kept)], 1)
        return Draft(state.force(tokens, tree), shape=tree)


@dataclass(frozen=True)
class _Depth:
    """One depth of a static tree: families [F] ordered by their number of children, largest first.

    children: per rank the slots, places: the same among the draft tokens; inner [T]: slots of this depth that have children
    of their own, home [T] the family of each among the families of this depth, seen [1, T, before + T] and before for the
    head's mask, level [1, T] their depth.
    """

    children: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    inner: Tensor | None
    home: Tensor | None = None
    seen: Tensor | None = None
    level: Tensor | None = None
    before: int = 0


def _depths(parents: list[int], tree: Tree) -> list[_Depth]:
    """Lay out the tree of these parents, which the host knows, on the device of `tree`."""
    device, depth = tree.parents.device, [0] * len(parents)
    children: dict[int, list[int]] = {}
    for slot in range(1, len(parents)):
        depth[slot] = depth[parents[slot]] + 1
        children.setdefault(parents[slot], []).append(slot)
    found, stepped, order = [], [], [0]  # order: parents of this depth's families
    for level in range(1, max(depth) + 1):
        ranks = [
            torch.tensor([children[p][r] for p in order if len(children[p]) > r], device=device)
            for r in range(len(children[order[0]]))
        ]
        inner = sorted((c for p in order for c in children[p] if c in children), key=lambda c: -len(children[c]))
        if not inner:
            found.append(_Depth(tuple(ranks), tuple(slots - 1 for slots in ranks), None))
            break
        nodes = torch.tensor([*stepped, *inner], device=device)
        index = torch.tensor(inner, device=device)
        found.append(
            _Depth(
                tuple(ranks),
                tuple(slots - 1 for slots in ranks),
                index,
                torch.tensor([order.index(parents[c]) for c in inner], device=device),
                tree.seen[:, index][:, :, nodes],
                torch.full((1, len(inner)), level, device=device),
                len(stepped),
            )
        )
        stepped, order = [*stepped, *inner], inner
    return found
