"""Prompts as CUDA graphs: a short prefill is bound by launches, as passes are.

# b prompts, P tokens of the longest prompt that the engine has room for, draft tokens after it included, D width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sjd2.models.base import ImageModel

MOST_TOKENS = 1024  # in all prompts together: beyond, the device takes longer than the host's launches


class RecordedPrompt:
    """The prefill of prompts [b, P, D] in one place: run once as it is, then replayed. Shorter ones are padded on the right.

    cache: what the prompts leave in keys and values, until the next ones come.
    """

    def __init__(self, model: ImageModel, embeds: Tensor, room: int) -> None:
        count, device = len(embeds), embeds.device
        self.model = model
        self.embeds = embeds.new_zeros(count, room, embeds.shape[2])
        self.positions = torch.arange(room, device=device).repeat(count, 1)
        self.gate: Tensor | None = None
        self.cache = model.cache(count, room)
        self.empty = self.cache.lengths
        self.hidden: Tensor | None = None
        self.replay: Callable[[], object] | None = None

    def __call__(
        self,
        embeds: Tensor,
        positions: Tensor | None,
        gate: Tensor | None,
        record: Callable[[Callable[[], None]], Callable[[], object]],
    ) -> Tensor:
        """Return the last hidden states of prompts: [b, p, D] with p <= P -> [b, p, D].

        positions, gate [b, p]: as the model takes them, in every call or in none (0 .. P - 1, and no gate). record: returns
        what replays a piece of work, which is not done by recording it.
        """
        width = embeds.shape[1]
        self.embeds.zero_()  # what an earlier prompt left behind may not be finite
        self.embeds[:, :width] = embeds
        if positions is not None:
            self.positions[:, :width] = positions
        if gate is not None:
            self.gate = torch.zeros_like(self.positions, dtype=torch.bool) if self.gate is None else self.gate
            self.gate[:, :width] = gate
        if self.replay is not None:
            self.replay()
        else:
            self.work()  # loads the kernels of this shape, which cannot happen in a recording
            self.replay = record(self.work)
        assert self.hidden is not None  # the work has been done
        return self.hidden[:, :width].clone()  # of one guidance branch; the next one comes into the same place

    def work(self) -> None:
        """Run the prompts."""
        self.cache.lengths = self.empty
        hidden = self.model.forward(self.embeds, self.positions, self.cache, gate=self.gate)
        if self.hidden is None:
            self.hidden = hidden.clone()
        else:
            self.hidden.copy_(hidden)
