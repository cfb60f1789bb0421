"""The embedded model: its grammar and renderer, tokenizer, VQGAN files, the training loop and both recipes."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoTokenizer, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.finetune.tiny.train_ar import TrainAR, image_logits, pack
from sjd2.finetune.tiny.train_vq import TrainVQ, measure, to_float
from sjd2.finetune.trainer import step_rng, train, warmup_decay
from sjd2.models.tiny import scenes
from sjd2.models.tiny.tokenizer import LONGEST_PROMPT, build_tokenizer, prompt_ids
from sjd2.models.vqgan import VQGAN, WEIGHTS, _taming

SHIPPED = ROOT / "sjd2" / "models" / "tiny"


def recipe(name: str, **settings: object) -> TrainVQ | TrainAR:
    """Build a recipe from its yaml with some settings replaced."""
    return instantiate(OmegaConf.merge(OmegaConf.load(ROOT / "conf" / "finetune" / f"{name}.yaml"), settings))


# ------------------------------------------------------------------------------------------------------------- scenes
def test_a_caption_reads_back_as_the_scene_it_was_made_of() -> None:
    """`attributes` inverts `caption`, within the declared words, values and length."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        scene = scenes.sample_scene(rng)
        text = scenes.caption(scene)
        read = scenes.attributes(text)
        assert read == asdict(scene)
        assert all(read[name] in values for name, values in scenes.ATTRIBUTES.items())
        assert set(text.split()) <= set(scenes.WORDS)
        assert len(text.split()) + 2 <= LONGEST_PROMPT
        assert read["colour"] != read["colour2"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "three small red circle on a plain gray background",
        "one small red circles on a plain gray background",
        "a large red circle above of a small blue ring on a plain gray background",
        "a large red circle left a small blue ring on a plain gray background",
        "a large red circle on a plain gray background",
        "one large red circle on a plain gray background lit from the left ",
    ],
)
def test_a_text_outside_the_grammar_is_refused_in_one_sentence(text: str) -> None:
    """The message quotes the text and stays on one line."""
    with pytest.raises(UserError, match="outside the grammar") as error:
        scenes.attributes(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_picture_depends_on_caption_and_seed_alone() -> None:
    """Order and company do not matter, another seed does."""
    some = scenes.training(130, 3)
    images = scenes.render(some, 7)
    assert images.shape == (130, 48, 48, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, scenes.render(some, 7))
    assert np.array_equal(images[::-1], scenes.render(some[::-1], 7))
    assert np.array_equal(images[99:100], scenes.render(some[99:100], 7))
    assert not np.array_equal(images, scenes.render(some, 8))
    assert scenes.render([], 0).shape == (0, 48, 48, 3)


def test_pictures_show_what_the_caption_says() -> None:
    """Side of the object, its colour and the light, read off the pixels."""
    text = "a large red square left of a large green square on a plain gray background"
    image = scenes.render([scenes.Scene(**scenes.attributes(text))], 0)[0].astype(int)
    columns = np.arange(48)
    red = (image[..., 0] > 180) & (image[..., 1] < 90)
    green = (image[..., 1] > 140) & (image[..., 0] < 90)
    assert red.sum() > 200
    assert green.sum() > 200
    assert (red.sum(0) * columns).sum() / red.sum() < 24 < (green.sum(0) * columns).sum() / green.sum()
    lit = "one small red ring on a plain pink background lit from the top"
    image = scenes.render([scenes.Scene(**scenes.attributes(lit))], 0)[0].astype(int)
    assert image[:8].mean() > 1.3 * image[-8:].mean()


def test_training_never_sees_a_held_out_caption() -> None:
    """Held-out captions are a stable share, all distinct, and the shipped prompt set is made of them."""
    drawn = {scenes.caption(scene) for scene in scenes.training(4000, 0)}
    assert not any(map(scenes.is_held_out, drawn))
    rng = np.random.default_rng(1)
    share = np.mean([scenes.is_held_out(scenes.caption(scenes.sample_scene(rng))) for _ in range(4000)])
    assert 0.04 < share < 0.09
    shown = [scenes.caption(scene) for scene in scenes.held_out(500, 0)]
    assert all(map(scenes.is_held_out, shown))
    assert len(set(shown)) == 500


def test_the_shipped_captions_are_what_the_code_writes(tmp_path: Path) -> None:
    """The file can be made again, here and on other machines."""
    scenes.write_captions(tmp_path / "captions.txt")
    text = (tmp_path / "captions.txt").read_text()
    assert text == (SHIPPED / "captions.txt").read_text()
    assert len(set(text.splitlines())) == 2000


# ---------------------------------------------------------------------------------------------------------- tokenizer
def test_ids_are_chameleons() -> None:
    """Code k is id k + 4, found by transformers' own mapping; prompts are those of Anole."""
    tokenizer = build_tokenizer(512)
    model = recipe("ar", num_layers=1, hidden_size=32, num_heads=1, intermediate_size=32).build(512)
    assert model.model.vocabulary_mapping.img2bpe == {code: code + 4 for code in range(512)}
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    begin = tokenizer.boi_token_id
    conditional, unconditional = prompt_ids(tokenizer, ["A small, red dog", None])
    assert unconditional == [0, begin]
    assert tokenizer.convert_ids_to_tokens(conditional) == [
        *("<s>", "a", "small", "<unk>", "red", "<unk>", tokenizer.boi_token)
    ]


# -------------------------------------------------------------------------------------------------------------- VQGAN
def test_vqgan_reads_back_what_it_wrote_in_tamings_names(tmp_path: Path) -> None:
    """A folder, and a taming checkpoint of the same tensors, give equal codes and pixels."""
    torch.manual_seed(0)
    model = recipe("vq").build().eval()
    model.save(tmp_path / "vq")
    again = VQGAN.load(tmp_path / "vq")
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (2, 12, 12)
    assert torch.equal(codes, again.encode(images))
    drawn = again.decode(codes)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (2, 3, 48, 48)
    assert torch.equal(drawn, model.decode(codes))
    again.codebook[int(codes[1, 0, 0])] = torch.nan
    with pytest.raises(UserError, match="pixels that are not finite"):  # they would be black
        again.decode(codes)
    # The names of the original: level 0 is the finest, though Janus' class counts from the coarsest.
    names = load_file(tmp_path / "vq" / WEIGHTS)
    assert "decoder.up.2.upsample.conv.weight" in names
    assert "decoder.up.0.upsample.conv.weight" not in names
    torch.save({"state_dict": {"loss.logvar": torch.zeros(1)}}, tmp_path / "empty.ckpt")
    with pytest.raises(UserError, match="lack"):
        VQGAN.load(tmp_path / "empty.ckpt")


def test_vqgan_has_the_tensors_of_the_published_checkpoint() -> None:
    """Chameleon's default shape: the counts and names that taming-transformers gives it."""
    with torch.device("meta"):
        model = VQGAN(ChameleonVQVAEConfig())
    names = {_taming(name, len(model.decoder.up)) for name in model.state_dict()}
    assert len([name for name in names if name.startswith("decoder.")]) == 164
    assert "decoder.up.4.upsample.conv.weight" in names
    assert "decoder.up.0.upsample.conv.weight" not in names
    assert {"quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias"} <= names
    assert all(norm.num_groups == 32 for norm in model.modules() if isinstance(norm, torch.nn.GroupNorm))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / WEIGHTS).unlink(), "has no vqgan.safetensors"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / WEIGHTS).write_bytes(b"no tensors"), "cannot be read"),
        (lambda path: recipe("vq", num_res_blocks=1).build().save(path.parent / "other"), "unknown"),
        (lambda path: recipe("vq", codes=64).build().save(path.parent / "other"), "has shape"),
    ],
)
def test_vqgan_files_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path, spoil: object, says: str) -> None:
    """Missing, broken and foreign files."""
    recipe("vq").build().save(tmp_path / "vq")
    spoil(tmp_path / "vq")
    if (tmp_path / "other").exists():
        (tmp_path / "other" / WEIGHTS).replace(tmp_path / "vq" / WEIGHTS)
    with pytest.raises(UserError, match=says) as error:
        VQGAN.load(tmp_path / "vq")
    assert "\n" not in str(error.value)


def test_the_shipped_tokeniser_rebuilds_pictures() -> None:
    """At least 23 dB, and most of the codes in use."""
    numbers = measure(VQGAN.load(SHIPPED / "weights" / "vq"), to_float(scenes.render(scenes.held_out(64, 1), 1)))
    assert numbers["psnr"] > 23
    assert numbers["codes_used"] > 450


# --------------------------------------------------------------------------------------------------------------- loop
class Kill(Exception):
    """Stands for a pre-emption."""


def fit(out: Path, *, kill_at: int | None = None, seed: int = 5) -> torch.nn.Module:
    """Train a small net with dropout on data drawn per step, optionally killed."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).double()

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.from_numpy(step_rng(seed, step).normal(size=(16, 4)))
        return (net(x) - x.sum(1, keepdim=True)).square().mean(), {"one": 1.0}

    def after(done: int) -> dict[str, float]:
        if done == kill_at:
            raise Kill
        return {}

    optimizers = [torch.optim.AdamW(net[0].parameters(), 1e-2), torch.optim.Muon([net[2].weight], 1e-2)]
    schedule = warmup_decay(30, 5, 0.5)
    train(
        *(net, loss, optimizers),
        steps=30,
        out=out,
        seed=seed,
        schedule=schedule,
        after=after,
        log_every=3,
        checkpoint_s=0.0,
    )
    return net


def test_a_killed_run_resumes_to_equal_weights(tmp_path: Path) -> None:
    """Killed twice, it ends with the weights and the curve of an undisturbed run, bit for bit."""
    whole = fit(tmp_path / "whole")
    for kill_at in (11, 20):
        with pytest.raises(Kill):
            fit(tmp_path / "killed", kill_at=kill_at)
    resumed = fit(tmp_path / "killed")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = [line.split(",")[0] for line in (tmp_path / "killed" / "curve.jsonl").read_text().splitlines()]
    assert steps == [line.split(",")[0] for line in (tmp_path / "whole" / "curve.jsonl").read_text().splitlines()]
    with pytest.raises(UserError, match="seed 5, not 6"):
        fit(tmp_path / "whole", seed=6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """Rather than train on garbage for an hour."""
    net = torch.nn.Linear(1, 1)
    settings = {"steps": 5, "out": tmp_path, "seed": 0, "log_every": 1}
    with pytest.raises(FloatingPointError, match="after step 1"):
        train(net, lambda _: (net.weight.sum() * torch.nan, {}), [torch.optim.SGD(net.parameters(), 1.0)], **settings)


# ------------------------------------------------------------------------------------------------------------ recipes
def test_packed_rows_score_as_single_rows() -> None:
    """Prompts of other lengths in the batch, and padding, leave a row's logits as they are."""
    torch.manual_seed(0)
    model = recipe("ar", num_layers=2, hidden_size=32, num_heads=2, intermediate_size=48).build(64).double().eval()
    prompts, codes = prompt_ids(build_tokenizer(64), ["a large red ring", None]), torch.randint(64, (2, 20))
    together = image_logits(model, *pack(prompts, codes, 1), 64)
    for row in range(2):
        alone = image_logits(model, *pack(prompts[row : row + 1], codes[row : row + 1], 1), 64)
        torch.testing.assert_close(together[row : row + 1], alone)
    changed = codes.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 64
    moved = (image_logits(model, *pack(prompts, changed, 1), 64) - together).abs().amax(-1)
    assert moved[:, :11].max() == 0  # a code is seen by later places only
    assert moved[:, 11:].min() > 0


def test_both_recipes_run_and_write_loadable_folders(tmp_path: Path) -> None:
    """Three steps of each, the AR model on the tokeniser just trained."""
    reports: list[int] = []
    small = {"steps": 3, "batch_size": 4, "warmup": 1, "validation_images": 8}
    vq = recipe("vq", kmeans_step=1, codes=64, **small)
    numbers = vq.run(out=tmp_path / "vq", log=lambda step, _: reports.append(step), device="cpu", seed=0)
    assert reports[-1] == 3
    assert numbers["codes_used"] >= 1
    weights = str(tmp_path / "vq" / "final")
    ar = recipe("ar", vq_weights=weights, num_layers=1, hidden_size=32, num_heads=1, intermediate_size=48, **small)
    numbers = ar.run(out=tmp_path / "ar", log=None, device="cpu", seed=0)
    assert 0 < numbers["val_loss"] < 10
    folder = tmp_path / "ar" / "final"
    model, report = ChameleonForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder)("a large ring")["input_ids"][0] == 0
