"""Train the two small networks that judge images of the embedded model: the caption verifier and a CLIP.

    python run.py stage=finetune finetune=attributes
    python run.py stage=finetune finetune=clip

Half of what they see are VQ reconstructions, since all images that they will judge come out of the VQ.

# B images of a batch, N images of a pool, A attributes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.metrics.alignment import AttributeFeatures, AttributeNet, chance, labels, shares
from evaluation.metrics.features import extract, save_npz
from sjd2.errors import UserError
from sjd2.files import find
from sjd2.finetune.recipe import Training, TrainRecipe
from sjd2.finetune.trainer import Metrics, Piece, step_rng
from sjd2.models.tiny import scenes
from sjd2.models.vqgan import VQGAN

VQ = Path(scenes.__file__).parent / "weights" / "vq"
CLIP_CONFIG = "open_clip_config.json"
UNIT_IMAGES = 4000  # rendered training images that set the scale of the features
VALIDATION = 10_000  # added to the seed for images that are only measured


# -------------------------------------------------------------------------------------------------------------- images
def draw(drawn: Sequence[scenes.Scene], seed: int) -> Tensor:
    """Render scenes: -> uint8 [N, 3, 48, 48]."""
    return torch.from_numpy(scenes.render(drawn, seed)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def reconstruct(vq: VQGAN, images: Tensor, batch_size: int = 32) -> Tensor:
    """Send images through the tokeniser and back: uint8 [N, 3, H, W] -> the same shape."""
    device = vq.codebook.device
    return torch.cat([vq.decode(vq.encode(b.to(device) / 127.5 - 1)).cpu() for b in images.split(batch_size)])


def load_vq(path: str | None, device: torch.device | str) -> VQGAN:
    """Load a tokeniser folder, the shipped one by default; raises UserError if it is not there."""
    try:
        return VQGAN.load(find(path) if path else VQ).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error} Train it first: python run.py stage=finetune finetune=vq.") from error


@dataclass
class Pool:
    """N training images and their captions; every second image is a VQ reconstruction."""

    images: Tensor  # uint8 [N, 3, 48, 48]
    captions: list[str]

    @classmethod
    def make(cls, n: int, seed: int, vq: VQGAN) -> Pool:
        """Render n training scenes and reconstruct the odd ones."""
        drawn = scenes.training(n, seed)
        images = draw(drawn, seed)
        images[1::2] = reconstruct(vq, images[1::2])
        return cls(images, [scenes.caption(scene) for scene in drawn])

    def pick(self, seed: int, step: int, size: int) -> np.ndarray:
        """Choose the images of one step: -> [B] numbers without repeats."""
        return step_rng(seed, step).choice(len(self.images), size, replace=False)


def held_out_images(n: int, seed: int, vq: VQGAN) -> tuple[Tensor, Tensor, list[str]]:
    """Draw n scenes with captions that training never saw -> images, their reconstructions, captions."""
    drawn = scenes.held_out(n, seed + VALIDATION)
    images = draw(drawn, seed + VALIDATION)
    return images, reconstruct(vq, images), [scenes.caption(scene) for scene in drawn]


# ---------------------------------------------------------------------------------------------------------- attributes
@dataclass(kw_only=True)
class JudgeRecipe(TrainRecipe):
    """A training on a pool of captioned images.

    pictures: images of the pool. validation_pictures: held-out images. vq_weights: a tokeniser folder (None: the shipped
    one). lr, weight_decay: AdamW.
    """

    lr: float
    weight_decay: float
    pictures: int
    validation_pictures: int
    vq_weights: str | None = None


@dataclass(kw_only=True)
class TrainAttributes(JudgeRecipe):
    """Train the caption verifier.

    The result is config.json, attributes.safetensors and reference.npz: the features of rendered held-out images for FID,
    and what the verifier scores on real, reconstructed and mismatched images.
    """

    reference_pictures: int

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        fid = f"fid.extractor.weights={result} evaluation.metrics.fid.reference={result}/reference.npz"
        return f"evaluation.metrics.alignment.weights={result} evaluation.metrics.{fid}"

    def build_training(self, model: None, *, out: Path, device: str, seed: int) -> Training:
        """Build a verifier; its metrics are the shares of right attributes on held-out images."""
        vq = load_vq(self.vq_weights, device)
        pool = Pool.make(self.pictures, seed, vq)
        target = labels(pool.captions)
        network = AttributeNet().to(device).to(memory_format=torch.channels_last).train()
        real, coded, captions = held_out_images(self.validation_pictures, seed, vq)
        wanted = labels(captions)

        def loss(step: int) -> Piece:
            chosen = pool.pick(seed, step, self.batch_size)
            images = pool.images[chosen].to(device, memory_format=torch.channels_last)
            truth = target[chosen].to(device)
            scores = network(images)
            losses = [F.cross_entropy(row.float(), truth[:, k]) for k, row in enumerate(scores)]
            right = torch.stack([row.argmax(1) == truth[:, k] for k, row in enumerate(scores)])
            return sum(losses, torch.zeros((), device=device)), {"right": right.float().mean()}

        def finish(folder: Path) -> Metrics:
            network.eval().set_units(pool.images[::2][:UNIT_IMAGES])
            network.save(folder)
            metrics = measure(AttributeNet.load(folder, device), real, coded, wanted)
            write_reference(folder, metrics, n=self.reference_pictures, seed=seed, device=device)
            return metrics

        return Training(
            module=network,
            optimizers=[torch.optim.AdamW(network.parameters(), self.lr, weight_decay=self.weight_decay)],
            loss=loss,
            validate=lambda: measure(network, real, coded, wanted),
            finish=finish,
        )


@torch.no_grad()
def predict(network: AttributeNet, images: Tensor, batch_size: int = 128) -> Tensor:
    """Read the attributes of many images in evaluation mode: uint8 [N, 3, 48, 48] -> int64 [N, A]."""
    training, device = network.training, network.heads.weight.device
    network.eval()
    found = torch.cat([network.predict(batch.to(device)).cpu() for batch in images.split(batch_size)])
    network.train(training)
    return found


def measure(network: AttributeNet, real: Tensor, coded: Tensor, target: Tensor) -> dict[str, float]:
    """Score the verifier on images and their reconstructions [N, 3, 48, 48] with true classes [N, A]."""
    metrics: Metrics = {"n": len(target)}
    for name, images in (("real", real), ("ceiling", coded)):
        found = predict(network, images)
        share, complete = shares(found, target)
        metrics |= {f"alignment_{name}": share.double().mean().item()}
        metrics |= {f"alignment_all_{name}": complete.double().mean().item()}
    by_chance = chance(predict(network, real), target)
    return metrics if by_chance is None else metrics | {"alignment_chance_real": by_chance}


def write_reference(folder: Path, metrics: Metrics, *, n: int, seed: int, device: str) -> None:
    """Write reference.npz: the features of n rendered held-out scenes, and the verifier's metrics.

    The scenes are drawn apart from those of `prompts=shapes`: images of the same prompts would be closer to a run
    than an independent draw is, and the unbiased KID of a perfect run would be below zero.
    """
    extractor = AttributeFeatures(weights=str(folder), device=device)
    drawn = scenes.held_out(n, seed + 2 * VALIDATION)
    features = extract(extractor, scenes.render(drawn, seed + 2 * VALIDATION)).astype(np.float16)
    arrays = {"features": features, "digest": extractor.digest(), "alignment": json.dumps(metrics)}
    name = f"rendered held-out shapes ({n} images, seed {seed})"
    save_npz(folder / "reference.npz", arrays | {"name": name, "n": n, "seed": seed})


# ---------------------------------------------------------------------------------------------------------------- CLIP
@dataclass(kw_only=True)
class TrainClip(JudgeRecipe):
    """Train a small CLIP of an open_clip architecture of its own, with open_clip's loss.

    The result is in open_clip's `local-dir:` form: open_clip_config.json, open_clip_model.safetensors and a tokenizer of
    the grammar's words (the usual 49,408 words would make up most of the file).
    """

    image_size: int
    image_width: int
    text_width: int
    text_layers: int
    embed_dim: int

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        return f"evaluation.metrics.clip.model=local-dir:{result}"

    def build_training(self, model: None, *, out: Path, device: str, seed: int) -> Training:
        """Build a CLIP, written to out/final/ at each validation; its metrics are its scores on held-out images."""
        import open_clip

        from evaluation.metrics.clip import Clip
        from evaluation.metrics.clip_source import ClipSource

        vq, final, config = load_vq(self.vq_weights, device), out / "final", self.architecture()
        write_settings(final, config)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{final}")
        pool = Pool.make(self.pictures, seed, vq)
        pixels, words = enlarge(pool.images, self.image_size), tokenizer(pool.captions)
        _, coded, captions = held_out_images(self.validation_pictures, seed, vq)
        network = open_clip.CLIP(**config["model_cfg"]).to(device).train()
        contrast = open_clip.ClipLoss()

        def loss(step: int) -> Piece:
            chosen = pool.pick(seed, step, self.batch_size)
            image = network.encode_image(pixels[chosen].to(device) / 127.5 - 1, normalize=True).float()
            text = network.encode_text(words[chosen].to(device), normalize=True).float()
            found = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
            return contrast(image, text, network.logit_scale.exp()), {"found": found.float().mean()}

        def after_step(done: int) -> None:
            with torch.no_grad():
                network.logit_scale.clamp_(0, float(np.log(100)))  # CLIP's own bound

        def finish(folder: Path) -> Metrics:
            self.export(network, folder)
            return measure_clip(Clip(ClipSource(f"local-dir:{folder}"), device), coded, captions, seed)

        optimizer = torch.optim.AdamW(network.parameters(), self.lr, (0.9, 0.98), weight_decay=self.weight_decay)
        return Training(
            module=network,
            optimizers=[optimizer],
            loss=loss,
            validate=lambda: finish(final),
            finish=finish,
            after_step=after_step,
        )

    def architecture(self) -> dict[str, Any]:
        """Describe the model as open_clip does: a ResNet with attention pooling, a transformer over the words."""
        vision = {"image_size": self.image_size, "layers": [1, 1, 1, 1], "width": self.image_width, "head_width": 64}
        text = {"context_length": 24, "vocab_size": len(scenes.WORDS) + 4, "width": self.text_width}
        text |= {"heads": self.text_width // 32, "layers": self.text_layers}
        text |= {"hf_tokenizer_name": "tokenizer.json"}  # any name: in a local-dir open_clip takes the folder's own
        half = [0.5, 0.5, 0.5]
        preprocess = {"size": [self.image_size, self.image_size], "mean": half, "std": half, "interpolation": "bicubic"}
        model = {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text}
        return {"model_cfg": model, "preprocess_cfg": preprocess}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the weights in half precision."""
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "open_clip_model.safetensors")


def write_settings(folder: Path, config: dict[str, Any]) -> None:
    """Write what open_clip reads beside the weights: the architecture and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CLIP_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    write_tokenizer(folder, config["model_cfg"]["text_cfg"]["context_length"])


def write_tokenizer(folder: Path, context: int) -> None:
    """Write a Hugging Face tokenizer of whole words; <end> has the highest number, where CLIP's text tower looks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<unk>", "<start>", *scenes.WORDS, "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, words.index(word)) for word in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "pad_token": "<pad>"}
    settings |= {"unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def enlarge(images: Tensor, size: int) -> Tensor:
    """Resize as the saved preprocessing does, with PIL's bicubic filter: uint8 [N, 3, H, W] -> [N, 3, size, size]."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    resized = (np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BICUBIC)) for a in arrays)
    return torch.from_numpy(np.stack(list(resized))).permute(0, 3, 1, 2).contiguous()


def changed(caption: str, rng: np.random.Generator) -> str:
    """Give one attribute that the caption names another value: the hardest wrong captions there are."""
    named = scenes.attributes(caption)
    free = [name for name, value in named.items() if value != "none"]
    while True:
        name = free[rng.integers(len(free))]
        others = [value for value in scenes.ATTRIBUTES[name] if value not in ("none", named[name])]
        if others:  # `grainy` has no other value
            wrong = scenes.Scene(**named | {name: others[rng.integers(len(others))]})
            return scenes.caption(wrong)


def measure_clip(clip: Any, images: Tensor, captions: list[str], seed: int) -> dict[str, float]:
    """Score a CLIP on images [N, 3, H, W] and their captions.

    score: mean CLIP score; score_other: under another image's caption; found: share of captions that find their
    image among 100; told_apart: share of images that prefer their caption to one with a single word changed.
    """
    rng = np.random.default_rng(seed)
    arrays = list(images.permute(0, 2, 3, 1).numpy())
    image = torch.cat([clip.images(arrays[i : i + 100]) for i in range(0, len(arrays), 100)])
    text, wrong = clip.texts(captions), clip.texts([changed(caption, rng) for caption in captions])
    own = (image * text).sum(1)
    blocks = [text[i : i + 100] @ image[i : i + 100].T for i in range(0, len(captions), 100)]
    found = torch.cat([block.argmax(1) == torch.arange(len(block), device=block.device) for block in blocks])
    return {
        "n": len(captions),
        "score": 100 * own.clamp_min(0).mean().item(),
        "score_other": 100 * (image * text.roll(1, 0)).sum(1).clamp_min(0).mean().item(),
        "found": found.float().mean().item(),
        "told_apart": (own > (image * wrong).sum(1)).float().mean().item(),
    }
