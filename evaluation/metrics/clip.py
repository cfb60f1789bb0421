"""CLIP score through open_clip or transformers: how well an image fits its prompt, 100 max(cos, 0).

Hessel et al. 2021 without their factor w. Protocols also differ in what is done to images and prompts before.

Which CLIP makes it decides the value, so its name stands beside every number. Weights come from a folder, a file or the
hub's local cache; a download happens only with `allow_download=true`, and then before any image is made.

# B images, E embedding width
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.metrics.batches import device_for
from evaluation.metrics.transforms import centre_square, squash
from evaluation.run_folder import Id, Record, Snapshot, record_id
from evaluation.score import Metric, MetricInfo, Scores
from sjd2.errors import UserError, first_line, unknown
from sjd2.files import ROOT, find

log = logging.getLogger(__name__)

SHIPPED = ROOT / "sjd2" / "models" / "tiny" / "weights" / "clip"
CONFIG = "open_clip_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
KEY = "evaluation.metrics.clip"


@dataclass(frozen=True)
class ClipSource:
    """What one CLIP is built from without asking the network: a folder, or a built-in name of open_clip and a file."""

    name: str  # 'local-dir:FOLDER' (open_clip's files), 'transformers:FOLDER', or the name of a built-in architecture
    file: str | None = None
    preprocess: tuple[tuple[str, Any], ...] = ()
    quick_gelu: bool = False


def find_source(model: str, pretrained: str | None, allow_download: bool) -> ClipSource:
    """Find the files of a CLIP: 'shipped', 'local-dir:FOLDER', 'hf-hub:ORG/REPO', or an architecture with `pretrained`.

    'transformers:FOLDER' and 'transformers:ORG/REPO' are loaded by transformers, the others by open_clip.
    pretrained: a tag of open_clip's list or a file. Raises UserError, within a second and offline too, where weights
    are missing or would have to be downloaded: an open_clip model without weights is random and scores noise.
    """
    schema, _, rest = model.partition(":")
    if schema == "transformers":
        return _transformers(rest, allow_download)
    if find_spec("open_clip") is None:
        raise UserError("the CLIP score needs open_clip: pip install open-clip-torch.")
    if model == "shipped":
        return _folder(SHIPPED, "train it: python run.py stage=finetune finetune=clip")
    if schema == "local-dir":
        return _folder(find(rest), f"give {KEY}.model=local-dir:FOLDER as open_clip saves it")
    if schema == "hf-hub":
        path = _hub_folder(
            rest, "hf-hub:", ["*.json", "*.txt", "*.model", "open_clip_model.safetensors"], allow_download
        )
        return _folder(path, f"hf-hub:{rest} holds no open_clip_model.safetensors")
    import open_clip  # takes seconds, so only for names that nothing but its list explains

    if model not in open_clip.list_models():
        error = unknown("CLIP architecture", model, open_clip.list_models())
        raise UserError(
            f"{str(error).split(' Valid: ')[0]} Also: shipped, local-dir:FOLDER, hf-hub:ORG/REPO, "
            "transformers:ORG/REPO."
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not pretrained:
        have = f" one of {', '.join(tags)}, or" if tags else ""
        raise UserError(f"CLIP {model} without weights scores noise: set {KEY}.pretrained to{have} a file.")
    if find(pretrained).is_file():
        return ClipSource(model, str(find(pretrained)))
    if pretrained not in tags:
        raise UserError(f"{KEY}.pretrained={pretrained} is no file and no tag of {model}. Valid: {', '.join(tags)}.")
    return _tagged(model, pretrained, allow_download)


def _folder(path: Path, fix: str) -> ClipSource:
    weights = [file for file in path.glob("*") if file.suffix in WEIGHT_SUFFIXES] if path.is_dir() else []
    if not (path / CONFIG).is_file() or not weights:
        raise UserError(f"{path} has no {CONFIG} with a weights file beside it; {fix}.")
    return ClipSource(f"local-dir:{path}")


def _transformers(where: str, allow_download: bool) -> ClipSource:
    """Find a CLIP in transformers' files: a folder, or a hub repository."""
    path = find(where)
    if not path.is_dir():
        if where.count("/") != 1:
            raise UserError(f"{KEY}.model=transformers:{where} is neither a folder nor a hub name (ORG/REPOSITORY).")
        weights = ["model.safetensors", "pytorch_model.bin"]
        path = _hub_folder(where, "transformers:", ["*.json", "*.txt", *weights], allow_download)
    lacking = [] if (path / "config.json").is_file() else ["config.json"]
    if not any((path / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        lacking.append("preprocessor_config.json")
    if not any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir()):
        lacking.append("model.safetensors")
    if lacking:
        raise UserError(
            f"{path} has no {lacking[0]}; give {KEY}.model=transformers:FOLDER as save_pretrained writes it."
        )
    return ClipSource(f"transformers:{path}")


def _hub_folder(repository: str, schema: str, files: list[str], allow_download: bool) -> Path:
    """Return the cached snapshot of a hub repository; fetch these files of it first where that is allowed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if allow_download:
            log.info("fetching CLIP %s into the Hugging Face cache", repository)
        # repositories often hold the same weights in three more formats
        return Path(snapshot_download(repository, local_files_only=not allow_download, allow_patterns=files))
    except HFValidationError as error:
        raise UserError(f"{KEY}.model={schema}{repository} is no hub name; write {schema}ORG/REPOSITORY.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _not_here(f"{schema}{repository}", allow_download, error) from error


def _tagged(model: str, tag: str, allow_download: bool) -> ClipSource:
    """Return the cached weights file of a built-in tag with the preprocessing it was trained with."""
    import open_clip
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    known = open_clip.get_pretrained_cfg(model, tag)
    repository, _, file = known.get("hf_hub", "").rpartition("/")
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    reason: Exception | None = None
    for name in names if repository else ():
        try:
            path = hf_hub_download(repository, name, local_files_only=not allow_download)
        except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = error
            continue
        names_of = {"mean": "image_mean", "std": "image_std"}
        names_of |= {"interpolation": "image_interpolation", "resize_mode": "image_resize_mode"}
        preprocess = tuple((new, known[old]) for old, new in names_of.items() if known.get(old) is not None)
        return ClipSource(model, path, preprocess, bool(known.get("quick_gelu")))
    # open_clip keeps what it fetched from plain URLs here
    cached = Path("~/.cache/clip").expanduser() / Path(known.get("url", "none")).name
    if not repository and cached.is_file():
        return ClipSource(model, str(cached), quick_gelu=bool(known.get("quick_gelu")))
    raise _not_here(f"{model} {tag}", allow_download and bool(repository), reason)


def _not_here(what: str, tried: bool, error: Exception | None) -> UserError:
    if tried:
        return UserError(f"CLIP {what} could not be fetched ({type(error).__name__}); is there a network?")
    return UserError(
        f"CLIP {what} is not in the local cache and nothing is downloaded silently: set {KEY}.allow_download=true once "
        f"with a network, or give {KEY}.model=local-dir:FOLDER."
    )


class Clip:
    """A loaded CLIP of open_clip: images and texts to unit vectors."""

    # Any: the stubs of both libraries do not know what their factories return
    model: Any
    preprocess: Any
    tokenizer: Any
    processor: Any

    def __init__(self, source: ClipSource, device: str | None = None) -> None:
        """Load model, preprocessing and tokenizer; raises UserError if weights and architecture do not fit."""
        import open_clip

        self.device = device_for(device)
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                source.name,
                pretrained=source.file,
                force_quick_gelu=source.quick_gelu,
                require_pretrained=True,  # else missing weights are a mere warning
                device=self.device,
                **dict(source.preprocess),
            )
            self.tokenizer = open_clip.get_tokenizer(source.name)
        except (RuntimeError, AssertionError, ValueError, KeyError, OSError) as error:
            raise _does_not_load(source.file or source.name, error) from error
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embed images: uint8 [H, W, 3] each -> unit vectors [B, E]."""
        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        return self.model.encode_image(pixels.to(self.device), normalize=True).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed prompts (cut at the model's context length): -> unit vectors [B, E]."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True).float()

    def scores(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> Tensor:
        """Score pairs: -> 100 max(cos, 0), [B]."""
        return 100 * (self.images(images) * self.texts(texts)).sum(1).clamp_min(0)


class TransformersClip(Clip):
    """A loaded CLIP of transformers, used as torchmetrics' CLIPScore uses it (1.9 itself breaks with transformers 5)."""

    def __init__(self, source: ClipSource, device: str | None = None) -> None:
        """Load model and processor; raises UserError if weights are missing or do not fit."""
        from transformers import CLIPModel, CLIPProcessor

        self.device, folder = device_for(device), source.name.partition(":")[2]
        try:
            # missing weights are a mere warning, and random ones score noise
            loader: Any = CLIPModel
            self.model, report = loader.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise _does_not_load(folder, error) from error
        if missing := sorted(report["missing_keys"]):
            raise _does_not_load(folder, ValueError(f"no {missing[0]} in them"))
        self.model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embed images: uint8 [H, W, 3] each -> unit vectors [B, E]."""
        pixels = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in images]
        values = self.processor(images=pixels, return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(values.to(self.device)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed prompts: -> unit vectors [B, E]; what exceeds the context is cut off, the end token with it."""
        found = self.processor(text=list(texts), return_tensors="pt", padding=True)
        context = self.model.config.text_config.max_position_embeddings
        ids, mask = (found[key][:, :context].to(self.device) for key in ("input_ids", "attention_mask"))
        return _unit(self.model.get_text_features(ids, mask))


def load_clip(source: ClipSource, device: str | None = None) -> Clip:
    """Load a CLIP with the library its source is made for."""
    return (TransformersClip if source.name.startswith("transformers:") else Clip)(source, device)


def _unit(features: Any) -> Tensor:
    """Return unit vectors of projected features, which transformers 5 returns as `pooler_output`."""
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features).float(), dim=1)


def _does_not_load(what: str, error: Exception) -> UserError:
    first = first_line(error)
    return UserError(f"CLIP weights {what} do not load ({first}).")


class ClipScore(Metric):
    """Mean CLIP score of a run's images under their prompts.

    crop: side of a centred square that images are cropped and resized to first (LANTERN); squash: side of the square
    that they are squeezed into first (SJD); null: neither. prefix: put before every prompt.
    """

    numbers = (
        MetricInfo(
            name="clip_score",
            title="CLIP score",
            higher_is_better=True,
            per_image="clip",
            source="clip_model",
            source_in_cells=False,  # too long for a cell
        ),
    )
    details = ("clip_model",)

    def __init__(
        self,
        *,
        model: str = "shipped",
        pretrained: str | None = None,
        allow_download: bool = False,
        crop: int | None = None,
        squash: int | None = None,
        prefix: str = "",
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        if crop is not None and squash is not None:
            raise UserError(f"{KEY}.crop={crop} and {KEY}.squash={squash} exclude each other; leave one null.")
        if min(crop or 1, squash or 1, batch_size) < 1:
            raise UserError(f"{KEY}.crop, {KEY}.squash and {KEY}.batch_size must be 1 or more.")
        self.model, self.pretrained, self.allow_download = model, pretrained, allow_download
        self.crop, self.squash, self.prefix = crop, squash, prefix
        self.device, self.batch_size = device, batch_size

    @cached_property
    def source(self) -> ClipSource:
        """The files, found once."""
        return find_source(self.model, self.pretrained, self.allow_download)

    @property
    def label(self) -> str:
        """What metrics.json calls the model and its protocol; folders by name, since their place differs."""
        schema, _, rest = self.model.partition(":")
        if self.model == "shipped":
            name = "shipped (shapes)"
        elif schema == "local-dir" or (schema == "transformers" and find(rest).is_dir()):
            name = f"{schema}:{Path(rest).name}"
        else:
            name = " ".join(filter(None, (self.model, self.pretrained and Path(self.pretrained).name)))
        return ", ".join(filter(None, (name, self._prepared, self.prefix and f"prefix '{self.prefix}'")))

    @property
    def _prepared(self) -> str:
        if self.crop:
            return f"centre square of {self.crop} first"
        return f"squashed to {self.squash} first" if self.squash else ""

    @property
    def protocol(self) -> str:
        """How the value comes about."""
        library = "transformers" if self.model.startswith("transformers:") else "open_clip"
        how = "with the prefix" if self.prefix else "as it stands"
        return (
            f"clip_score: mean over n_images of 100 max(cos, 0) of the image under its prompt {how}, {library} "
            f"{self.label}, then its own preprocessing."
        )

    def check(self) -> None:
        """Raise UserError if library or weights are missing."""
        _ = self.source

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want all images; the shipped CLIP knows the words of the shapes only and does not apply to other prompts."""
        if not run.records or (self.model == "shipped" and not _knows_all(run.records)):
            return None
        self._clip: Clip | None = load_clip(self.source, self.device)
        self._values: dict[Id, float] = {}
        return run.records

    def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
        """Score one batch of pairs."""
        assert self._clip is not None
        texts = [self.prefix + record["prompt"] for record in records]
        values = self._clip.scores([self._prepare(image) for image in images], texts).tolist()
        self._values.update(zip(map(record_id, records), values, strict=True))

    def compute(self, run: Snapshot) -> Scores:
        """Return the mean over images and the name of the CLIP."""
        self._clip = None
        return Scores({"clip_score": fmean(self._values.values()), "clip_model": self.label}, {"clip": self._values})

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        if self.crop:
            return centre_square(image, self.crop)
        return squash(image, self.squash) if self.squash else image


def _knows_all(records: Sequence[Record]) -> bool:
    """Return whether every word of every prompt is in the shipped CLIP's vocabulary."""
    words = json.loads((SHIPPED / "tokenizer.json").read_text())["model"]["vocab"]
    strange = next((word for record in records for word in record["prompt"].split() if word not in words), None)
    if strange:
        log.info("clip: left out, the shipped CLIP does not know %r", strange)
    return strange is None
