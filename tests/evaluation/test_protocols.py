"""Published protocols against the libraries they were made with: pytorch-fid's features, LANTERN's crop, CLIP scores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import functional as F

from evaluation import statistics
from evaluation.metrics import clip, clip_source, features, fid, references, rewards, transforms
from evaluation.run_folder import RunFolder
from evaluation.score import read_scores
from sjd2.config import instantiate
from sjd2.errors import UserError
from sjd2.files import ROOT
from tests.helpers.extractors import MeanColour, StandIn
from tests.helpers.runs import a_run

SIZES = ((60, 91), (48, 48), (75, 52))  # height, width: as differing as COCO's
RNG = np.random.default_rng(3)


def smooth_images(sizes: Iterable[tuple[int, int]] = SIZES) -> list[np.ndarray]:
    """Smooth coloured images with some noise, so that crops and resizings differ."""
    found = []
    for height, width in sizes:
        y, x = np.mgrid[0:height, 0:width] / 20
        waves = [127 + 100 * np.sin(a * x + b * y) for a, b in RNG.normal(size=(3, 2))]
        found.append((np.stack(waves, -1) + RNG.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8))
    return found


def save_folder(folder: Path, images: list[np.ndarray], names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / (names[i] if names else f"{i}.png"))
    return folder


# ---- images


def test_centre_square_is_torchvision_s_crop_and_pillow_s_lanczos() -> None:
    for image in smooth_images():
        side = min(image.shape[:2])
        cropped = F.center_crop(Image.fromarray(image), [side, side])
        same = F.resize(cropped, [32, 32], F.InterpolationMode.LANCZOS)
        assert np.array_equal(transforms.centre_square(image, 32), np.asarray(same))
    assert not np.array_equal(transforms.centre_square(image, 32), transforms.squash(image, 32))


def test_squash_is_sjd_s_resize_of_a_batch() -> None:
    image = smooth_images()[0]
    batch = torch.tensor(image).unsqueeze(0).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(batch, size=(299, 299), mode="bilinear", align_corners=False)
    assert torch.equal(torch.from_numpy(transforms.squash(image, 299)), theirs[0].permute(1, 2, 0))


# ---- FID


def small_weights(path: Path) -> None:
    """Write weights of pytorch-fid's shapes; tensors are windows on a few numbers, so 24 million of them fit in 2 MB."""
    base = torch.randn(2**12, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        shapes = features._pytorch_fid_network().state_dict()
    tensors = {}
    for key, value in shapes.items():
        if value.ndim > 1:  # keeps the size of what passes through
            tensors[key] = (base * (2 / value[0].numel()) ** 0.5).as_strided(value.shape, [1] * value.ndim)
        elif key.endswith(("running_var", "bn.weight")):
            tensors[key] = torch.ones(()).expand(value.shape)
        else:
            tensors[key] = torch.zeros((), dtype=value.dtype).expand(value.shape)
    torch.save(tensors, path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which torch.hub finds the file too."""
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    small_weights(folder / features.PYTORCH_FID_FILE)
    assert (folder / features.PYTORCH_FID_FILE).stat().st_size < 3_000_000
    return folder


def test_pytorch_fid_features_are_those_of_clean_fid_s_copy_of_it(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid.features import build_feature_extractor
    from cleanfid.fid import get_folder_features

    images = smooth_images(SIZES[:2])
    folder = save_folder(tmp_path / "val2017", images)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(weights.parent))
    network = build_feature_extractor("legacy_pytorch", torch.device("cpu"), use_dataparallel=False)
    settings = {"model": network, "num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    expected = get_folder_features(str(folder), mode="legacy_pytorch", **settings)
    extractor = features.PytorchFidInception(weights=str(weights), device="cpu", batch_size=1)
    extractor.check()
    ours = features.extract(extractor, images)
    assert ours.shape == (2, 2048)
    error, told_apart = np.abs(ours - expected).max(), np.abs(expected[0] - expected[1]).max()
    assert error < 1e-4 * told_apart
    clean = get_folder_features(str(folder), num=1, mode="clean", **settings)
    assert np.abs(clean - expected[:1]).max() > 100 * error  # another resizing is another protocol


@pytest.mark.parametrize("content", [b"half a file", None])
def test_wrong_pytorch_fid_weights_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / features.PYTORCH_FID_FILE
    path.write_bytes(content) if content else torch.save({"fc.weight": torch.zeros(2)}, path)
    extractor = features.PytorchFidInception(weights=str(path), device="cpu")
    with pytest.raises(UserError, match=f"cannot be read as {features.PYTORCH_FID_FILE}.*fetch it again"):
        extractor.check()  # before any image is made


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / features.INCEPTION_FILE
    torch.jit.script(StandIn()).save(str(path))
    return path


def test_lantern_s_crop_goes_through_clean_fid(tmp_path: Path, inception: Path) -> None:
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    images = smooth_images()
    folder = save_folder(tmp_path / "real", images)

    def crop(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image)
        picture = F.center_crop(picture, min(picture.size))
        return np.array(picture.resize((256, 256), Image.Resampling.LANCZOS))

    network = InceptionV3W(str(inception.parent), download=False).eval()
    settings = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False, "mode": "clean"}
    theirs = get_folder_features(str(folder), network, custom_image_tranform=crop, **settings)
    cropped, plain = (features.Inception(weights=str(inception), crop=side, device="cpu") for side in (256, None))
    assert np.allclose(features.extract(cropped, images), theirs, atol=1e-5)
    assert not np.allclose(features.extract(plain, images), theirs, atol=1e-2)
    assert cropped.digest() != plain.digest()
    assert cropped.name == "Inception-v3 (clean-fid, mode clean, centre square of 256 first)"
    with pytest.raises(UserError, match="crop must be 1 or more"):
        features.Inception(crop=0)


def test_references_of_two_protocols_are_kept_apart(tmp_path: Path, inception: Path) -> None:
    folder = save_folder(tmp_path / "val2017", smooth_images())
    kept = [
        references.ImageFolder(folder, tmp_path).read(
            features.Inception(weights=str(inception), crop=side, device="cpu")
        )
        for side in (256, None, 256)
    ]
    assert len(list(tmp_path.glob("reference-*.npz"))) == 2
    assert np.array_equal(kept[0].features, kept[2].features)
    assert not np.allclose(kept[0].features, kept[1].features)
    assert kept[2].files == ("0.png", "1.png", "2.png")


def coco_run(folder: Path, images: list[np.ndarray], wanted: list[str]) -> RunFolder:
    run = a_run(folder, images)
    lines = [{"prompt": "p", "metadata": {"file_name": name} if name else {}} for name in wanted]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_only_the_images_that_the_prompts_describe(tmp_path: Path) -> None:
    names = [f"{i:012d}.png" for i in range(40)]
    real, made = smooth_images([(8, 8)] * 40), smooth_images([(8, 8)] * 12)
    folder = save_folder(tmp_path / "val2017", real, names)
    chosen = [3, 17, 5, 30, 8, 21, 39, 0, 1, 2, 4, 6]
    run = coco_run(tmp_path / "run", made, [names[i] for i in chosen])
    settings = {"extractor": MeanColour(), "reference": str(folder), "cache": str(tmp_path / "kept")}
    out = fid.FeatureDistance(only_prompts=True, **settings).score(run)
    expected = fid.Statistics.of(MeanColour()([real[i] for i in sorted(chosen)]))
    assert out["fid"] == pytest.approx(fid.frechet(fid.Statistics.of(MeanColour()(made)), expected))
    assert out["fid_reference"] == "val2017 (40 images), the 12 of the prompts"
    whole = fid.FeatureDistance(**settings)
    assert whole.score(run)["fid"] != pytest.approx(out["fid"], rel=1e-3)
    other = coco_run(tmp_path / "other", [image // 2 for image in made], [names[i] for i in chosen])
    metric = fid.FeatureDistance(only_prompts=True, **settings)
    metric.score(other)
    few = MeanColour()([real[i] for i in sorted(chosen)])
    kids = [
        fid.kernel_distance(MeanColour()(images), few, metric.subsets)[0]
        for images in ([image // 2 for image in made], made)
    ]
    gap = kids[0] - kids[1]
    assert statistics.paired_distance(run, other, metric, "kid").mean == pytest.approx(gap, rel=1e-6)


def test_missing_reference_images_are_reported(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "val2017", smooth_images([(8, 8)] * 4))
    settings = {"extractor": MeanColour(), "only_prompts": True}
    metric = fid.FeatureDistance(reference=str(folder), **settings)
    with pytest.raises(UserError, match=r"lacks 9.png: give the folder of all images"):
        metric.score(coco_run(tmp_path / "a", smooth_images([(8, 8)] * 2), ["0.png", "9.png"]))
    for facts, says in (([{"file_name": "0.png"}, {"file_name": "9.png"}], r"lacks 9.png"), ([{}] * 2, "coco2017")):
        with pytest.raises(UserError, match=says):  # before anything is sampled
            metric.check_prompts(facts)
    with pytest.raises(UserError, match="prompts=coco2017"):
        metric.score(coco_run(tmp_path / "b", smooth_images([(8, 8)] * 2), ["0.png", ""]))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(UserError, match="needs a folder of images"):
        fid.FeatureDistance(reference=str(tmp_path / "moments.npz"), **settings).check()


# ---- CLIP score


@pytest.fixture(scope="module")
def hub_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights in the files of openai/clip-vit-base-patch16."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = len(vocabulary) - 1
    inner = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = inner | {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 24,
        "eos_token_id": end,
        "bos_token_id": end - 1,
    }
    config = CLIPConfig(text_config=text, vision_config=inner | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    steps = {
        "do_resize": True,
        "size": 32,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": 32,
        "do_normalize": True,
    }
    steps |= {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))  # written as the public one is
    return folder


def torchmetrics_scores(folder: Path, images: list[np.ndarray], prompts: list[str]) -> list[float]:
    """Score pairs as SJD's evaluation_metrics.py does; torchmetrics 1.9 needs a wrapper under transformers 5."""
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    class Model(CLIPModel):
        def get_image_features(self, *args: torch.Tensor) -> torch.Tensor:
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args: torch.Tensor) -> torch.Tensor:
            return super().get_text_features(*args).pooler_output

    metric = CLIPScore(lambda: (Model.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)))
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        batch = torch.tensor(image).unsqueeze(0).permute(0, 3, 1, 2)
        metric.reset()
        metric.update(torch.nn.functional.interpolate(batch, size=(299, 299), mode="bilinear"), [prompt])
        found.append(metric.compute().item())
    return found


def test_sjd_s_clip_score_is_torchmetrics(tmp_path: Path, hub_clip: Path) -> None:
    prompts = [
        "a cat",
        "two dogs.",
        "a red bus",
        "x",
        "a very long caption, cut off " * 3,
        "RAIN",
        "z q",
        "?!",
        "b",
        "7",
    ]
    images = smooth_images([(50, 90)] * len(prompts))
    run = a_run(tmp_path, images, prompts)
    metric = clip.ClipScore(model=f"transformers:{hub_clip}", squash=299, device="cpu", batch_size=2)
    metric.check()
    out = metric.score(run)
    expected = torchmetrics_scores(hub_clip, images, prompts)
    assert sum(value > 1 for value in expected) > 2
    assert [row["clip"] for row in read_scores(run).values()] == pytest.approx(expected, rel=1e-4)
    assert out["clip_score"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert out["clip_model"] == f"transformers:{hub_clip.name}, squashed to 299 first"
    plain = clip.ClipScore(model=f"transformers:{hub_clip}", device="cpu").score(run)
    assert plain["clip_score"] != pytest.approx(out["clip_score"], rel=1e-4)  # it would crop instead


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("transformers:nowhere", "neither a folder nor a hub name"),
        ("transformers:nobody/nothing", "not in the local cache and nothing is downloaded"),
        ("transformers:EMPTY", "has no config.json"),
    ],
)
def test_missing_hub_clips_are_reported(tmp_path: Path, model: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        clip.ClipScore(model=model.replace("EMPTY", str(tmp_path))).check()


def test_a_clip_without_all_weights_is_refused(tmp_path: Path, hub_clip: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in hub_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not load \(no text_projection.weight in them\)"):
        clip.load_clip(clip_source.find_source(f"transformers:{tmp_path}", None, False), "cpu")


def test_lantern_s_prefix_tokens_are_those_of_the_prefixed_text() -> None:
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    captions = ["A man rides a horse.", " two dogs\n", "word " * 74, "word " * 75, "word " * 90]
    tokens = tokenizer(captions)
    # eval_fid_clip.py: put the prefix's three tokens after the start token, cut at 77, end with the end token
    prefix = tokenizer("A photo depicts ")[:, 1:4].expand(len(captions), -1)
    theirs = torch.cat([tokens[:, :1], prefix, tokens[:, 1:]], 1)[:, :77]
    theirs[:, 76] = torch.where(theirs[:, 76] > 0, 49407, 0)
    assert torch.equal(tokenizer(["A photo depicts " + text for text in captions]), theirs)
    node = OmegaConf.load(ROOT / "conf" / "evaluation" / "lantern.yaml").metrics.clip
    assert node.prefix == "A photo depicts "


def test_crop_and_prefix_reach_the_clip(tmp_path: Path) -> None:
    images, prompts = smooth_images([(50, 90)] * 3), ["a large red circle", "a small blue square", "three rings"]
    run = a_run(tmp_path, images, prompts)
    settings = {"model": f"local-dir:{clip_source.SHIPPED}", "device": "cpu"}
    out = clip.ClipScore(crop=48, prefix="a small ", **settings).score(run)
    loaded = clip.load_clip(clip_source.find_source(settings["model"], None, False), "cpu")
    squares = [transforms.centre_square(image, 48) for image in images]
    expected = loaded.scores(squares, [f"a small {text}" for text in prompts]).mean().item()
    assert out["clip_score"] == pytest.approx(expected, rel=1e-5)
    assert out["clip_model"] == "local-dir:clip, centre square of 48 first, prefix 'a small '"
    with pytest.raises(UserError, match="exclude each other"):
        clip.ClipScore(crop=1, squash=1)


# ---- rewards


class SmallHps(rewards.HpsV2):
    """HPSv2 with the shipped CLIP in place of ViT-H/14."""

    @property
    def source(self) -> clip_source.ClipSource:
        weights = clip_source.SHIPPED / "open_clip_model.safetensors"
        return clip_source.ClipSource(
            f"local-dir:{clip_source.SHIPPED}", str(weights), (("image_resize_mode", "longest"),)
        )


def test_hpsv2_scales_the_long_side_and_pads(tmp_path: Path) -> None:
    images, prompts = smooth_images([(60, 91)] * 3), ["a large red circle", "a small blue square", "three small rings"]
    run = a_run(tmp_path, images, prompts)
    out = SmallHps(device="cpu").score(run)
    loaded = clip.load_clip(clip_source.find_source("shipped", None, False), "cpu")
    side, normalise = loaded.model.visual.image_size, loaded.preprocess.transforms[-1]
    pixels = []
    for image in images:  # hpsv2's transform.py: ResizeMaxSize on floats
        scale = side / max(image.shape[:2])
        height, width = (round(n * scale) for n in image.shape[:2])
        small = F.resize(torch.tensor(image).permute(2, 0, 1) / 255, [height, width], F.InterpolationMode.BICUBIC)
        rest = side - height, side - width
        pad = [rest[1] // 2, rest[0] // 2, rest[1] - rest[1] // 2, rest[0] - rest[0] // 2]
        pixels.append(normalise(F.pad(small, pad)))
    with torch.no_grad():
        embedded = loaded.model.encode_image(torch.stack(pixels), normalize=True)
    expected = 100 * (embedded * loaded.texts(prompts)).sum(1).clamp_min(0)
    assert expected.max() > 20
    assert [row["hpsv2"] for row in read_scores(run).values()] == pytest.approx(expected.tolist(), abs=0.6)
    assert (loaded.scores(images, prompts) - expected).abs().max() > 2  # CLIP's own preparation would crop
    assert out["hpsv2"] == pytest.approx(expected.mean().item(), abs=0.6)


def test_pickscore_is_the_logit_of_its_clip(tmp_path: Path, hub_clip: Path) -> None:
    images, prompts = smooth_images([(50, 90)] * 2), ["two dogs.", "RAIN"]
    run = a_run(tmp_path, images, prompts)
    metric = rewards.PickScore(weights=str(hub_clip), device="cpu")
    metric.check()
    loaded = clip.load_clip(metric.source, "cpu")
    cosines = (loaded.images(images) * loaded.texts(prompts)).sum(1)
    expected = (loaded.model.logit_scale.exp() * cosines).clamp_min(0)
    values = metric.score(run)
    assert values["pickscore"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert values["pickscore_model"].startswith(f"transformers:{hub_clip.name} ")


# ---- settings


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("coco", f"FID never downloads {features.INCEPTION_FILE}.*extractor.weights=FOLDER"),
        ("sjd", f"FID never downloads {features.PYTORCH_FID_FILE}.*pytorch-fid/releases"),
        ("lantern", f"FID never downloads {features.INCEPTION_FILE}"),
        ("hpsv2", "evaluation.metrics.hpsv2.weights is not set"),
        ("image_reward", "has no package image-reward"),
        ("hpsv3", r"has no package hpsv3: .* pip install hpsv3==1.0.0, .*evaluation.metrics.hpsv3.python="),
        ("vqascore", "has no package t2v-metrics: .*evaluation.metrics.vqascore.python="),
        ("pickscore", "evaluation.metrics.pickscore.weights is not set"),
        ("cmmd", "CMMD needs evaluation.metrics.cmmd.reference=FOLDER"),
    ],
)
def test_protocols_report_what_they_lack_at_once(name: str, says: str) -> None:
    text = (ROOT / "conf" / "evaluation" / f"{name}.yaml").read_text()
    assert f"evaluation={name}" in text.split("metrics:")[0]
    cfg = OmegaConf.create({"device": "cpu", "runs_dir": "runs", "evaluation": OmegaConf.create(text)})
    metrics = {key: instantiate(node) for key, node in cfg.evaluation.metrics.items()}
    assert all(metric.protocol.endswith(".") for metric in metrics.values())
    first = metrics.get("fid") or metrics[name]
    with pytest.raises(UserError, match=says):
        first.check()
