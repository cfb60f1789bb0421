"""What a pass of a decoder costs on the machine at hand, in the middle of an image.

# B samples, R model rows (2B with guidance, else B)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine
from sjd2.decoding.generate import RECORDED_PASSES, WARM_UP_PASSES
from sjd2.decoding.interfaces import State
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.base import Condition, ImageModel


@torch.inference_mode()
def stand_at(engine: Engine, place: int, prompts: Tensor) -> None:
    """Let all rows stand at one place of the image, as if the tokens before it were committed.

    prompts [R]: tokens of each row's prompt in the cache. Keys and values of the image are whatever lies there: a pass takes
    as long for them, but its tokens mean nothing.
    """
    engine.state.committed.fill_(place)
    if isinstance(engine.state, State):  # the window's
        engine.state.cached.fill_(place - 1)
    engine.cache.lengths.copy_(prompts + place - 1)
    engine.cache.bound = engine.prompt + place - 1
    engine.history.clear()


def pass_seconds(
    model: ImageModel,
    decoder: BaseDecoder,
    condition: Condition,
    *,
    sampling: SamplingParams,
    passes: int,
    graphs: Graphs | None = None,
) -> float:
    """Return the mean seconds of a pass of a batch, draft to refine, over `passes` from the middle of the image.

    graphs: replays them, as a run does; what it keeps is let go at the end.
    """
    rows = list(range(len(condition)))
    prompt = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
    start = start_engine if graphs is None else graphs.start
    try:
        engine = start(model, decoder, len(rows), prompt, sampling)
        engine.admit(rows, condition, rows)
        prompts, middle = engine.cache.lengths.clone(), engine.total // 2
        if isinstance(engine.state, State):  # a prefill that drafts may have committed several tokens
            prompts = (prompts - engine.per_branch(engine.state.cached)).clamp(min=0)
        for _ in range(WARM_UP_PASSES if graphs is None else RECORDED_PASSES):
            stand_at(engine, middle, prompts)
            engine.step()
        stand_at(engine, middle, prompts)
        begin = engine.now()
        for _ in range(passes):
            engine.step()
        return (engine.now() - begin) / passes
    finally:
        if graphs is not None:
            graphs.release()
