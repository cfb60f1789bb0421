"""A distribution that is not finite ends the batch with one sentence, whatever the decoder; a finite one never does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sjd2 import api
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.finite import finite_rows
from sjd2.decoding.generate import StepInfo, generate, stream
from sjd2.decoding.interfaces import Rows
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.models.base import Condition, ImageModel
from tests.helpers.decoders import AR, GRID, KINDS, PROMPTS, SAMPLING, front, sjd
from tests.helpers.fault import Fault
from tests.helpers.toy import Toy, adapted_toy

DECODERS = sorted(path.stem for path in (ROOT / "conf" / "decoder").glob("*.yaml"))
GUIDED = SamplingParams(guidance_scale=3.0)
SEEDS = list(range(1, len(PROMPTS) + 1))
ENDS = "not finite"


@pytest.fixture(scope="module")
def tiny() -> ImageModel:
    return api.load("tiny")


@pytest.fixture(scope="module")
def toy() -> Toy:
    return adapted_toy(GRID)


@pytest.fixture
def fault(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Fault:
    found = Fault(toy)
    monkeypatch.setattr(toy, "logits", found)
    return found


@pytest.fixture(scope="module")
def encoded(tiny: ImageModel) -> Condition:
    return tiny.encode(["a red circle", "a blue square"])


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_ends_with_one_sentence(
    tiny: ImageModel, encoded: Condition, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, fault = api.decoder(name, model="tiny"), Fault(tiny)
    monkeypatch.setattr(tiny, "logits", fault)
    settings = SamplingParams(temperature=0.0) if name == "jacobi" else GUIDED
    with pytest.raises(UserError, match=ENDS) as error:
        generate(tiny, decoder, encoded, [1, 2], sampling=settings, on_step=fault.after(2, torch.nan))
    assert "row 2 of the batch" in str(error.value)
    assert "\n" not in str(error.value)


SAMPLINGS = {
    "cdf": GUIDED,
    "greedy": SamplingParams(temperature=0.0),
    "gumbel": SamplingParams(sampler="gumbel"),
    "top-k": SAMPLING,
    "top-p, min-p": SamplingParams(top_p=0.8, min_p=0.1),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_setting_hides_it(toy: Toy, fault: Fault, sampling: str, passes: int, value: float) -> None:
    if not passes:  # at the prefill
        fault.value.fill_(value)
    for decoder in (AR, sjd()):
        with pytest.raises(UserError, match=ENDS):
            generate(toy, decoder, toy.encode(PROMPTS), SEEDS, sampling=SAMPLINGS[sampling],
                     on_step=fault.after(passes, value))  # fmt: skip


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_one_bad_logit_anywhere_marks_its_row_alone(bad: float, sampling: SamplingParams) -> None:
    for place in (0, 5, 299):
        logits = torch.randn(2 * 3, 2, 300, generator=torch.Generator().manual_seed(0))
        logits[1, 1, place] = bad
        probs = sampling.probs(logits if sampling.guided else logits[:3])
        assert finite_rows(probs).tolist() == [True, False, True]


def test_refilled_rows_hand_out_nothing_that_is_not_finite(toy: Toy, fault: Fault) -> None:
    expected = generate(toy, AR, toy.encode(PROMPTS), SEEDS, sampling=SAMPLING).tokens
    found = {}

    def collect() -> None:
        late, requests = fault.after(GRID.length + 4, torch.nan), zip(PROMPTS, SEEDS, strict=True)
        for index, sample in stream(toy, AR, requests, rows=2, sampling=SAMPLING, on_step=late):
            found[index] = sample.tokens

    with pytest.raises(UserError, match=ENDS):  # in the second round
        collect()
    assert sorted(found) == [0, 1]
    assert all((tokens == expected[index].numpy()).all() for index, tokens in found.items())


def test_a_row_that_is_finished_may_compute_what_it_likes(toy: Toy, fault: Fault) -> None:
    expected = generate(toy, sjd(), toy.encode(PROMPTS), SEEDS, sampling=SAMPLING)
    ends = [len(sample.accepted) for sample in expected.samples]
    fault.row = ends.index(min(ends))

    def late(info: StepInfo) -> None:
        if info.committed[fault.row] == GRID.length:
            fault.value.fill_(torch.nan)

    got = generate(toy, sjd(), toy.encode(PROMPTS), SEEDS, sampling=SAMPLING, on_step=late)
    assert fault.value.isnan()
    assert torch.equal(got.tokens, expected.tokens)


# ---- the sentence


def spoilt(folder: str, into: Path) -> str:
    """Copy a draft network, one of its weights NaN."""
    for file in Path(folder).iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    (weights,) = into.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights)
    return str(into)


@pytest.mark.parametrize("name", ["front", "eagle", "eagle chain"])
def test_a_draft_network_is_named(toy: Toy, name: str, nets: dict[str, str], tmp_path: Path) -> None:
    kind = name.split(maxsplit=1)[0]
    bad = nets | {kind: spoilt(nets[kind], tmp_path)}
    decoder = front(9, bad, corrected=3) if name == "front" else KINDS[name](bad)
    with pytest.raises(UserError, match=r"decoder's draft network is not finite.*decoder\.drafter\.weights"):
        generate(toy, decoder, toy.encode(PROMPTS), SEEDS, sampling=SAMPLING)


def words(model: Toy, decoder: Decoder = AR, sampling: SamplingParams = SAMPLING, spoil: bool = False) -> str:
    condition = model.encode(PROMPTS)
    if spoil:
        condition.embeds[2] = torch.inf
    with pytest.raises(UserError) as error:
        generate(model, decoder, condition, SEEDS, sampling=sampling)
    return str(error.value)


def test_the_sentence_names_the_fault() -> None:
    model = Toy(GRID)
    assert "encoded prompt" in words(model, spoil=True)
    assert "row 3" in words(model, spoil=True)
    extreme = SamplingParams(guidance_scale=1e30, temperature=1e-30)
    assert "with guidance_scale=1e+30 and temperature=1e-30" in words(model, sampling=extreme)
    next(model.transformer.layers.parameters()).data[0, 0] = torch.nan
    assert "the weights themselves hold such numbers (layers.0." in words(model)
    half = Toy(GRID, dtype=torch.float16)
    half.head.fill_(6e4)
    assert "use dtype=bfloat16 or float32" in words(half)


def test_settings_that_overflow_are_refused() -> None:
    for temperature in (1e-40, 1e-31):
        with pytest.raises(UserError, match="use 0 for greedy"):
            SamplingParams(temperature=temperature)
    for name in ("guidance_scale", "temperature"):
        with pytest.raises(UserError, match=f"{name} must be 1e\\+30 at most"):
            SamplingParams(**{name: 1e39})
    for temperature in (1e-30, 1e30):
        probs = SamplingParams(guidance_scale=1e4, temperature=temperature).probs(torch.randn(2, 1, 9))
        assert finite_rows(probs).all()


def test_without_the_watch_it_would_pass_in_silence(toy: Toy, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "watch", lambda *_: None)
    steps: Iterator[int] = iter(range(99))

    def late(info: StepInfo) -> None:
        if next(steps) == 3:
            fault.value.fill_(torch.nan)

    tokens = generate(toy, AR, toy.encode(PROMPTS), SEEDS, sampling=GUIDED, on_step=late).tokens
    assert not tokens[1, 8:][torch.as_tensor(GRID.free[8:])].any()  # code 0 everywhere
