"""SJD2 fine-tunings: LoRA (through PEFT) or full weights, with the code that tells the model how noisy an input is.

A gated LoRA acts on noisy slots only. Clean slots never attend to noisy ones, so every token that can be committed is one of
the untouched weights, bit for bit: drafts come from the tuned model, the output distribution is the original's
(docs/exactness.md).
# R model rows, S slots of a pass
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sjd2.checkpoints import read_part, write_tensors
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel
from sjd2.models.low_rank import ADAPTER, Gate, LowRank, fuse_low_rank, merge, stack
from sjd2.models.timesteps import AdditiveCode

SETTINGS, WEIGHTS = "sjd2.json", "sjd2.safetensors"
VQ = "vqmodel."  # the image encoder inside some decoders, which is no part of the language model


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How a fine-tuning is built: enough to load it without the recipe that made it.

    kind: lora or full. gated: act on noisy slots only (lora). rank, targets: of the LoRA. code: additive (learned, added to
    noisy inputs) or appended (the paper's extra tokens, no weights). path, normalised: the noise it was trained on.
    """

    kind: str = "lora"
    gated: bool = True
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    code: str = "additive"
    path: str = "flow"
    normalised: bool = True

    def __post_init__(self) -> None:
        choose("finetune.adapter.kind", self.kind, ("lora", "full"))
        choose("finetune.adapter.code", self.code, ("additive", "appended"))
        choose("finetune.adapter.path", self.path, ("flow", "vp"))
        if self.kind == "full" and self.gated:
            raise UserError("only a LoRA can be gated; set finetune.adapter.gated=false with kind=full.")
        if self.rank < 1:
            raise UserError(f"finetune.adapter.rank must be 1 or more, got {self.rank}.")


def read_settings(folder: Path) -> AdapterSettings:
    """Read a fine-tuning's settings. Raises `UserError` if the folder does not hold one."""
    return read_part(
        folder, AdapterSettings, settings=SETTINGS, weights=WEIGHTS, what="SJD2 fine-tuning", recipe="sjd2"
    )


class Adapter(nn.Module):
    """A fine-tuning that has been put into a model; `set_gate` sets before each forward pass where it acts."""

    def __init__(self, settings: AdapterSettings, model: ImageModel) -> None:
        super().__init__()
        self.settings = settings
        self._transformer = [model.transformer]  # in a list: its weights are not this module's to save
        self._head = [] if model.head_module is None else [model.head_module]
        self._gate = Gate()
        self._on = True
        self._stacked: list[LowRank] = []
        self.left_out = 0  # layers that `freeze` could not speed up
        width = model.transformer.get_input_embeddings().weight.shape[1]
        self.code = AdditiveCode(width) if settings.code == "additive" else None
        self.layers: list[Any] = []  # that run as PEFT has them
        if settings.kind == "lora":
            self._inject(model.transformer)
        if self.code is not None:
            self.code.to(device=model.device, dtype=model.dtype)

    def _inject(self, transformer: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(
            r=self.settings.rank, lora_alpha=self.settings.rank, target_modules=list(self.settings.targets)
        )
        # each LoRA lands on its layer's device, in its dtype: layers may lie on several GPUs, or be quantised
        inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)
        found = {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
        self.layers.extend(found.values())
        for name, layer in zip(found, self.layers, strict=True):
            lora_a, lora_b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            # registered under this module too, so that state_dict() and parameters() are the adapter's
            self.add_module(name.replace(".", "__"), nn.ModuleList([lora_a, lora_b]))
            if self.settings.gated:
                lora_b.register_forward_hook(self._mask)
        if not self.layers:
            raise UserError(f"the model has no layers named {', '.join(self.settings.targets)} to adapt.")

    def _mask(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        assert self._gate.shut is not None  # without a gate the layers are off
        return output.masked_fill(self._gate.shut.to(output.device), 0.0)

    def set_gate(self, gate: Tensor | None) -> None:
        """Set which slots the next forward pass adapts: [R, S], or None for none; without gating the LoRA always acts."""
        self._gate.set(gate)
        for group in self._stacked:
            group.refresh()
        on = gate is not None or not self.settings.gated
        if on != self._on:
            self._on = on
            for layer in self.layers:
                layer.enable_adapters(on)

    def freeze(self) -> Adapter:
        """Return this fine-tuning ready for inference: no training any more, an ungated LoRA merged, a gated one stacked."""
        if self.settings.gated:
            self._stacked, self.layers = stack(self._transformer[0], self.layers, self._gate)
        else:
            self.layers = merge(self._transformer[0], self.layers)
        self.left_out = len(self.layers)
        return self.eval().requires_grad_(False)

    def fuse(self, wanted: bool) -> str | None:
        """Let stacked products run as kernels on a GPU, or not; return why they do not although that is wanted, or None."""
        self._gate.fused = self._gate.fused and wanted
        if self._gate.fused or not wanted or not self._stacked:
            return None
        return fuse_low_rank(self._gate, self._stacked)

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that fine-tuning changes."""
        mine = list(self.parameters())
        if self.settings.kind == "full":
            mine += [p for name, p in self._transformer[0].named_parameters() if not name.startswith(VQ)]
            mine += [p for head in self._head for p in head.parameters()]
        return mine

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that belongs into a file: this module's weights, and the model's where all were tuned."""
        state = dict(self.state_dict())
        if self.settings.kind == "full":
            state |= {f"decoder.{k}": v for k, v in self._transformer[0].state_dict().items() if not k.startswith(VQ)}
            for head in self._head:
                state |= {f"head.{k}": v for k, v in head.state_dict().items()}
        return state

    def save(self, folder: Path, dtype: torch.dtype, write: bool = True) -> None:
        """Write sjd2.json and sjd2.safetensors with weights of `dtype`.

        Where weights are sharded over processes all of them have to call, one with `write`.
        """
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        write_tensors(folder / WEIGHTS, self.tensors(), dtype, write)

    @classmethod
    def load(cls, folder: Path, model: ImageModel) -> Adapter:
        """Put the fine-tuning in `folder` into the model, for inference. Raises `UserError` if the two do not fit."""
        adapter = cls(read_settings(folder), model)
        own = adapter.tensors()
        try:
            with safe_open(folder / WEIGHTS, "pt") as stored:
                names = set(stored.keys())
                wrong = set(own) ^ names or {k for k in own if list(own[k].shape) != stored.get_slice(k).get_shape()}
                if wrong:
                    raise UserError(f"the fine-tuning {folder} does not fit this model (e.g. {min(wrong)}).")
                for name, tensor in own.items():  # one by one: all weights of a large model may be in the file
                    tensor.data.copy_(stored.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise UserError(f"the fine-tuning {folder / WEIGHTS} cannot be read: {error}") from error
        return adapter.freeze()
