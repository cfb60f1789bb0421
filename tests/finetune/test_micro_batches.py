"""Micro-batches, recomputed layers and mixed precision change no gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines.eagle import train as eagle
from baselines.eagle.train import FinetuneEagle
from sjd2.checkpoints import write_tensors
from sjd2.finetune import next_clean
from sjd2.finetune.data.generated import Generated
from sjd2.finetune.distributed import Machine, shares
from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.finetune.objective import recompute
from sjd2.finetune.trainer import warmup_decay
from sjd2.models.adapter import Adapter
from tests.helpers.small_training import GRID, VARIANTS, Codes, Words, recipe, spec
from tests.helpers.toy import Toy


def gradients(made: FinetuneSJD2, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], float, Toy]:
    """Return the gradients and the loss of one step on the toy model."""
    model = Toy(GRID, dtype=dtype)
    torch.manual_seed(1)
    model.adapter = Adapter(made.adapter, model)
    for parameter in model.adapter.parameters():  # a LoRA that starts at zero has no gradient on one side
        torch.nn.init.normal_(parameter, std=0.3)
    objective = made._objective(model, model.adapter)
    total = 0.0
    for value, metrics in made._pieces(model, objective, step=5, seed=0):
        value.backward()
        total += float(metrics["loss"])
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}, total, model


@pytest.mark.parametrize("name", VARIANTS)
def test_accumulating_four_times_one_is_one_times_four(name: str) -> None:
    once, loss, _ = gradients(recipe(machine={"micro_batch": 4}, **VARIANTS[name]))
    for micro in (1, 3):
        cut, other, _ = gradients(recipe(machine={"micro_batch": micro}, **VARIANTS[name]))
        assert other == pytest.approx(loss, rel=1e-12)
        assert once.keys() == cut.keys()
        assert max(float((once[key] - cut[key]).abs().max() / once[key].abs().max()) for key in once) < 1e-9


def test_a_mean_of_means_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: windows have different numbers of noisy slots, so samples must not weigh the same."""
    whole, cut = (recipe(machine={"micro_batch": micro}) for micro in (4, 1))
    real = FinetuneSJD2.loss
    monkeypatch.setattr(FinetuneSJD2, "loss", lambda self, *a, count=None, **k: real(self, *a, **k) * len(a[2]) / 4)
    assert abs(gradients(whole)[1] - gradients(cut)[1]) > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputed_layers_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a cache of the clean image, which a layer that runs twice must not write twice."""
    plain, loss, _ = gradients(recipe(machine={"micro_batch": 2}, **VARIANTS[name]))
    monkeypatch.setattr(next_clean, "AT_ONCE", 12 * 5)  # pieces of 5 tokens, made twice as well
    calls = []
    real = type(Toy(GRID).transformer.layers[0].mlp).forward
    monkeypatch.setattr(
        type(Toy(GRID).transformer.layers[0].mlp), "forward", lambda s, x: calls.append(x.shape[1]) or real(s, x)
    )
    again, other, _ = gradients(recipe(machine={"micro_batch": 2, "checkpointing": True}, **VARIANTS[name]))
    assert other == pytest.approx(loss, rel=1e-12)
    assert max(float((plain[key] - again[key]).abs().max() / plain[key].abs().max()) for key in plain) < 1e-9
    assert len(calls) == 2 * 2 * 3  # micro-batches, layers; the clean pass, the noisy one, the noisy one again


def test_shares_are_everything_once() -> None:
    for rows, micro in ((64, 2), (5, 2), (4, None), (1, 3)):
        parts = [list(range(rows))[part] for part, weight in shares(rows, micro) if weight]
        assert [row for part in parts for row in part] == list(range(rows))


def test_schedules_rise_stay_and_fall() -> None:
    cosine, line, flat = (warmup_decay(100, 10, decay, wave) for decay, wave in ((0.5, True), (0.5, False), (0, False)))
    for schedule in (cosine, line, flat):
        assert schedule(0) == pytest.approx(0.1)
        assert schedule(30) == 1.0
    assert flat(99) == 1.0
    assert line(75) == pytest.approx(cosine(75)) == pytest.approx(0.5)
    assert cosine(95) < line(95) == pytest.approx(0.1)


def test_frozen_weights_may_be_bfloat16_but_not_what_is_trained(place: Path, tmp_path: Path) -> None:
    half = spec(place).load("cpu", "bfloat16")
    made = recipe(Codes(), bf16=True, machine={"micro_batch": 2})
    made.run(model=half, out=tmp_path, log=None, device="cpu", seed=0)
    assert {p.dtype for p in half.adapter.parameters()} == {torch.float32}
    assert half.transformer.dtype == torch.bfloat16
    loaded = replace(spec(place), adapter=str(tmp_path / "final")).load("cpu", "bfloat16")
    assert {p.dtype for p in loaded.adapter.parameters()} == {torch.bfloat16}
    for mine, theirs in zip(half.adapter.parameters(), loaded.adapter.parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), theirs)


def test_written_tensors_are_read_by_safetensors(tmp_path: Path) -> None:
    given = {"b": torch.randn(3, 5), "a.c": torch.randn(7).double(), "scalar": torch.tensor(2.0)}
    for dtype in (torch.bfloat16, torch.float32):
        write_tensors(tmp_path / "mine", given, dtype)
        save_file({name: tensor.to(dtype) for name, tensor in given.items()}, tmp_path / "theirs")
        mine, theirs = load_file(tmp_path / "mine"), load_file(tmp_path / "theirs")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == dtype for name in mine)


def test_an_eagle_head_learns_the_same_from_cut_batches_and_distributions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also with both guidance branches and the head's own states, whose distributions are guided token by token."""
    losses = {"unconditional": None, "guided": 0.5, "rejection": 0.5, "unroll": 2, "noise": 0.2, "steps": 1, "lr": 0.0}
    found = []
    for micro, at_once, checkpointing in ((4, 2**26, False), (1, 2**26, False), (4, 8 * 12 * 3, True)):
        monkeypatch.setattr(eagle, "AT_ONCE", at_once)
        data = Generated(captions=Words(), images=8, validation_images=4, batch_size=4)
        made = FinetuneEagle(
            head=eagle.EagleSettings(), data=data, batch_size=4,
            machine=Machine(micro_batch=micro, checkpointing=checkpointing), **losses,
        )  # fmt: skip
        model = Toy(GRID, dtype=torch.float64)
        data.prepare(model, tmp_path)
        torch.manual_seed(0)
        head = eagle.EagleHead(made.head, model)
        if checkpointing:
            recompute([head.layer])
        total = 0.0
        for value, _ in made._pieces(model, head, 0, 0):
            value.backward()
            total += float(value.detach())
        overlaps = made.validate(model, head)
        found.append((total, {name: p.grad for name, p in head.named_parameters()}, overlaps))
    for total, grads, overlaps in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-6)  # the model's norms round to float32 inside
        for name, grad in grads.items():
            assert float((grad - found[0][1][name]).abs().max() / grad.abs().max()) < 1e-5
        assert overlaps == pytest.approx(found[0][2], rel=1e-6)
