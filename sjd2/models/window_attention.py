"""One attention for the passes of a decoder: over a static per-row cache, with lengths that stay on the device.

Registered with transformers, so that its modules, PEFT, quantisation and `from_pretrained` stay. A pass over a fused cache
carries a `Window` and runs `window_kernel.py`; everything else (training, nothing cached, ZipAR) carries a mask over the keys
and runs torch's SDPA, which is also the reference that the kernel is checked against.

# R model rows, S slots of a pass, T entries of the tail, H query heads, G of them share keys, D head width
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sjd2.errors import first_line
from sjd2.models.base import ImageModel
from sjd2.models.kv_cache import Window

NAME, REFERENCE = "sjd2_window", "sdpa"  # what transformers calls the two
OLDEST = (8, 0)  # compute capability: Ampere, the first with bfloat16 and tf32
WIDEST = 256  # numbers of a head that a program can hold
# relative errors; a key too many costs 0.05 and more
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
OTHER = ("sliding_window", "softcap", "s_aux", "position_bias")  # what other architectures ask of attention


@torch.library.custom_op("sjd2::window_attention", mutates_args=())
def window_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, seen: Tensor, scale: float
) -> Tensor:
    """Attend to a `Window` (lengths [R], seen) of a cache [R, H / G, capacity, D]: query [R, H, S, D] -> [R, S, H, D].

    One operation to whatever records or compiles a pass.
    """
    from sjd2.models.window_kernel import attend  # Triton need not be installed

    return attend(query, keys, values, lengths, seen, scale)


@window_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, seen: Tensor, scale: float) -> Tensor:
    rows, heads, slots, width = query.shape
    return query.new_empty(rows, slots, heads, width)


@torch.library.custom_op("sjd2::window_store", mutates_args=("keys", "values"))
def window_store(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write what the slots [R, S] of a pass add to a cache [R, H / G, capacity, D]: key, value [R, H / G, S, D]."""
    from sjd2.models.window_kernel import store

    store(keys, values, key, value, slots)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    window: Window | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks for it: query [R, H, S, D] -> [R, S, H, D].

    Raises RuntimeError for a model that hands on neither window nor mask, or asks for more than the kernel has.
    """
    if window is None:
        if attention_mask is None:
            raise RuntimeError(f"{type(module).__name__} hands neither the window nor a mask to its attention")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    asked = [name for name in OTHER if more.get(name) is not None]
    if asked:
        raise RuntimeError(f"{type(module).__name__} asks its attention for {asked[0]}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = query if query.stride(-1) == 1 else query.contiguous()
    return window_attention(query, key, value, window.lengths, window.seen, scale), None


AttentionInterface.register(NAME, attention)


# ---- whether a model has it


def fuse_attention(model: ImageModel, wanted: bool = True) -> str | None:
    """Let passes over a cache attend in one kernel, or not; return why they do not although that is wanted, else None.

    The kernel is compared with SDPA on the model's device first. On a CPU it is never used.
    """
    model.fused = model.fused and wanted
    if model.fused or not wanted or model.device.type != "cuda":
        return None
    why = _obstacle(model)
    if why is None:
        set_attention(model, fused=True)
        why = _fault(model)
        if why is not None:
            model.transformer.set_attn_implementation({"": REFERENCE})
            model.fused = False
    return why


def set_attention(model: ImageModel, *, fused: bool) -> None:
    """Let the caches that are opened from now on be fused or not; the attention serves both kinds."""
    model.transformer.set_attn_implementation({"": NAME})  # not its image tokeniser's
    model.fused = fused


def _obstacle(model: ImageModel) -> str | None:
    """Return why the kernel cannot serve this model, or None."""
    transformer = model.transformer
    if (missing := kernels_missing(model)) is not None:
        return missing
    if not hasattr(transformer, "set_attn_implementation"):
        return f"{type(transformer).__name__} does not take an attention of its user"
    if (chosen := transformer.config._attn_implementation) not in (NAME, REFERENCE):
        return f"model.attention is {chosen}"
    width = _heads(model)[2]
    return f"heads of {width} are wider than {WIDEST}" if width > WIDEST else None


def kernels_missing(model: ImageModel) -> str | None:
    """Return why no kernel of ours runs in this model, or None."""
    if model.dtype not in TOLERANCE:
        return f"{str(model.dtype).removeprefix('torch.')} stays on SDPA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if len({parameter.device for parameter in model.transformer.parameters()}) > 1:
        return "the layers lie on several devices"
    if torch.cuda.get_device_capability(model.device) < OLDEST:
        return f"{torch.cuda.get_device_name(model.device)} is older than Ampere"
    return None


def _heads(model: ImageModel) -> tuple[int, int, int]:
    """Return the query heads, the heads of keys and values, and the width of a head."""
    config = model.transformer.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


@torch.inference_mode()
def _fault(model: ImageModel) -> str | None:
    """Run the kernel in all its shapes against SDPA, then two small passes of the model; return what went wrong, or None."""
    heads, shared, width = _heads(model)
    try:
        for items in (1, 32, 64):  # query rows: a tile of each size
            slots = max(1, items * shared // heads)
            for parts in (1, 4):
                error = check(2, heads, shared, slots, width, model.dtype, model.device, parts)
                if not error < TOLERANCE[model.dtype]:
                    return f"the kernel differs from SDPA by {error:.1e}"
        if not stores(shared, width, model.dtype, model.device):
            return "the kernel that stores keys and values differs from torch's scatter"
        cache = model.cache(1, 8)
        x = model.embed(torch.zeros(1, 2, dtype=torch.long, device=model.device))
        for step in range(2):
            hidden = model.forward(x, cache.lengths[:, None] + torch.arange(2, device=model.device), cache)
            cache.lengths = cache.lengths + 2 * (1 - step)
        if not hidden.isfinite().all():
            return "a pass with the kernel is not finite"
    except Exception as error:  # whatever the compiler or the driver raises: the reference still runs
        return first_line(error)
    return None


def check(
    rows: int,
    heads: int,
    shared: int,
    slots: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    parts: int | None = None,
) -> float:
    """Return the relative error of the kernel against SDPA in float32: random numbers, lengths and visibility."""
    from sjd2.models.window_kernel import attend

    random = torch.Generator(device).manual_seed(slots)
    capacity, tail = 256, slots + 3
    query = torch.randn(rows, slots, heads, width, generator=random, device=device).to(dtype).transpose(1, 2)
    keys, values = (
        torch.randn(rows, shared, capacity, width, generator=random, device=device).to(dtype) for _ in range(2)
    )
    lengths = torch.randint(capacity - tail, (rows,), generator=random, device=device)
    seen = torch.rand(rows, slots, 1 + tail, generator=random, device=device) < 0.7
    seen.diagonal(1 + tail - slots, 1, 2).fill_(True)  # every slot sees itself
    found = attend(query, keys, values, lengths, seen, width**-0.5, parts)
    keys, values = (x.float().repeat_interleave(heads // shared, 1) for x in (keys, values))
    mask = Window(lengths, seen).over(capacity)[:, None]
    expected = scaled_dot_product_attention(query.float(), keys, values, attn_mask=mask).transpose(1, 2)
    return float((found.float() - expected).norm() / expected.norm())


def stores(shared: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the kernel that stores keys and values does what torch's scatter does, bit for bit."""
    random = torch.Generator(device).manual_seed(0)
    for slots in (1, 19):
        key, value = torch.randn(2, 2, slots, shared, width, generator=random, device=device).to(dtype).transpose(2, 3)
        found = [torch.zeros(2, shared, 32, width, device=device, dtype=dtype) for _ in range(2)]
        place = torch.tensor([[0], [13]], device=device) + torch.arange(slots, device=device)
        window_store(*found, key, value, place)
        index = place[:, None, :, None].expand_as(key)
        if not all(
            torch.equal(x, torch.zeros_like(x).scatter_(2, index, new))
            for x, new in zip(found, (key, value), strict=True)
        ):
            return False
    return True
