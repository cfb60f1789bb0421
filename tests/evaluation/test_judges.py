"""The networks that judge images: CLIP, the caption verifier, their recipes, and the settings of evaluation=."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from evaluation import train_scorers
from evaluation.metrics import alignment, clip, clip_source, fid, references
from evaluation.score import read_scores, score
from sjd2.config import instantiate
from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.models.tiny import scenes
from tests.helpers.runs import RNG, a_run, pixels

# ---- the caption verifier


SCENES = scenes.held_out(200, 555)
CAPTIONS = [scenes.caption(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def rendered() -> list[np.ndarray]:
    return list(scenes.render(SCENES, 555))


def test_mirrored_captions_have_one_label() -> None:
    left = "a large red circle left of a small blue square on a plain teal background"
    right = "a small blue square right of a large red circle on a plain teal background"
    above = "a large red circle above a small blue square on a plain teal background"
    found = alignment.labels([left, right, above])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_only_named_attributes_count() -> None:
    texts = [
        "three small red rings on a grainy plain teal background lit from the top",
        "a large red circle above a small blue square on a plain teal background",
    ]
    target = alignment.labels(texts)
    assert alignment.named_mask(target).sum(1).tolist() == [8, 9]
    predicted = target.clone()
    predicted[:, list(scenes.ATTRIBUTES).index("colour")] += 1
    share, complete = alignment.shares(predicted, target)
    assert share.tolist() == pytest.approx([7 / 8, 8 / 9])
    assert complete.tolist() == [False, False]
    predicted = target.clone()
    predicted[0, list(scenes.ATTRIBUTES).index("shape2")] += 1  # nobody asked for a second shape
    assert alignment.shares(predicted, target)[0].tolist() == [1, 1]


def test_shipped_verifier_is_small_and_reads_images(tmp_path: Path, rendered: list[np.ndarray]) -> None:
    network = alignment.AttributeNet()
    assert sum(p.numel() for p in network.parameters()) <= 300_000
    assert (alignment.SHIPPED / alignment.WEIGHTS).stat().st_size <= 1_000_000
    metric = alignment.Alignment(device="cpu")
    metric.check()
    run = a_run(tmp_path, rendered, CAPTIONS)
    out = metric.score(run)
    assert out["alignment"] > 0.97
    assert out["alignment_all"] > 0.8
    assert out["alignment_chance"] < 0.45
    assert out["alignment_chance"] < out["alignment_ceiling"] <= out["alignment_real"] <= 1
    assert out.keys() == {info.name for info in metric.numbers}
    assert "2000 held-out pictures" in metric.protocol
    assert np.mean([row["alignment"] for row in read_scores(run).values()]) == pytest.approx(out["alignment"], abs=1e-6)


def test_alignment_is_absent_where_it_means_nothing(tmp_path: Path, rendered: list[np.ndarray]) -> None:
    metric = alignment.Alignment(device="cpu")
    assert metric.score(a_run(tmp_path / "a", rendered[:2], ["a photo of a dog", CAPTIONS[1]])) == {}
    assert metric.score(a_run(tmp_path / "b", pixels(2, 32), CAPTIONS[:2])) == {}
    assert "alignment_chance" not in metric.score(a_run(tmp_path / "c", rendered[:1], CAPTIONS[:1]))
    with pytest.raises(UserError, match="finetune=attributes"):
        alignment.Alignment(weights=str(tmp_path)).check()


def test_shipped_reference_belongs_to_the_shipped_extractor(tmp_path: Path, rendered: list[np.ndarray]) -> None:
    metric = fid.FeatureDistance(extractor=alignment.AttributeFeatures(device="cpu"))
    metric.check()
    good = metric.score(a_run(tmp_path / "good", rendered, CAPTIONS))
    noisy = [np.clip(image + RNG.normal(0, 40, image.shape), 0, 255).astype(np.uint8) for image in rendered]
    bad = metric.score(a_run(tmp_path / "bad", noisy, CAPTIONS))
    assert good["fid"] < bad["fid"]
    assert abs(good["kid"]) < 4 * good["kid_std"]
    assert bad["kid"] > good["kid"] + 4 * good["kid_std"]
    assert "4000 images" in good["fid_reference"]


# ---- CLIP


@pytest.fixture(scope="module")
def small_clip() -> clip.Clip:
    return clip.Clip(clip_source.find_source("shipped", None, False), "cpu")


def test_shipped_clip_prefers_the_right_caption(
    tmp_path: Path, small_clip: clip.Clip, rendered: list[np.ndarray]
) -> None:
    metric = clip.ClipScore(device="cpu")
    metric.check()
    run = a_run(tmp_path / "right", rendered, CAPTIONS)
    out = metric.score(run)
    assert (
        out["clip_score"]
        > metric.score(a_run(tmp_path / "wrong", rendered, CAPTIONS[1:] + CAPTIONS[:1]))["clip_score"] + 20
    )
    assert out["clip_model"] == "shipped (shapes)"
    assert np.mean([row["clip"] for row in read_scores(run).values()]) == pytest.approx(out["clip_score"])
    assert sum(file.stat().st_size for file in clip_source.SHIPPED.iterdir()) <= 8_000_000
    # batches change nothing
    assert torch.allclose(
        small_clip.scores(rendered[:5], CAPTIONS[:5])[:2], small_clip.scores(rendered[:2], CAPTIONS[:2]), atol=1e-3
    )


def test_clip_score_agrees_with_torchmetrics(small_clip: clip.Clip, rendered: list[np.ndarray]) -> None:
    from torchmetrics.multimodal.clip_score import CLIPScore

    class Model(torch.nn.Module):
        """What torchmetrics asks of a transformers CLIP."""

        class config:
            class text_config:
                max_position_embeddings = 77

        device = torch.device("cpu")

        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return small_clip.model.encode_image(pixel_values)

        def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return small_clip.model.encode_text(input_ids)

    class Processor:
        def __call__(self, text: list | None = None, images: list | None = None, **_: object) -> dict:
            out = {}
            if images is not None:
                arrays = [image.permute(1, 2, 0).numpy() for image in images]
                out["pixel_values"] = torch.stack([small_clip.preprocess(Image.fromarray(array)) for array in arrays])
            if text is not None:
                out["input_ids"] = small_clip.tokenizer(text)
                out["attention_mask"] = torch.ones_like(out["input_ids"])
            return out

    metric = CLIPScore(model_name_or_path=lambda: (Model(), Processor()))
    batch = torch.from_numpy(np.stack(rendered[:16])).permute(0, 3, 1, 2)
    metric.update(batch, CAPTIONS[:16])
    ours = small_clip.scores(rendered[:16], CAPTIONS[:16])
    assert ours.min() > 0  # torchmetrics clips the mean at zero, the definition each score
    assert ours.mean().item() == pytest.approx(metric.compute().item(), rel=1e-5)


def test_scores_are_never_negative(small_clip: clip.Clip, rendered: list[np.ndarray]) -> None:
    wrong = small_clip.scores(rendered, CAPTIONS[7:] + CAPTIONS[:7])
    assert wrong.min() == 0


def test_shipped_clip_is_absent_for_words_it_does_not_know(tmp_path: Path, rendered: list[np.ndarray]) -> None:
    run = a_run(tmp_path, rendered[:2], ["a red dog", CAPTIONS[1]])
    assert clip.ClipScore(device="cpu").score(run) == {}


@pytest.mark.parametrize(
    ("model", "pretrained", "says"),
    [
        ("ViT-B-32", None, "without weights scores noise"),
        ("ViT-B-32", "laion3b", "no file and no tag"),
        ("ViT-B-23", None, "did you mean 'ViT-B-32'"),
        ("local-dir:nowhere", None, "has no open_clip_config.json"),
        ("hf-hub:nobody/nothing", None, "not in the local cache and nothing is downloaded"),
        ("hf-hub:a b", None, "no hub name"),
        ("ViT-B-32", "laion2b_s34b_b79k", "not in the local cache"),
        ("ViT-L-14", "openai", "allow_download=true"),
    ],
)
def test_clip_without_weights_fails_at_once(model: str, pretrained: str | None, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=says):
        clip.ClipScore(model=model, pretrained=pretrained).check()
    assert time.monotonic() - began < 10  # the import of open_clip included; offline tries of the hub take 25-47 s


def test_cached_hub_weights_are_found_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def cached(*_: str, **settings: object) -> str:
        asked.append(settings)
        return str(clip_source.SHIPPED)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    assert clip_source.find_source("hf-hub:me/clip", None, False).name == f"local-dir:{clip_source.SHIPPED}"
    tagged = clip_source.find_source("ViT-B-32", "openai", False)
    assert tagged.file == str(clip_source.SHIPPED)
    assert tagged.quick_gelu  # OpenAI's weights were trained with it
    assert dict(tagged.preprocess)["image_mean"][0] == pytest.approx(0.4815, abs=1e-3)
    assert [settings["local_files_only"] for settings in asked] == [True, True]
    clip_source.find_source("hf-hub:me/clip", None, True)
    assert asked[-1]["local_files_only"] is False


def test_a_file_of_weights_needs_a_tag_where_tags_differ(tmp_path: Path) -> None:
    """Neither activation nor preprocessing are in the file: OpenAI's weights with plain GELU score otherwise."""
    file = tmp_path / "mine.pt"
    file.write_bytes(b"\x80 never read here")
    with pytest.raises(
        UserError,
        match=r"differ in that: set .*pretrained=TAG:.*openai \(QuickGELU, mean 0.48, shortest\) or .* \(GELU, ",
    ):
        clip.ClipScore(model="ViT-L-14", pretrained=str(file)).check()
    with pytest.raises(UserError, match="did you mean 'openai'"):
        clip.ClipScore(model="ViT-L-14", pretrained=f"openia:{file}").check()
    openai, laion = (
        clip.ClipScore(model="ViT-L-14", pretrained=f"{tag}:{file}") for tag in ("openai", "laion2b_s32b_b82k")
    )
    assert openai.source.quick_gelu
    assert not laion.source.quick_gelu
    assert openai.label == "ViT-L-14 openai:mine.pt"
    assert dict(laion.source.preprocess)["image_mean"] == (0.5, 0.5, 0.5)  # an early one of LAION's
    squashed = dict(clip_source.find_source("ViT-B-16-SigLIP", str(file), False).preprocess)  # all tags agree
    assert (squashed["image_mean"], squashed["image_resize_mode"]) == ((0.5, 0.5, 0.5), "squash")


@pytest.fixture
def small_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small architecture with two tags in open_clip's lists, and a file of its weights."""
    import open_clip

    config = json.loads((clip_source.SHIPPED / clip_source.CONFIG).read_text())["model_cfg"]
    config["vision_cfg"] |= {"layers": 2, "head_width": 16, "patch_size": 16}
    config["text_cfg"] = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"openai": {"quick_gelu": True}, "other": {}})
    torch.save(open_clip.create_model("small").state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


def test_the_tag_decides_the_activation(small_architecture: Path, rendered: list[np.ndarray]) -> None:
    found = {tag: clip_source.find_source("small", f"{tag}:{small_architecture}", False) for tag in ("openai", "other")}
    scores = {tag: clip.Clip(source, "cpu").images(rendered[:2]) for tag, source in found.items()}
    assert (scores["openai"] - scores["other"]).abs().max() > 1e-4


def test_weights_of_another_context_length_are_not_stretched(small_architecture: Path) -> None:
    weights = torch.load(small_architecture)
    torch.save(weights | {"positional_embedding": weights["positional_embedding"][:7]}, small_architecture)
    with pytest.raises(
        UserError, match=r"another image size or context length .*positional_embedding is 7x16 and 12x16"
    ):
        clip.Clip(clip_source.find_source("small", f"other:{small_architecture}", False), "cpu")


def test_scores_that_are_not_finite_are_refused(
    tmp_path: Path, rendered: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip.Clip, "scores", lambda *_: torch.tensor([torch.nan, 1.0]))
    with pytest.raises(UserError, match="not finite: its weights are damaged"):
        clip.ClipScore(device="cpu").score(a_run(tmp_path, rendered[:2], CAPTIONS[:2]))


def test_a_folder_without_its_preprocessing_is_refused(tmp_path: Path) -> None:
    for file in clip_source.SHIPPED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / clip_source.CONFIG).read_text())
    del config["preprocess_cfg"]["mean"]
    (tmp_path / clip_source.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="add preprocess_cfg with mean and std"):
        clip_source.find_source(f"local-dir:{tmp_path}", None, False)


def test_clip_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    for file in clip_source.SHIPPED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / clip_source.CONFIG).read_text())
    config["model_cfg"]["embed_dim"] = 32
    (tmp_path / clip_source.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not load"):
        clip.Clip(clip_source.find_source(f"local-dir:{tmp_path}", None, False), "cpu")


# ---- recipes and settings


@pytest.mark.full
def test_recipes_train_resume_and_ship_what_the_metrics_read(tmp_path: Path) -> None:
    small = {"pictures": 32, "batch_size": 8, "validation_pictures": 8, "validate_every": 100, "warmup": 1}
    for name, more in (("attributes", {"reference_pictures": 8}), ("clip", {})):
        cfg = OmegaConf.merge(OmegaConf.load(ROOT / "conf" / "finetune" / f"{name}.yaml"), small | more)
        reported: list[int] = []

        def log(step: int, numbers: dict, reported: list[int] = reported) -> None:
            reported.append(step)

        for steps, folder in ((2, "cut"), (4, "cut"), (4, "whole")):
            recipe = instantiate(OmegaConf.merge(cfg, {"steps": steps, "decay": 1e-9}))  # a schedule without a tail
            numbers = recipe.run(out=tmp_path / name / folder, log=log, device="cpu", seed=1)
        assert reported == [2, 4, 4]
        assert all(np.isfinite(value) for value in numbers.values())
        files = ("attributes.safetensors",) if name == "attributes" else ("open_clip_model.safetensors",)
        for file in files:
            cut, whole = ((tmp_path / name / folder / "final" / file).read_bytes() for folder in ("cut", "whole"))
            assert cut == whole
    final = tmp_path / "attributes" / "whole" / "final"
    extractor = alignment.AttributeFeatures(weights=str(final), device="cpu")
    assert references.read_reference(final / "reference.npz", extractor).features.shape == (8, 64)
    assert alignment.Alignment(weights=str(final)).protocol.count("8 held-out pictures") == 1
    loaded = clip.Clip(
        clip_source.find_source(f"local-dir:{tmp_path / 'clip' / 'whole' / 'final'}", None, False), "cpu"
    )
    assert loaded.texts(CAPTIONS[:2]).shape == (2, 64)


def test_shipped_networks_pass_the_bars(small_clip: clip.Clip, rendered: list[np.ndarray]) -> None:
    vq = train_scorers.load_vq(None, "cpu")
    pictures = torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2)
    coded = train_scorers.reconstruct(vq, pictures)
    found = train_scorers.measure(
        alignment.AttributeNet.load(alignment.SHIPPED, "cpu"), pictures, coded, alignment.labels(CAPTIONS)
    )
    assert found["alignment_real"] > 0.97
    assert found["alignment_ceiling"] > 0.95
    clip_found = train_scorers.measure_clip(small_clip, coded, CAPTIONS, 0)
    assert clip_found["found"] > 0.9
    assert clip_found["told_apart"] > 0.75
    assert clip_found["score"] > clip_found["score_other"] + 30


def test_pools_hold_reconstructions_of_training_scenes_only() -> None:
    pool = train_scorers.Pool.make(8, 0, train_scorers.load_vq(None, "cpu"))
    drawn = train_scorers.draw(scenes.training(8, 0), 0)
    assert torch.equal(pool.images[::2], drawn[::2])
    assert not any(torch.equal(a, b) for a, b in zip(pool.images[1::2], drawn[1::2], strict=True))
    assert not any(map(scenes.is_held_out, pool.captions))
    with pytest.raises(UserError, match="finetune=vq"):
        train_scorers.load_vq("nowhere", "cpu")


def test_changed_captions_differ_in_one_attribute() -> None:
    rng = np.random.default_rng(0)
    for caption in CAPTIONS[:50]:
        old, new = scenes.attributes(caption), scenes.attributes(train_scorers.changed(caption, rng))
        assert sum(old[name] != new[name] for name in old) == 1


@pytest.mark.parametrize("name", ["tiny", "none", "inception", "clip"])
def test_evaluation_settings_build(name: str) -> None:
    text = (ROOT / "conf" / "evaluation" / f"{name}.yaml").read_text()
    assert f"evaluation={name}" in text.split("metrics:")[0]  # begins with the command that runs it
    cfg = OmegaConf.create({"device": "cpu", "runs_dir": "runs", "evaluation": OmegaConf.create(text)})
    metrics = {key: instantiate(node) for key, node in cfg.evaluation.metrics.items()}
    for metric in metrics.values():
        assert metric.numbers
        if name in ("tiny", "none"):
            metric.check()
            assert metric.protocol.endswith(".")


def test_all_metrics_together(tmp_path: Path, rendered: list[np.ndarray]) -> None:
    cfg = OmegaConf.create({"device": "cpu", "evaluation": OmegaConf.load(ROOT / "conf" / "evaluation" / "tiny.yaml")})
    run = a_run(tmp_path, rendered[:32], CAPTIONS[:32])
    out = score(run, {key: instantiate(node) for key, node in cfg.evaluation.metrics.items()})
    assert out == run.metrics
    assert out["n_images"] == 32
    assert {"fid", "kid", "kid_std", "clip_score", "alignment", "step_compression", "latency_s_median"} <= out.keys()
    assert "N=32 is few for 64 features" in out["fid_warning"]
    assert out["protocol"].keys() == {"speed", "fid", "clip", "alignment"}
    assert None not in out.values()
