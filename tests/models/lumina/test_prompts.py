"""Lumina-mGPT: prompts, unconditional contexts and likelihoods against a plain forward, in decoding and in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baselines.eagle.head import EagleHead, EagleSettings
from baselines.eagle.train import make_pairs, predict
from sjd2.decoding.generate import generate
from sjd2.decoding.likelihood import nll
from sjd2.decoding.sampling import SamplingParams
from sjd2.finetune.front_pairs import TeacherForced
from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.models.adapter import AdapterSettings
from sjd2.models.chameleon import Chameleon
from sjd2.models.kv_cache import RowCache
from tests.helpers import checkpoints_chameleon as small
from tests.helpers.plain_chameleon import Plain
from tests.helpers.small_lumina import AR, CONTEXTS, GREEDY, PROMPTS, at, prompt


def reference_greedy(plain: Plain, text: str, width: int, height: int, before: list[int]) -> list[int]:
    """Draw as Lumina-mGPT's inference_solver does, greedily; start, height and width are given."""
    conditional, columns = prompt(plain, text, width, height), width // 16
    image = [8197, 8804 + height // 32, 8804 + width // 32]
    while len(image) - 3 < (height // 16) * (columns + 1):
        if (len(image) - 3 + 1) % (columns + 1) == 0:
            image.append(8803)
        else:
            image.append(4 + int(plain.guided(conditional, before, image, 3.0).argmax()))
    return [*image, 8196, 8710]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("size", "width", "height"), [("64", 64, 64), ("96x64", 96, 64)])
def test_greedy_ar_is_the_reference_solver(
    model: Chameleon, plain: Plain, context: str, size: str, width: int, height: int
) -> None:
    drawing = at(model, context, size)
    tokens = generate(drawing, AR, drawing.encode(PROMPTS), [1, 2], sampling=GREEDY).tokens
    for row, text in enumerate(PROMPTS):
        assert drawing.ids[tokens[row]].tolist() == reference_greedy(plain, text, width, height, CONTEXTS[context])


def test_the_two_contexts_are_two_distributions(model: Chameleon) -> None:
    tokens = [
        generate(other, AR, other.encode(PROMPTS), [1, 2], sampling=GREEDY).tokens
        for other in (at(model, context) for context in CONTEXTS)
    ]
    assert not torch.equal(*tokens)


@pytest.mark.parametrize("context", CONTEXTS)
def test_likelihoods_are_those_of_plain_forwards(model: Chameleon, plain: Plain, context: str) -> None:
    drawing, sampling = at(model, context), SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=4000)
    codes = torch.randint(8192, (2, 16), generator=torch.Generator().manual_seed(0))
    tokens = drawing.layout.tokens(codes)
    expected = []
    for row, text in enumerate(PROMPTS):
        image, total = drawing.ids[tokens[row]].tolist(), 0.0
        branches = [plain.logits([*before, *image]) for before in (prompt(plain, text, 64, 64), CONTEXTS[context])]
        for place in torch.nonzero(drawing.layout.free)[:, 0].tolist():
            c, u = (logits[len(logits) - len(image) + place - 1][4:8196] for logits in branches)
            guided = (u + 3.0 * (c - u)) / 0.8
            kept = guided >= guided.topk(4000).values[-1]
            prob = torch.where(kept, guided, -torch.inf).softmax(0)[image[place] - 4]
            total -= float(prob.clamp(min=1e-9).log())
        expected.append(total)
    assert nll(drawing, drawing.encode(PROMPTS), tokens, sampling).tolist() == pytest.approx(expected, rel=1e-9)


def test_window_passes_equal_single_passes(model: Chameleon) -> None:
    torch.manual_seed(0)
    x = model.embed(torch.randint(8192, (3, 14)))
    whole = model.forward(x, torch.arange(14).expand(3, -1), None)
    cache = RowCache(small.LAYERS, 3, 40, torch.device("cpu"))
    model.forward(x[:, :5], torch.arange(5).expand(3, -1), cache)
    cache.lengths = torch.tensor([3, 5, 0])  # an empty row too: what the unconditional prompt leaves
    for width in (4, 1, 3):
        rows = cache.lengths[:, None] + torch.arange(width)
        model.forward(torch.randn(3, 6, small.WIDTH).double(), rows[:, :1] + torch.arange(6), cache)  # rejected
        picked = rows[..., None].expand(-1, -1, small.WIDTH)
        out = model.forward(x.gather(1, picked), rows, cache)
        assert torch.allclose(out, whole.gather(1, picked), atol=1e-6)
        cache.lengths = cache.lengths + width


def unconditional(model: Chameleon, rows: int, width: int = 3) -> tuple[Tensor, Tensor]:
    """Return empty prompts padded to some width, as batches with conditional rows have them."""
    empty = model.encode(["x"]).uncond_embeds
    return torch.nn.functional.pad(empty, (0, 0, 0, width - 1)).expand(rows, -1, -1), torch.zeros(
        rows, dtype=torch.long
    )


@pytest.fixture(scope="module")
def image(model: Chameleon) -> Tensor:
    codes = torch.randint(8192, (2, 16), generator=torch.Generator().manual_seed(1))
    return model.layout.tokens(codes)


def test_an_eagle_head_trains_on_what_it_will_see(model: Chameleon, plain: Plain, image: Tensor) -> None:
    """After an empty prompt: the states are those of plain forwards, and training, decoding and a plain call agree."""
    torch.manual_seed(3)
    head = EagleHead(EagleSettings(), model).eval().requires_grad_(False)
    pairs = make_pairs(model, *unconditional(model, 2), image)
    for row in range(2):
        states = plain.states(model.ids[image[row]].tolist())
        assert torch.allclose(pairs.states[row, 1:], states[:-1], atol=1e-6)  # H_1.. : after tokens 0..
    assert pairs.states[:, 0].abs().max() == 0
    first, second = predict(head, pairs, 2)
    length = image.shape[1] - 2  # pairs 1..: token t and the state before it, at positions 0..
    mask = torch.full((length, length), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    reported = head(
        pairs.embeds[:, 1:],
        pairs.states[:, 1:-1],
        torch.arange(length).expand(2, -1),
        attention_mask=mask.expand(2, 1, -1, -1),
    )
    assert torch.allclose(first[:, 1:], reported, atol=1e-9)
    cache = head.cache(2, 64)
    empty, lengths = unconditional(model, 2, 1)
    cache.bound = 64
    ahead = head.prefill(
        cache, torch.arange(2), empty, model.forward(empty, torch.zeros(2, 1).long(), None), lengths, image[:, 0]
    )
    assert torch.allclose(ahead, first[:, 0], atol=1e-9)
    seen = torch.ones(1, 1, 1, dtype=torch.bool)
    drafted = head.step(cache, image[:, 1:2], ahead[:, None], torch.ones(1, 1).long(), seen)  # a draft of token 1
    assert torch.allclose(drafted[:, 0], second[:, 1], atol=1e-9)
    count = torch.tensor([4, 4])
    assert torch.allclose(head.extend(cache, image[:, 1:7], pairs.states[:, 1:7], count), first[:, 4], atol=1e-9)


def test_front_pairs_and_clean_passes_have_plain_states(model: Chameleon, plain: Plain, image: Tensor) -> None:
    n = image.shape[1]
    hidden = TeacherForced(model, PROMPTS, image).hidden  # [conditional | unconditional]
    recipe = FinetuneSJD2(adapter=AdapterSettings(rank=2), data=None, steps=1, batch_size=1, lr=1.0)
    clean = recipe._clean_pass(model, image, *unconditional(model, 2))[1]
    for row, text in enumerate(PROMPTS):
        ids = model.ids[image[row]].tolist()
        after = plain.states([*prompt(plain, text, 64, 64), *ids])
        assert torch.allclose(hidden[row], after[-n - 1 :], atol=1e-6)
        alone = plain.states(ids)
        assert torch.allclose(hidden[2 + row, 1:], alone, atol=1e-6)
        assert torch.allclose(clean[row], alone[:-1], atol=1e-6)
