"""Finding and fetching weights: a local folder or file, or a hub id; problems are reported in seconds, with the fix."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from sjd2.errors import UserError
from sjd2.files import find
from sjd2.models.tensors import header_size, read_header, shard_index, shard_names

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/(\S+\.(?:safetensors|ckpt|pth|pt|bin|json))")
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")
TIMEOUT = 10.0  # seconds to wait for the hub's answer
CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # http libraries that versions of the hub's client use


@dataclass(frozen=True)
class WeightSource:
    """Where one part of a model is, and what has to be there.

    where: a local path, a hub id (owner/name), or one file of a hub repository (owner/name/path/file.ckpt). key: the setting
    that names it, e.g. "model.vq_weights". required: files that a folder must hold. patterns: what is fetched from the hub.
    may_be_file: `where` may be one file. file_inside: the one file to take from a hub repository or folder with several.
    subfolder: where in the repository or folder this part lies; `required` and `patterns` are relative to it.
    """

    where: str
    key: str
    required: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ("*.json", "*.safetensors", "*.model", "*.txt")
    revision: str | None = None
    may_be_file: bool = False
    file_inside: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        return f"{self.key}={self.where}"

    @property
    def repository(self) -> str | None:
        """Return the hub id in `where`, None if it cannot be one."""
        match = HUB_ID.fullmatch(self.where) or HUB_FILE.fullmatch(self.where)
        return match and (match[1] if match.re is HUB_FILE else match[0])

    @property
    def file(self) -> str | None:
        """Return the one file to take from the hub repository, None for all that `patterns` name."""
        match = HUB_FILE.fullmatch(self.where)
        return match[2] if match else self.file_inside

    @property
    def wanted(self) -> tuple[str, ...]:
        """Return the patterns of the files to fetch."""
        return (self.file,) if self.file else tuple(map(self.below, self.patterns))

    def below(self, name: str) -> str:
        """Return a name of this part as the repository has it."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def inside(self, root: Path) -> Path:
        """Return the folder of this part in a local copy of the repository."""
        return root / self.subfolder if self.subfolder else root


def locate(source: WeightSource) -> Path:
    """Return the local folder (or file) of a source; fetches from the hub what is not there yet.

    Raises `UserError` if the path is wrong, the hub cannot be reached or refuses access, or a file is missing.
    """
    local = _local(source)
    if local is None:
        check_source(source)
        with _hub_errors(source):
            folder = _snapshot(source)
        local = _chosen(folder, source)
    return local


def check_source(source: WeightSource) -> None:
    """Raise `UserError` if a source is neither here nor can be fetched; asks the hub, fetches nothing."""
    if _local(source) is None:
        _ask_hub(source)


def check_part(source: WeightSource, read: Callable[[Path], object]) -> None:
    """Raise `UserError` if a trained part (adapter, head, corrector) is not there; read: checks its folder's settings."""
    if _only_remote(source):
        check_source(source)
    else:
        read(find(source.where))


def locate_part(source: WeightSource) -> Path:
    """Return the folder of a trained part; fetches it if `where` is a hub id."""
    return locate(source) if _only_remote(source) else find(source.where)


def _only_remote(source: WeightSource) -> bool:
    return source.repository is not None and not find(source.where).exists()


def _snapshot(source: WeightSource, local_files_only: bool = False) -> Path:
    """Return the folder of the hub's client that holds the wanted files; downloads what it lacks."""
    from huggingface_hub import snapshot_download

    assert source.repository is not None
    return Path(
        snapshot_download(
            source.repository,
            revision=source.revision,
            allow_patterns=list(source.wanted),
            local_files_only=local_files_only,
        )
    )


def _local(source: WeightSource) -> Path | None:
    """Return where the source is on this machine, None if it has to be fetched first."""
    path = find(source.where)
    if path.exists():
        return _checked(source.inside(path), source)
    if source.repository is None:
        raise UserError(f"{source} does not exist; give a local folder or a hub id (owner/name).")
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = _snapshot(source, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(
            f"{source} is neither a local path nor a name that the hub allows; give a local folder or a hub id."
        ) from error
    return _chosen(folder, source) if _is_complete(folder, source) else None


def _chosen(snapshot: Path, source: WeightSource) -> Path:
    """Return the file or folder of a hub snapshot that the source names."""
    return snapshot / source.file if source.file else _checked(source.inside(snapshot), source)


def _is_complete(snapshot: Path, source: WeightSource) -> bool:
    """Return whether a cached snapshot holds every file that is asked for, all shards of an index included."""
    if source.file:
        return (snapshot / source.file).is_file()
    folder = source.inside(snapshot)
    if not folder.is_dir():
        return False
    index = shard_index(folder)
    shards = shard_names(index) if index else []
    if not all((folder / name).is_file() for name in (*source.required, *shards)):
        return False
    if not any(pattern.endswith(WEIGHTS) for pattern in source.patterns):
        return True
    return bool(shards) or any(f.suffix in WEIGHTS for f in folder.iterdir())


def _checked(path: Path, source: WeightSource) -> Path:
    """Return the file or folder that an existing path stands for; raises `UserError` if it lacks a file."""
    if source.file_inside and path.is_dir():
        if not (path / source.file_inside).is_file():
            raise UserError(f"{source} has no {source.file_inside}; give the folder or file that has these weights.")
        return path / source.file_inside
    if path.is_file():
        if not source.may_be_file and not source.file_inside:
            raise UserError(f"{source} is a file; give the folder that holds {source.required[0]}.")
        return path
    for name in source.required:
        if not (path / name).is_file():
            raise UserError(f"{source} has no {source.below(name)}, so it is not a folder of these weights.")
    _check_shards(path, source)
    return path


def _check_shards(folder: Path, source: WeightSource) -> None:
    """Raise `UserError` if a shard that an index names is missing, or a safetensors file was cut short."""
    fix = "copy or download it again"
    index = shard_index(folder)
    for name in shard_names(index) if index else []:
        if not (folder / name).is_file():
            raise UserError(f"{source} lacks {name}, which its index names; {fix}.")
    for file in folder.glob("*.safetensors"):
        entries = read_header(file, source.key).items()
        ends = [entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"]
        expected, found = 8 + header_size(file) + max(ends, default=0), file.stat().st_size
        if expected != found:
            raise UserError(f"{source}: {file.name} has {found} bytes instead of {expected}; {fix}.")


@cache
def _ask_hub(source: WeightSource) -> None:
    """Raise `UserError` if the hub cannot be reached, refuses access, lacks the files, or the disk is too small."""
    from huggingface_hub import HfApi, constants

    assert source.repository is not None
    with _hub_errors(source):
        info = HfApi().model_info(source.repository, revision=source.revision, files_metadata=True, timeout=TIMEOUT)
    sizes = {f.rfilename: f.size or 0 for f in info.siblings or []}
    needed = (source.file,) if source.file else map(source.below, source.required)
    lacking = [name for name in needed if name not in sizes]
    if lacking:
        raise UserError(f"{source} has no {lacking[0]} on the hub, so it is not a source of these weights.")
    size = sum(size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in source.wanted))
    cache_folder = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache_folder, *cache_folder.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise UserError(
            f"{source} takes {size / 1e9:.1f} GB of disk and {there} has {free / 1e9:.1f} GB free; make room, or set HF_HOME "
            "to a larger disk."
        )


@contextlib.contextmanager
def _hub_errors(source: WeightSource) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence with the command that fixes it."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{source} is gated: accept its licence on the hub's page of {source.repository}, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{source} is not on the hub, or private; check the name, or run `hf auth login`, or give a local folder."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{source} has no revision '{source.revision}'; leave model.revision=null for the newest."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(
            f"{source} is not on this machine and HF_HUB_OFFLINE is set; unset it, or run {_download(source)}."
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(source) from error
    except Exception as error:
        # the client's own connection errors belong to whichever http library it uses, which is not ours to import
        if type(error).__module__.split(".")[0] in CLIENTS:
            raise _unreachable(source) from error
        raise


def _unreachable(source: WeightSource) -> UserError:
    return UserError(f"{source} is not on this machine and the hub cannot be reached; run {_download(source)}.")


def _download(source: WeightSource) -> str:
    """Return what to do on a machine with a network, as the end of a sentence."""
    command = " ".join(["hf download", str(source.repository), *((source.file,) if source.file else ())])
    return f"`{command}` where there is a network and give {source.key}={'FILE' if source.file else 'FOLDER'}"
