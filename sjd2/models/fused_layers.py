"""Transformers' decoder layers with one kernel for what lies between two products (layer_kernels.py).

The modules stay; their instances get forwards: the attention (norms of queries and keys, rotary embedding, cache store), the
MLP (SiLU and its product) and the layer (residual adds and norms). Projections are called as they are, so that PEFT's and
quantised ones take part. With gradients, or without a fused cache, the class's own forward runs.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sjd2.models.kv_cache import Window, cache_argument
from sjd2.models.layer_ops import add_norm, rotary_store, silu_product
from sjd2.models.norms import PER_HEAD, PER_HEAD_EPS, RMS, apply_rms_norm, is_fused
from sjd2.models.window_attention import window_attention

ROTARY, SILU, RESIDUAL = PARTS = (
    "rotary embedding and cache store",
    "SiLU and its product",
    "residual adds and norms",
)
FAMILIES = ("Llama", "Chameleon", "Emu3", "Qwen2", "GlmImageText")
SWIN = "ChameleonSwinDecoderLayer"  # of Chameleon 34B
AFTER = ("post_self_attn_layernorm", "post_mlp_layernorm")  # GLM-Image's, of what is added
WIDEST = 16384  # numbers of a row that a program can hold
SILUS = ("SiLU", "SiLUActivation")


def put_layers(transformer: Any, parts: tuple[str, ...] = PARTS) -> dict[str, str]:
    """Put the kernels into every layer of a transformer; return why a part is left as it is, where it is."""
    layers = list(getattr(transformer, "layers", []))
    if not layers or not all(hasattr(layers[0], name) for name in ("self_attn", "mlp")):
        return dict.fromkeys(parts, f"{type(transformer).__name__} is not a class that is known")
    why: dict[str, str] = {}
    for part in parts:
        obstacle, put = {
            ROTARY: (_attention_obstacle, _put_attention),
            SILU: (_mlp_obstacle, _put_mlp),
            RESIDUAL: (_layer_obstacle, _put_layers),
        }[part]
        found = [*map(obstacle, layers), _norm_obstacle(transformer.norm) if part == RESIDUAL else None]
        if any(found):
            why[part] = next(filter(None, found))
        else:
            put(layers, transformer.norm)
    return why


def put_same(transformer: Any, layer: nn.Module) -> None:
    """Give a layer of one's own, outside of the transformer (EAGLE's), the kernels that the transformer's layers have."""
    alone = SimpleNamespace(layers=[layer], norm=None)
    put_layers(alone, tuple(part for part in PARTS if in_place(transformer, part)))


def part_of(layer: Any, part: str) -> Any:
    """Return the module whose forward a part replaces, None where a layer has none."""
    return {ROTARY: getattr(layer, "self_attn", None), SILU: getattr(layer, "mlp", None), RESIDUAL: layer}[part]


def in_place(transformer: Any, part: str) -> bool:
    """Return whether the layers have a part's kernel."""
    modules = [part_of(layer, part) for layer in getattr(transformer, "layers", [])]
    return any(module is not None and _ours(module) for module in modules)


def remove_layers(transformer: Any, parts: tuple[str, ...] = PARTS) -> None:
    """Give every layer the forwards of its class back."""
    modules = [part_of(layer, part) for layer in getattr(transformer, "layers", []) for part in parts]
    if RESIDUAL in parts:
        modules.append(getattr(transformer, "norm", None))
    for module in modules:
        if module is not None and _ours(module):
            del module.forward  # the instance's own


def _ours(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and getattr(forward.func, "__module__", "") == __name__


def _wrapped(module: nn.Module) -> str | None:
    """Return that somebody else has replaced a module's forward, or None. Its hooks run as before."""
    if "forward" in vars(module) and not _ours(module) and not is_fused(module):
        return f"{type(module).__name__} has a forward of its own"
    return None


def _touched(module: nn.Module) -> str | None:
    """Return how somebody has changed a module that is not called any more, or None."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{type(module).__name__} has hooks"
    return _wrapped(module)


def _unknown(module: nn.Module, suffixes: tuple[str, ...]) -> str | None:
    known = {family + suffix for family in FAMILIES for suffix in suffixes}
    return None if type(module).__name__ in known else f"{type(module).__name__} is not a class that is known"


# ---- attention: norms of queries and keys, rotary embedding, cache store


def _attention_obstacle(layer: Any) -> str | None:
    attention = layer.self_attn
    norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    for norm in norms:
        if type(norm).__name__ != PER_HEAD:
            return f"{type(norm).__name__} is not a class that is known"
        if (touched := _touched(norm)) is not None:
            return touched
    if getattr(attention, "sliding_window", None) is not None:
        return "attention has a sliding window"
    return _unknown(attention, ("Attention",)) or _wrapped(attention)


def _put_attention(layers: list[Any], _: Any) -> None:
    for layer in layers:
        module = layer.self_attn
        module.forward = functools.partial(_attention, module, cache_argument(type(module)))


def _attention(attention: Any, name: str, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    cache, window, rotary = (kwargs.get(key) for key in (name, "window", "position_embeddings"))
    if args or torch.is_grad_enabled() or cache is None or window is None or rotary is None:
        return type(attention).forward(attention, hidden_states, *args, **kwargs)
    query, keys, values = rotated(attention, hidden_states, rotary, cache)
    return attend(attention, query, keys, values, window), None


def rotated(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Project x [R, S, W], store keys and values; return queries [R, S, H, D] and the layer's keys and values."""
    query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    keys, values = cache.layers[attention.layer_idx].room(key, value, attention.head_dim)
    norms: list[Tensor] = []
    if hasattr(attention, "q_norm"):
        norms = [weight for norm in (attention.q_norm, attention.k_norm) for weight in (norm.weight, norm.bias)]
    query = rotary_store(query, key, value, *rotary, norms, PER_HEAD_EPS, keys, values, cache.slots)
    return query, keys, values


def attend(attention: Any, query: Tensor, keys: Tensor, values: Tensor, window: Window) -> Tensor:
    """Attend to the cache and project what comes out: query [R, S, H, D] -> [R, S, W]."""
    out = window_attention(query.transpose(1, 2), keys, values, window.lengths, window.seen, attention.scaling)
    return attention.o_proj(out.flatten(2))


# ---- MLP: SiLU and its product


def _mlp_obstacle(layer: Any) -> str | None:
    mlp = layer.mlp
    if (unknown := _unknown(mlp, ("MLP",))) is not None:
        return unknown
    activation = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    name = type(activation).__name__
    return _touched(activation) or _wrapped(mlp) if name in SILUS else f"the activation is {name}"


def _put_mlp(layers: list[Any], _: Any) -> None:
    for layer in layers:
        layer.mlp.forward = functools.partial(_mlp, layer.mlp)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return type(mlp).forward(mlp, x)
    both = mlp.gate_up_proj(x).chunk(2, -1) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj(x), mlp.up_proj(x))
    return mlp.down_proj(silu_product(*both))


# ---- layer: residual adds and norms


class Ahead:
    """A norm that the layer before computes together with the sum that it is the norm of."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.given: Tensor | None = None
        self.normed: Tensor | None = None

    def give(self, x: Tensor, normed: Tensor) -> None:
        """Keep the norm of x until it is asked for."""
        self.given, self.normed = x, normed

    def take(self, x: Tensor) -> Tensor:
        """Return the norm of x, computed here unless it was given."""
        normed, known = self.normed, self.given is x
        self.given = self.normed = None
        return normed if known and normed is not None else apply_rms_norm(self.norm, x)


def _norm_obstacle(norm: Any) -> str | None:
    if norm is None:
        return None
    if type(norm).__name__ not in RMS:
        return f"{type(norm).__name__} is not a class that is known"
    if (touched := _touched(norm)) is not None:
        return touched
    return f"rows of {len(norm.weight)} are wider than {WIDEST}" if len(norm.weight) > WIDEST else None


def _layer_obstacle(layer: Any) -> str | None:
    unknown = _unknown(layer, ("DecoderLayer", "SwinDecoderLayer"))
    if unknown is not None:
        return unknown
    norms = ("input_layernorm", "post_attention_layernorm", *AFTER)
    found = (_norm_obstacle(getattr(layer, name, None)) for name in norms)
    return next(filter(None, found), None) or _wrapped(layer)


def _put_layers(layers: list[Any], last: Any) -> None:
    norms = [None if type(layer).__name__ == SWIN else Ahead(layer.input_layernorm) for layer in layers]
    end = None
    if last is not None:
        end = Ahead(last)
        last.forward = functools.partial(_last, end)
    for layer, own, following in zip(layers, norms, [*norms[1:], end], strict=True):
        layer.forward = functools.partial(_layer, layer, own, following)


def _last(ahead: Ahead, hidden_states: Tensor) -> Tensor:
    return ahead.take(hidden_states)


def _layer(
    layer: Any, own: Ahead | None, following: Ahead | None, hidden_states: Tensor, *args: Any, **more: Any
) -> Any:
    if args or torch.is_grad_enabled() or layer.training or more.get("output_attentions"):
        return type(layer).forward(layer, hidden_states, *args, **more)
    if own is None:  # norms what is added, not what goes in
        (first, second), between = (layer.input_layernorm, layer.post_attention_layernorm), None
        x = hidden_states
    else:
        (first, second), between = (getattr(layer, name, None) for name in AFTER), layer.post_attention_layernorm
        x = own.take(hidden_states)
    total, normed = add(hidden_states, layer.self_attn(hidden_states=x, **more)[0], first, between)
    x = layer.mlp(total if between is None else normed)
    total, normed = add(total, x, second, None if following is None else following.norm)
    if following is not None:
        following.give(total, normed)
    return (total,) if type(layer).__name__.startswith("Chameleon") else total


def add(residual: Tensor, delta: Tensor, before: Any, after: Any) -> tuple[Tensor, Tensor]:
    """Return residual + delta and the norm `after` of it; `before` norms delta first."""
    norms = [(None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon) for norm in (before, after)]
    (first, eps_first), (second, eps_second) = norms
    return add_norm(residual, delta, first, second, eps_first, eps_second)
