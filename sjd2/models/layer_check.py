"""Whether the kernels of fused_layers.py give what the modules give, on the model's device, and are no slower there.

# R model rows, S slots of a pass, W width, D head width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sjd2.errors import first_line
from sjd2.models.base import ImageModel
from sjd2.models.fused_layers import (
    PARTS,
    RESIDUAL,
    ROTARY,
    SILU,
    Ahead,
    in_place,
    part_of,
    put_layers,
    remove_layers,
    rotated,
)
from sjd2.models.kv_cache import cache_argument
from sjd2.models.norms import fuse_norms
from sjd2.models.window_attention import NAME, TOLERANCE, attention

ROWS, BEFORE = 2, 3  # model rows, and entries of the cache that are there already
WIDTHS = (1, 5)  # slots of the passes that are compared
TIMED = (1, 32)  # slots of the passes that are timed
REPEATS, ROUNDS = 10, 3
SLOWER = 1.05  # of the plain module's time: beyond it the kernel is left out

Work = Callable[[], Any]


def fuse_layers(model: ImageModel, timer: Callable[[Work], float] | None = None) -> list[str]:
    """Put the kernels into a model's layers where they pass; return what is left out and why, a sentence each.

    timer: seconds of some work, to leave out what is slower than the modules; by default as `device_seconds`.
    """
    timer = timer or functools.partial(device_seconds, model.device)
    if model.adapter is not None:
        model.adapter.set_gate(None)  # as in a pass without noise
    parts = PARTS if model.fused else (SILU, RESIDUAL)  # without the attention kernel nothing reads a window
    parts = tuple(part for part in parts if not in_place(model.transformer, part))
    why = put_layers(model.transformer, parts)
    for part in parts:
        if part not in why and (fault := _fault(model, part, timer)) is not None:
            why[part] = fault
            remove_layers(model.transformer, (part,))
    fuse_norms(model)  # the last one may be a norm of its own again
    reasons = dict.fromkeys(why.values())
    grouped = {reason: " and ".join(part for part in why if why[part] == reason) for reason in reasons}
    return [f"{names} run as torch's operations, not as one kernel: {reason}" for reason, names in grouped.items()]


def _fault(model: ImageModel, part: str, timer: Callable[[Work], float]) -> str | None:
    """Return what is wrong with a part's kernel, or None."""
    try:
        if not (error := errors(model, part)) < TOLERANCE[model.dtype]:
            return f"the kernel differs from the module by {error:.1e}"
        plain = _plain_seconds(model, part, timer)
        fused = plain and seconds(model, part, timer, fused=True)
    except Exception as error:  # whatever the compiler or the driver raises: the modules still run
        return first_line(error)
    slow = fused > SLOWER * plain
    return f"with it the module takes {1e6 * fused:.0f} us, without {1e6 * plain:.0f}" if slow else None


def _plain_seconds(model: ImageModel, part: str, timer: Callable[[Work], float]) -> float:
    """Return the time of a part's module without its kernel; 0 on a device that refuses to record even that."""
    try:
        return seconds(model, part, timer, fused=False)
    except RuntimeError:
        return 0.0


@torch.inference_mode()
def errors(model: ImageModel, part: str) -> float:
    """Return the largest relative error of a part in the first layer, against the layer's own modules."""
    compare = {ROTARY: _attention_error, SILU: _mlp_error, RESIDUAL: _layer_error}[part]
    return max(compare(model, slots) for slots in WIDTHS)


@torch.inference_mode()
def seconds(model: ImageModel, part: str, timer: Callable[[Work], float], *, fused: bool) -> float:
    """Return the time of a part's module in the first layer, with its kernel or without, for narrow and wide passes."""
    module, total = part_of(model.transformer.layers[0], part), 0.0
    call = module if fused else functools.partial(type(module).forward, module)
    for slots in TIMED:
        x, more = _random(model, slots), {} if part == SILU else _pass(model, slots)
        total += timer(functools.partial(call, x, **more))
    return total


def device_seconds(device: torch.device, work: Work) -> float:
    """Return what `work` takes a GPU as part of a recorded graph, the least of some rounds.

    Timed eagerly it would be the host's time.
    """
    with torch.cuda.device(device):  # of several; recordings are of the current one
        return _recorded_seconds(work)


def _recorded_seconds(work: Work) -> float:
    for _ in range(2):  # kernels are loaded, which cannot happen in a recording
        work()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                work()
    finally:
        torch.cuda.set_stream(stream)  # older torch stays on its own stream where a recording fails
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    rounds = []
    for _ in range(ROUNDS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) / 1000 / REPEATS)
    return min(rounds)


# ---- the parts


def _mlp_error(model: ImageModel, slots: int) -> float:
    mlp, x = model.transformer.layers[0].mlp, _random(model, slots)
    return _error(mlp(x), type(mlp).forward(mlp, x))


def _attention_error(model: ImageModel, slots: int) -> float:
    """Compare queries, keys and values; what attention makes of them would hide a wrong angle where it looks everywhere."""
    module, x = model.transformer.layers[0].self_attn, _random(model, slots)
    given = [_pass(model, slots) for _ in range(2)]
    caches = [more[cache_argument(type(module))] for more in given]
    query, *_ = rotated(module, x, given[0]["position_embeddings"], caches[0])
    with _queries() as seen:
        wanted = type(module).forward(module, x, **given[1])[0]
    pairs = [(query.transpose(1, 2), seen[0]), (module(x, **given[0])[0], wanted)]
    pairs += [(getattr(caches[0].layers[0], name), getattr(caches[1].layers[0], name)) for name in ("keys", "values")]
    return max(_error(found, wanted) for found, wanted in pairs)


def _layer_error(model: ImageModel, slots: int) -> float:
    """Compare a layer's output and the norm after it, for an input as large as what the layer adds."""
    layer, x = model.transformer.layers[0], _random(model, slots)
    given, plain = _pass(model, slots), type(layer).forward
    added = _states(plain(layer, x, **given)) - x
    x = x * (added.float().norm() / x.float().norm()).clamp(min=1e-2).to(x.dtype)
    wanted, found = plain(layer, x, **given), layer(x, **given)
    if type(found) is not type(wanted):
        raise TypeError(f"{type(layer).__name__} returns a {type(wanted).__name__}")
    wanted, found = _states(wanted), _states(found)
    ahead: Ahead | None = layer.forward.args[2]
    if ahead is None:
        return _error(found - x, wanted - x)
    return max(_error(found - x, wanted - x), _error(ahead.take(found), type(ahead.norm).forward(ahead.norm, wanted)))


def _states(out: Any) -> Tensor:
    """Return the hidden states that a layer returns, alone or first of a tuple."""
    return out[0] if isinstance(out, tuple) else out


# ---- inputs


def _random(model: ImageModel, slots: int) -> Tensor:
    width = model.transformer.get_input_embeddings().weight.shape[1]
    random = torch.Generator(model.device).manual_seed(slots)
    return torch.randn(ROWS, slots, width, generator=random, device=model.device).to(model.dtype)


def _pass(model: ImageModel, slots: int) -> dict[str, Any]:
    """Return what a layer gets in a pass of some slots, rows of unequal lengths in a cache of its own."""
    cache = model.cache(ROWS, BEFORE + ROWS + slots)
    cache.lengths = BEFORE + torch.arange(ROWS, device=model.device)
    x, transformer = _random(model, slots), model.transformer
    more = cache.window(slots, x.dtype)
    # in the image: LlamaGen turns its prompts by no angle, but to zero
    start = model.image_start(cache.lengths)[:, None] + torch.arange(slots, device=model.device)
    ids = model.rotary_ids(start)
    more["position_embeddings"] = transformer.rotary_emb(x, position_ids=ids)
    return more | {cache_argument(type(transformer.layers[0].self_attn)): cache}


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@contextmanager
def _queries() -> Iterator[list[Tensor]]:
    """Collect the queries that attention gets."""
    seen: list[Tensor] = []

    def recording(module: Any, query: Tensor, *args: Any, **more: Any) -> tuple[Tensor, None]:
        seen.append(query)
        return attention(module, query, *args, **more)

    ALL_ATTENTION_FUNCTIONS[NAME] = recording
    try:
        yield seen
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]
