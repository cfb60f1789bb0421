"""EAGLE: the head trains on shifted pairs, drafts in its cache what it was trained to, and loads back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines.eagle.head import EagleHead, EagleSettings
from baselines.eagle.train import FinetuneEagle, make_pairs, predict
from sjd2.api import load
from sjd2.decoding.decoder import Decoder
from sjd2.errors import UserError
from sjd2.files import find
from sjd2.finetune.data import generated
from sjd2.finetune.data.generated import FileCaptions, Generated
from sjd2.finetune.data.sources import Captions
from sjd2.finetune.tiny.scene_data import PROMPTS, SceneCaptions, SceneTokens
from sjd2.models.layout import TokenGrid
from sjd2.models.tiny import scenes
from tests.helpers.separators import SEPARATORS
from tests.helpers.toy import Toy

GRID = TokenGrid(3, 4, 12, prefix=(20,), row_end=22)
N = GRID.length


class Words(Captions):
    """Captions of one to three words."""

    def captions(self, n: int, seed: int, held_out: bool) -> list[str]:
        return [" ".join("cd" if held_out else "ab" for _ in range(i % 3 + 1)) for i in range(n)]


def images(**more) -> Generated:
    return Generated(captions=Words(), **({"images": 24, "validation_images": 16, "batch_size": 8} | more))


def recipe(steps: int = 4, **more) -> FinetuneEagle:
    usual = {"lr": 1e-2, "warmup": 2, "validate_every": 100, "unroll": 2}
    usual |= {"unconditional": None, "guided": 0.5, "rejection": 0.5}
    return FinetuneEagle(head=EagleSettings(), data=images(), steps=steps, batch_size=6, **(usual | more))


def double(rows: int = 3) -> tuple[Toy, EagleHead, dict]:
    """Return a toy and a head in float64, both guidance branches of padded prompts, and images."""
    model = Toy(GRID, dtype=torch.float64)
    head = EagleHead(EagleSettings(), model).eval().requires_grad_(False)
    for parameter in head.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    condition = model.encode(["one", "one two three four", "one two"][:rows])
    tokens = GRID.tokens(torch.randint(0, 12, (rows, 12)))
    return model, head, {"prompt": condition.embeds, "lengths": condition.lengths, "tokens": tokens}


# --------------------------------------------------------------------------------------------------------------- data
def test_images_are_drawn_once_and_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(GRID)
    first = images()
    first.prepare(model, tmp_path)
    (file,) = tmp_path.glob("generated-*.npz")
    drawn = []
    real = generated.generate
    monkeypatch.setattr(generated, "generate", lambda *a, **k: drawn.append(a) or real(*a, **k))
    again, longer = images(), images(images=40)
    again.prepare(model, tmp_path)
    assert not drawn
    longer.prepare(model, tmp_path)
    assert len(drawn) == 2  # 16 more images, 8 a batch
    assert list(tmp_path.glob("generated-*.npz")) == [file]
    for held_out in (False, True):
        for one, other in zip(first.scaled(16, 5, held_out), again.scaled(16, 5, held_out), strict=True):
            assert list(one) == list(other) if isinstance(one, list) else torch.equal(one, other)
    assert np.array_equal(longer._sets[False]["tokens"][:24], first._sets[False]["tokens"])
    other = images(seed=1)
    other.prepare(model, tmp_path)
    assert len(list(tmp_path.glob("generated-*.npz"))) == 2


def test_a_killed_drawing_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole, cut = Toy(GRID), images(), images()
    whole.prepare(model, tmp_path / "whole")
    real, calls = generated.generate, []

    def killed(*args, **more):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(generated, "SAVE_S", 0.0)
    monkeypatch.setattr(generated, "DRAWN_PER_SAVED", 0)  # after each batch, however slow the disk
    monkeypatch.setattr(generated, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        cut.prepare(model, tmp_path / "cut")
    cut.prepare(model, tmp_path / "cut")
    assert len(calls) == 3 + 3  # two batches were kept; one of training images and two held-out ones were left
    assert np.array_equal(whole._sets[False]["tokens"], cut._sets[False]["tokens"])


def test_scales_come_in_their_shares_and_reach_the_sampler(tmp_path: Path) -> None:
    data = images(images=800, scales=(1.0, 4.0), shares=(0.75, 0.25))
    scales = [data._scale(i) for i in range(800)]
    assert np.mean(np.array(scales) == 1.0) == pytest.approx(0.75, abs=0.02)
    assert len({data._scale(i) for i in range(8)}) == 1  # one batch, one distribution
    model = Toy(GRID)
    plain, guided = images(images=16, scales=(1.0,)), images(images=16, scales=(6.0,))
    plain.prepare(model, tmp_path)
    guided.prepare(model, tmp_path)
    assert not torch.equal(plain.batch(16, 0)[1], guided.batch(16, 0)[1])


def test_captions_of_scenes_keep_clear_of_the_prompts_of_runs() -> None:
    source, prompts = SceneCaptions(), set(PROMPTS.read_text().splitlines())
    shown, trained = source.captions(200, 0, True), source.captions(200, 0, False)
    assert len(set(shown)) == 200
    assert not set(shown) & prompts
    assert all(map(scenes.is_held_out, shown))
    assert not any(map(scenes.is_held_out, trained))
    assert source.captions(50, 0, True) == shown[:50]


def test_captions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"caption {i}\n" for i in range(100)))
    source = FileCaptions(path=str(path), held_out_share=4)
    trained, shown = set(source.captions(400, 0, False)), set(source.captions(400, 1, True))
    assert not trained & shown
    assert len(trained | shown) == 100
    assert source.captions(10, 3, False) == source.captions(20, 3, False)[:10]
    path.write_bytes("\ufeff".encode() + "".join(f"{i}{SEPARATORS}{i}\r\n" for i in range(100)).encode())
    odd = source.captions(400, 0, False) + source.captions(400, 0, True)
    assert set(odd) == {f"{i}{SEPARATORS}{i}" for i in range(100)}
    with pytest.raises(UserError, match=r"captions\.path"):
        FileCaptions(path="nowhere.txt").captions(1, 0, False)


# -------------------------------------------------------------------------------------------------------------- pairs
def test_a_state_is_paired_with_the_token_it_predicted() -> None:
    """Unshifted pairs (f_t, x_t) would fail both halves: their state would change with its own token."""
    model, _, given = double()
    before = make_pairs(model, **given)
    for j in range(1, N - 1):
        tokens = given["tokens"].clone()
        tokens[:, j] = (tokens[:, j] + 1) % 12
        after = make_pairs(model, **(given | {"tokens": tokens}))
        moved = (after.embeds != before.embeds).any(-1).any(0)
        assert moved.nonzero()[:, 0].tolist() == [j]
        assert torch.equal(after.states[:, : j + 1], before.states[:, : j + 1])  # up to the state paired with token j
        assert not torch.isclose(after.states[:, j + 1], before.states[:, j + 1]).all(-1).any()  # what it shall give


def test_padding_leaves_pairs_alone() -> None:
    model, head, given = double()
    pairs = make_pairs(model, **given)
    outs = predict(head, pairs, 3)
    for row, length in enumerate(given["lengths"].tolist()):
        alone = make_pairs(
            model,
            given["prompt"][row : row + 1, :length],
            given["lengths"][row : row + 1],
            given["tokens"][row : row + 1],
        )
        x = torch.cat([given["prompt"][row : row + 1, :length], model.embed(given["tokens"][row : row + 1])], 1)
        hidden = model.forward(x, torch.arange(x.shape[1])[None], None)
        assert torch.allclose(alone.states[0], hidden[0, length - 1 : -1], atol=1e-9)
        assert torch.allclose(pairs.states[row], alone.states[0], atol=1e-9)
        for k, (one, other) in enumerate(zip(outs, predict(head, alone, 3), strict=True)):
            assert torch.allclose(one[row, k:], other[0, k:], atol=1e-9)


def test_drafting_in_the_cache_equals_training() -> None:
    """Prefill, ragged extends and steps on a chain give what the unrolled training pass gives."""
    model, head, given = double()
    pairs, tokens = make_pairs(model, **given), given["tokens"]
    outs = predict(head, pairs, 3)
    rows, width = given["prompt"].shape[:2]
    start = torch.arange(width).expand(rows, -1)
    hidden = model.forward(given["prompt"], start, None)
    cache = head.cache(rows, width + N + 8)
    index = torch.arange(rows)
    last = head.prefill(cache, index, given["prompt"], hidden, given["lengths"], tokens[:, 0])
    assert torch.allclose(last, outs[0][:, 0], atol=1e-9)
    done = torch.ones(rows, dtype=torch.long)
    for counts in ([2, 1, 3], [1, 4, 1]):
        count = torch.tensor(counts)
        place = (done[:, None] + torch.arange(4)).clamp(max=N - 2)
        states = pairs.states.gather(1, place[..., None].expand(-1, -1, 16))
        last = head.extend(cache, tokens.gather(1, place), states, count)
        done = done + count
        assert torch.allclose(last, outs[0][index, done - 1], atol=1e-9)
    for depth in (1, 2):
        seen = torch.ones(1, 1, depth, dtype=torch.bool)
        chosen = tokens.gather(1, (done + depth - 1)[:, None])
        out = head.step(cache, chosen, last[:, None], torch.tensor([[depth]]), seen, before=depth - 1)
        last = out[:, 0]
        assert torch.allclose(last, outs[depth][index, done + depth - 1], atol=1e-9)
    assert (cache.lengths == given["lengths"] - 1 + done).all()  # nodes are not committed


def test_a_tree_equals_its_paths() -> None:
    model, head, given = double(2)
    hidden = model.forward(given["prompt"], torch.arange(given["prompt"].shape[1]).expand(2, -1), None)
    index = torch.arange(2)

    def opened() -> tuple:
        cache, states = head.cache(4, 40), []
        for branch in (0, 2):  # rows B.. are the second guidance branch
            given_states = (hidden + branch, given["lengths"], given["tokens"][:, 0])
            states.append(head.prefill(cache, index + branch, given["prompt"], *given_states))
        return cache, torch.cat(states)

    # root -> 0, 1; 0 -> 2, 3; 1 -> 4
    parents, depth = [-1, -1, 0, 0, 1], torch.tensor([1, 1, 2, 2, 2])
    tokens = torch.randint(0, 12, (2, 5))
    seen = torch.eye(5, dtype=torch.bool)
    for node in (2, 3, 4):
        seen[node, parents[node]] = True
    cache, root = opened()
    first = head.step(cache, tokens[:, :2], root[:, None].expand(-1, 2, -1), depth[None, :2], seen[None, :2, :2])
    below = first[:, [0, 0, 1]]
    second = head.step(cache, tokens[:, 2:], below, depth[None, 2:], seen[None, 2:], before=2)
    for node in (2, 3, 4):
        cache, root = opened()
        one = torch.ones(1, 1, 1, dtype=torch.bool)
        state = head.step(cache, tokens[:, parents[node]][:, None], root[:, None], depth[None, :1], one)
        assert torch.allclose(state, first[:, parents[node]][:, None], atol=1e-9)
        state = head.step(cache, tokens[:, node][:, None], state, depth[None, 2:3], one.expand(1, 1, 2), before=1)
        assert torch.allclose(state[:, 0], second[:, node - 2], atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("more", [{}, {"unconditional": 0.1, "guided": 0.0, "rejection": 0.0, "unroll": 1}])
def test_it_learns_and_loads_back(more: dict, tmp_path: Path) -> None:
    model = Toy(GRID)
    start = recipe(1, **more).run(model=model, out=tmp_path / "start", log=None, device="cpu", seed=0)
    end = recipe(60, **more).run(model=model, out=tmp_path / "end", log=None, device="cpu", seed=0)
    assert end.keys() == start.keys() == {f"overlap_g{g}_d{d}" for g in (1, 3) for d in (1, 2, 3, 4)}
    assert end["overlap_g1_d1"] > start["overlap_g1_d1"] + 0.05
    assert end["overlap_g3_d1"] > start["overlap_g3_d1"] + 0.05
    head = EagleHead.load(tmp_path / "end" / "final", model)
    trained = recipe(60, **more)
    trained.data.prepare(model, tmp_path / "end")
    loaded = trained.validate(model, head)
    assert loaded["overlap_g3_d2"] == pytest.approx(end["overlap_g3_d2"], abs=0.01)  # stored in bfloat16


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    recipe(6).run(model=Toy(GRID), out=tmp_path / "whole", log=None, device="cpu", seed=0)

    def stop(step: int, values: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe(6, validate_every=3).run(model=Toy(GRID), out=tmp_path / "cut", log=stop, device="cpu", seed=0)
    recipe(6).run(model=Toy(GRID), out=tmp_path / "cut", log=None, device="cpu", seed=0)
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["module"] for name in ("whole", "cut")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: recipe(unconditional=0.1), r"unconditional=null"),
        (lambda: recipe(regression=0.0, cross_entropy=0.0, guided=0.0, rejection=0.0), "weights"),
        (lambda: recipe(guided=-1.0), "weights"),
        (lambda: recipe(unroll=0), "unroll"),
        (lambda: images(images=0), "images"),
        (lambda: images(shares=(1.0,)), "shares"),
        (lambda: images(decoder=replace(Decoder(name="x", window=1, lossless=True), lossless=False)), "lossless"),
    ],
)
def test_wrong_settings_name_the_fix(build, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build()


def test_a_folder_that_is_no_head_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finetune=eagle"):
        EagleHead.load(tmp_path, Toy(GRID))
    EagleHead(EagleSettings(), Toy(GRID, width=8)).save(tmp_path, torch.bfloat16)
    with pytest.raises(UserError, match="does not fit"):
        EagleHead.load(tmp_path, Toy(GRID))


@torch.inference_mode()
def test_the_shipped_head_belongs_to_the_shipped_model() -> None:
    model = load("tiny", adapter=None)
    head = EagleHead.load(find("sjd2/models/tiny/weights/eagle"), model)
    prompts, codes = SceneTokens(vq_weights="sjd2/models/tiny/weights/vq").batch(8, 0, held_out=True)
    condition = model.encode(prompts)
    pairs = make_pairs(model, condition.embeds, condition.lengths, model.layout.tokens(codes))
    p = model.logits(pairs.states[:, 3:]).softmax(-1)
    overlaps = [
        float(torch.minimum(p, model.logits(out[:, 2:]).softmax(-1)).sum(-1).mean()) for out in predict(head, pairs, 3)
    ]
    assert overlaps[0] > 0.45
    assert overlaps[0] > overlaps[1] > overlaps[2] > 0.4
