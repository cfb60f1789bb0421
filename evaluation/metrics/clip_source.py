"""Where a CLIP's weights are and how they are to be used, found without asking the network and before any image is made.

A file of weights holds neither its activation nor how images are prepared; the wrong ones score otherwise, without a word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights."""
        if self.file is not None:
            return [Path(self.file)]
        folder = Path(self.name.partition(":")[2])
        found = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        return [file for file in found if file.suffix == ".safetensors"] or found


def find_source(model: str, pretrained: str | None, allow_download: bool) -> ClipSource:
    """Find the files of a CLIP: 'shipped', 'local-dir:FOLDER', 'hf-hub:ORG/REPO', or an architecture with `pretrained`.

    'transformers:FOLDER' and 'transformers:ORG/REPO' are loaded by transformers, the others by open_clip.
    pretrained: a tag of open_clip's list, a file, or TAG:FILE, a file of weights like those of a tag. Raises UserError,
    within a second and offline too, where weights are missing or would have to be downloaded: an open_clip model
    without weights is random and scores noise.
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
        path = hub_folder(
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
        raise UserError(f"CLIP {model} without weights scores noise: set {KEY}.pretrained to{have} TAG:FILE.")
    tag, file = tag_and_file(pretrained)
    if file is not None:
        return _from_file(model, tag, file, tags)
    if pretrained not in tags:
        raise UserError(f"{KEY}.pretrained={pretrained} is no file and no tag of {model}. Valid: {', '.join(tags)}.")
    return _tagged(model, pretrained, allow_download)


def tag_and_file(pretrained: str) -> tuple[str, Path | None]:
    """Split FILE or TAG:FILE; the file is None where there is none of that name."""
    tag, _, rest = pretrained.partition(":")
    if not find(pretrained).is_file() and rest and find(rest).is_file():
        return tag, find(rest)
    return "", find(pretrained) if find(pretrained).is_file() else None


def _from_file(model: str, tag: str, file: Path, tags: Sequence[str]) -> ClipSource:
    """Return a weights file with activation and preprocessing of `tag`, which no file holds.

    Without a tag those that all weights of this architecture share; raises UserError where they differ.
    """
    import open_clip

    known = {name: open_clip.get_pretrained_cfg(model, name) for name in tags}
    if tag and tag not in known:
        raise unknown(f"tag of {model}", tag, tags)
    kinds: dict[ClipSource, str] = {}  # one tag for each way to use such a file
    for name, settings in known.items() if not tag else [(tag, known[tag])]:
        kinds.setdefault(ClipSource(model, str(file), _preprocessing(settings), bool(settings.get("quick_gelu"))), name)
    if len(kinds) > 1:
        examples = [f"{name} ({_in_words(kind)})" for kind, name in kinds.items()]
        raise UserError(
            f"{file} does not say which activation and preprocessing it was trained with, and weights of {model} differ in "
            f"that: set {KEY}.pretrained=TAG:{file} with the tag that it is or was trained like, e.g. {' or '.join(examples)}."
        )
    return next(iter(kinds), ClipSource(model, str(file)))


def _in_words(source: ClipSource) -> str:
    """Describe how weights are used: activation, mean, how images become square."""
    settings = dict(source.preprocess)
    mean = f"mean {settings['image_mean'][0]:.2g}" if "image_mean" in settings else ""
    activation = "QuickGELU" if source.quick_gelu else "GELU"
    return ", ".join(filter(None, (activation, mean, settings.get("image_resize_mode"))))


def _preprocessing(known: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the preprocessing that open_clip's list has for a tag, as keywords of its factory."""
    names_of = {"mean": "image_mean", "std": "image_std"}
    names_of |= {"interpolation": "image_interpolation", "resize_mode": "image_resize_mode"}
    return tuple((new, known[old]) for old, new in names_of.items() if known.get(old) is not None)


def _folder(path: Path, fix: str) -> ClipSource:
    weights = [file for file in path.glob("*") if file.suffix in WEIGHT_SUFFIXES] if path.is_dir() else []
    if not (path / CONFIG).is_file() or not weights:
        raise UserError(f"{path} has no {CONFIG} with a weights file beside it; {fix}.")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        lacking = {"mean", "std"} - (config.get("preprocess_cfg") or {}).keys()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path / CONFIG} cannot be read as open_clip's settings ({first_line(error)}).") from error
    if lacking:  # open_clip would take OpenAI's
        raise UserError(
            f"{path / CONFIG} does not say how images are prepared: add preprocess_cfg with mean and std, as open_clip "
            "saves it."
        )
    return ClipSource(f"local-dir:{path}")


def _transformers(where: str, allow_download: bool) -> ClipSource:
    """Find a CLIP in transformers' files: a folder, or a hub repository."""
    path = find(where)
    if not path.is_dir():
        if where.count("/") != 1:
            raise UserError(f"{KEY}.model=transformers:{where} is neither a folder nor a hub name (ORG/REPOSITORY).")
        weights = ["model.safetensors", "pytorch_model.bin"]
        path = hub_folder(where, "transformers:", ["*.json", "*.txt", *weights], allow_download)
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


def hub_folder(repository: str, schema: str, files: list[str], allow_download: bool, key: str = KEY) -> Path:
    """Return the cached snapshot of a hub repository; fetch these files of it first where that is allowed.

    key: of the settings, for messages.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if allow_download:
            log.info("fetching %s into the Hugging Face cache", repository)
        # repositories often hold the same weights in three more formats
        return Path(snapshot_download(repository, local_files_only=not allow_download, allow_patterns=files))
    except HFValidationError as error:
        raise UserError(f"{key}.model={schema}{repository} is no hub name; write {schema}ORG/REPOSITORY.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _not_here(f"{schema}{repository}", allow_download, error, key) from error


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
        return ClipSource(model, path, _preprocessing(known), bool(known.get("quick_gelu")))
    # open_clip keeps what it fetched from plain URLs here
    cached = Path(os.path.expanduser("~/.cache/clip")) / Path(known.get("url", "none")).name
    if not repository and cached.is_file():
        return ClipSource(model, str(cached), _preprocessing(known), bool(known.get("quick_gelu")))
    raise _not_here(f"{model} {tag}", allow_download and bool(repository), reason)


def _not_here(what: str, tried: bool, error: Exception | None, key: str = KEY) -> UserError:
    network = "CLIP" if key == KEY else "network"
    if tried:
        return UserError(f"{network} {what} could not be fetched ({type(error).__name__}); is there a network?")
    return UserError(
        f"{network} {what} is not in the local cache and nothing is downloaded silently: set {key}.allow_download=true "
        f"once with a network, or give {key}.model={'local-dir:' * (key == KEY)}FOLDER."
    )
