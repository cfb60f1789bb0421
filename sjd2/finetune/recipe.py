"""What every training has in common: prepare its data, build what is trained, train it, write the result and measure it.

A new training derives from `TrainRecipe` (from scratch), `FinetuneRecipe` (starts from a model) or `ParallelRecipe` (the
same, under torchrun too) and gives `build_training`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from sjd2.errors import UserError
from sjd2.finetune.data.sources import Source
from sjd2.finetune.distributed import Machine
from sjd2.finetune.trainer import Log, Loss, Metrics, train, warmup_decay
from sjd2.models.base import ImageModel
from sjd2.models.spec import ModelSpec


@dataclass(kw_only=True)
class Training:
    """What one run of a recipe trains, ready for `trainer.train`.

    module: all that training changes, moving averages included. loss: as `trainer.train` takes it. validate: measures the
    current weights. finish: writes the result to a folder and returns its metrics. after_step: called with the number of
    finished steps after each one.
    """

    module: nn.Module
    optimizers: Sequence[Optimizer]
    loss: Loss
    validate: Callable[[], Metrics]
    finish: Callable[[Path], Metrics]
    after_step: Callable[[int], None] = lambda done: None


class Recipe:
    """A training as `finetune=` names it: settings only, so that one can be run several times.

    needs_model: `run` takes the model to start from. parallel: it also runs under torchrun.
    """

    needs_model: ClassVar[bool] = False
    parallel: ClassVar[bool] = False

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result in this folder; '' for one that no command reads."""
        return ""

    def check(self, spec: ModelSpec) -> None:
        """Raise `UserError` if this training cannot work with the model, or its data is missing; loads nothing."""

    def run(self, *, out: Path, log: Log | None, device: str, seed: int, model: ImageModel | None = None) -> Metrics:
        """Train, resuming what `out` holds, write the result to out/final/ and return its metrics."""
        raise NotImplementedError


@dataclass(kw_only=True)
class TrainRecipe(Recipe):
    """One training from scratch.

    steps: optimizer steps. batch_size: samples per step. warmup: steps of linear warm-up. decay: share of the steps over
    which the learning rate falls to zero; 0 keeps it. bf16: bfloat16 autocast. validate_every: steps between validations.
    """

    steps: int
    batch_size: int
    warmup: int = 50
    decay: float = 0.6
    bf16: bool = False
    validate_every: int = 200

    clip: ClassVar[float] = 1.0  # largest norm of the gradient
    fewest_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size, validate_every=self.validate_every)
        if self.steps is not None and self.steps < self.fewest_steps:
            raise UserError(f"finetune.steps must be {self.fewest_steps} or more, got {self.steps}.")

    def prepare(self, model: Any, out: Path) -> None:
        """Make the data that does not exist yet."""

    def build_training(self, model: Any, *, out: Path, device: str, seed: int) -> Training:
        """Build what is trained; model: the one to start from, None unless `needs_model`."""
        raise NotImplementedError

    def run(self, *, out: Path, log: Log | None, device: str, seed: int, model: ImageModel | None = None) -> Metrics:
        """Train, resuming what `out` holds, write the result to out/final/ and return its metrics."""
        self.prepare(model, out)
        torch.manual_seed(seed)
        with self.attention(model):
            training = self.build_training(model, out=out, device=device, seed=seed)

            def after(done: int) -> Metrics:
                training.after_step(done)
                return training.validate() if self.due(done) else {}

            train(
                training.module,
                training.loss,
                training.optimizers,
                steps=self.num_steps(),
                out=out,
                seed=seed,
                log=log,
                schedule=self.lr_schedule(),
                clip=self.clip,
                bf16=self.bf16,
                after=after,
                checkpoint_s=self.checkpoint_s,
            )
            return training.finish(out / "final")

    def num_steps(self) -> int:
        """Return the number of optimizer steps; asked after `prepare`."""
        return self.steps

    def lr_schedule(self) -> Callable[[int], float]:
        """Return the schedule of the learning rates: step -> factor."""
        return warmup_decay(self.num_steps(), self.warmup, self.decay)

    @property
    def checkpoint_s(self) -> float:
        """Seconds between two checkpoints."""
        return 60.0

    def due(self, done: int) -> bool:
        """Return whether to validate after `done` steps."""
        return done % self.validate_every == 0 or done == self.num_steps()

    def attention(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Return the context to train in, with the attention kernel that suits it."""
        return contextlib.nullcontext()


@dataclass(kw_only=True)
class FinetuneRecipe(TrainRecipe):
    """One training that starts from a model."""

    data: Source

    needs_model: ClassVar[bool] = True

    def check(self, spec: ModelSpec) -> None:
        """Raise `UserError` if this training cannot work with the model, or its data is missing; loads nothing."""
        self.data.check()

    def prepare(self, model: ImageModel, out: Path) -> None:
        """Make the data that does not exist yet."""
        self.data.prepare(model, out)


@dataclass(kw_only=True)
class ParallelRecipe(FinetuneRecipe):
    """One training that starts from a model, in one process or several, whose gradients run through the model's layers.

    lr, weight_decay: AdamW. cosine: the learning rate falls along half a wave instead of a line. machine: how it uses the
    machine, which changes only rounding.
    """

    lr: float
    cosine: bool = False
    weight_decay: float = 0.0
    machine: Machine = field(default_factory=Machine)

    parallel: ClassVar[bool] = True

    @property
    def checkpoint_s(self) -> float:
        """Seconds between two checkpoints."""
        return self.machine.checkpoint_s

    def lr_schedule(self) -> Callable[[int], float]:
        """Return the schedule of the learning rates: step -> factor."""
        return warmup_decay(self.num_steps(), self.warmup, self.decay, self.cosine)

    @contextlib.contextmanager
    def attention(self, model: ImageModel) -> Iterator[None]:
        """Use plain attention on CPUs, where torch's fused one is several times slower backwards."""
        transformer: Any = model.transformer
        usual = transformer.config._attn_implementation
        if model.device.type == "cpu":
            transformer.set_attn_implementation({"": "eager"})  # of the image tokeniser's, transformers would warn
        try:
            yield
        finally:
            transformer.set_attn_implementation({"": usual})


def positive(**counts: int | None) -> None:
    """Raise `UserError` if a setting `finetune.<name>` is below 1; None is a setting that was not given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"finetune.{name} must be 1 or more, got {value}.")
