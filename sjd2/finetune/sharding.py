"""Weights, gradients and optimizer states spread over processes (FSDP2), and checkpoints of each one's part.

Each decoder layer is a unit of its own, everything else (tables, head, norm) belongs to the root: `Objective`, the module
whose forward is the whole loss, so that tables and head are whole wherever the loss uses them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from sjd2.finetune import distributed
from sjd2.finetune.objective import Objective, widen

FACTS = "facts.json"  # written last: a checkpoint without it was cut
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
logger = logging.getLogger(__name__)


def shard(objective: Objective, layers: Sequence[nn.Module], device: torch.device, bf16: bool) -> None:
    """Spread all trained weights, their gradients and the optimizer's states over the processes (FSDP2).

    The shards are float32; with `bf16` layers are gathered and run in bfloat16 and gradients are summed in float32. Raises
    RuntimeError if a weight was left whole.
    """
    mesh = init_device_mesh(device.type, (distributed.size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    frozen = {parameter for parameter in objective.parameters() if not parameter.requires_grad}
    for unit in (*layers, objective):
        # one after the other: never the whole model in float32 on one device
        widen(weight for weight in unit.parameters() if not isinstance(weight, DTensor))
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    objective.sharded = True
    check_sharded(objective)


def check_sharded(objective: nn.Module) -> None:
    """Raise RuntimeError if a trained weight of the module is not spread over the processes."""
    trained = [(name, weight) for name, weight in objective.named_parameters() if weight.requires_grad]
    for name, weight in trained:
        if not (isinstance(weight, DTensor) and weight.placements == (Shard(0),)):
            raise RuntimeError(f"{name} is not sharded")
    here = sum(weight.to_local().numel() for _, weight in trained if isinstance(weight, DTensor))
    whole = sum(weight.numel() for _, weight in trained)
    logger.info("sharded %d weights: %.4g of %.4g parameters on this process", len(trained), here, whole)


# ---- checkpoints: out/shards-00000042/, one file per process


def save(out: Path, module: nn.Module, optimizers: Sequence[Optimizer], facts: dict[str, Any]) -> None:
    """Write weights and optimizers, each process its part, and delete older checkpoints; facts["step"] names the folder."""
    final = out / f"shards-{facts['step']:08d}"
    part = out / "shards.part"
    if distributed.first():
        shutil.rmtree(part, ignore_errors=True)
    distributed.barrier()
    state_dict_saver.save(_state(module, optimizers), checkpoint_id=part)
    if distributed.first():
        (part / FACTS).write_text(json.dumps(facts))
        old = _folders(out)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for folder in old:
            if folder != final:
                shutil.rmtree(folder)
    distributed.barrier()


def newest(out: Path) -> Path:
    """Return the newest complete checkpoint. Raises ValueError if there is none."""
    return max(folder for folder in _folders(out) if (folder / FACTS).is_file())


def facts(folder: Path) -> dict[str, Any]:
    """Return the facts that `save` was called with."""
    return json.loads((folder / FACTS).read_text())


def load(folder: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Read weights and optimizers, also if another number of processes wrote them."""
    state = _state(module, optimizers)
    state_dict_loader.load(state, checkpoint_id=folder)
    model, optimizer = state["module"], state["optimizers"]
    set_state_dict(module, optimizers, model_state_dict=model, optim_state_dict=optimizer, options=OPTIONS)


def _state(module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    model, optimizer = get_state_dict(module, list(optimizers), options=OPTIONS)
    return {"module": model, "optimizers": optimizer}


def _folders(out: Path) -> list[Path]:
    return sorted(folder for folder in out.glob("shards-*") if folder.is_dir())
