"""Where weights come from: local files, the hub's cache, and one sentence with the fix for everything that goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from baselines.eagle.eagle_drafter import Eagle
from sjd2.models import hub
from sjd2.models.hub import WeightSource, check_source, locate
from sjd2.models.tensors import read_tensors
from tests.helpers.weights import fill, raises_in_one_line

COMMIT = "0123456789012345678901234567890123456789"


def source(where: object, **more: object) -> WeightSource:
    return WeightSource(str(where), "model.weights", **({"required": ("config.json",)} | more))


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client; nothing here may ask the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub._ask_hub.cache_clear()
    return tmp_path / "hub"


def cached(hub_cache: Path, name: str = "owner/name") -> Path:
    """Return the snapshot folder that the hub's client keeps of a repository."""
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def answer(monkeypatch: pytest.MonkeyPatch, reply: Any) -> list[tuple]:
    """Let the hub answer every question with files (name -> size) or an error; returns what it was asked."""
    asked: list[tuple] = []

    def model_info(self: object, repo_id: str, *, revision: str | None = None, **_: object) -> object:
        asked.append((repo_id, revision))
        if isinstance(reply, BaseException):
            raise reply
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in reply.items()])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return asked


# ---- local


def test_a_local_folder_or_file_is_found(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", shards=2)
    assert locate(source(folder)) == folder
    file = folder / "model-0.safetensors"
    assert locate(source(file, required=(), may_be_file=True)) == file
    assert locate(source(folder, file_inside="model-1.safetensors")) == folder / "model-1.safetensors"
    raises_in_one_line(lambda: locate(source(file)), "is a file; give the folder that holds config.json")
    raises_in_one_line(lambda: locate(source(folder, file_inside="vq.ckpt")), r"has no vq\.ckpt")
    raises_in_one_line(lambda: locate(source(folder, required=("tokenizer.json",))), r"has no tokenizer\.json")
    raises_in_one_line(lambda: locate(source(tmp_path / "nope")), "does not exist; give a local folder or a hub id")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model-1.safetensors").unlink(), r"lacks model-1\.safetensors, which its index names"),
        (lambda f: _cut(f / "model-0.safetensors"), "bytes instead of"),
        (
            lambda f: (f / "model-0.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (lambda f: (f / "model-0.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0not json!"), "damaged one"),
        (lambda f: (f / "model-0.safetensors").write_bytes(b""), "damaged one"),
    ],
)
def test_incomplete_downloads_are_refused_before_anything_loads(tmp_path: Path, spoil: Callable, words: str) -> None:
    folder = fill(tmp_path / "model", shards=2)
    spoil(folder)
    raises_in_one_line(lambda: check_source(source(folder)), words)


# ---- the hub


def test_cached_weights_need_no_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, AssertionError("the hub was asked"))
    snapshot = fill(cached(hub_cache), shards=2)
    (snapshot / "tokenizer").mkdir()
    (snapshot / "tokenizer" / "vqgan.ckpt").write_bytes(b"x")
    check_source(source("owner/name"))
    assert locate(source("owner/name")) == snapshot
    one = source("owner/name/tokenizer/vqgan.ckpt", required=(), may_be_file=True)  # one file of a repository
    assert locate(one) == snapshot / "tokenizer" / "vqgan.ckpt"
    assert asked == []


def test_an_unfinished_download_resumes(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot whose index names a shard that is missing does not count as complete."""
    snapshot = fill(cached(hub_cache), shards=2)
    kept = (snapshot / "model-1.safetensors").read_bytes()
    (snapshot / "model-1.safetensors").unlink()
    asked = answer(monkeypatch, {"config.json": 2, "model-0.safetensors": 100, "model-1.safetensors": 100})
    download = huggingface_hub.snapshot_download

    def fetch(repo_id: str, *, local_files_only: bool = False, **settings: object) -> str:
        if not local_files_only:
            (snapshot / "model-1.safetensors").write_bytes(kept)
        return download(repo_id, local_files_only=True, **settings)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert locate(source("owner/name")) == snapshot
    assert asked == [("owner/name", None)]


def test_an_index_of_bin_files_is_ignored_beside_safetensors(tmp_path: Path) -> None:
    """google/flan-t5-xl has both kinds, of which the safetensors alone are fetched, with all .json files."""
    folder = fill(tmp_path / "both", shards=2)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w0": "pytorch_model-1.bin"}}))
    assert locate(source(folder)) == folder
    assert sorted(read_tensors(folder, "model.weights")) == ["w0", "w1"]
    assert hub._is_complete(folder, source("owner/name"))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    raises_in_one_line(lambda: locate(source(folder)), "lacks pytorch_model-1.bin")


def test_only_the_wanted_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, {"config.json": 2, "tokenizer/vqgan.ckpt": 10})
    calls = []

    def fetch(repo_id: str, *, local_files_only: bool = False, **settings: object) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        calls.append((repo_id, settings))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    file = locate(source("owner/name/tokenizer/vqgan.ckpt", required=(), revision="v2"))
    assert file == tmp_path / "tokenizer" / "vqgan.ckpt"
    assert calls == [("owner/name", {"revision": "v2", "allow_patterns": ["tokenizer/vqgan.ckpt"]})]


def _reply(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = httpx.Request("GET", "http://127.0.0.1")
    return kind("refused", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (_reply(errors.GatedRepoError, 403), "is gated: accept its licence .*owner/name, then run `hf auth login`"),
        (_reply(errors.RepositoryNotFoundError, 404), "is not on the hub, or private"),
        (_reply(errors.RevisionNotFoundError, 404), r"no revision 'v9'; leave model\.revision=null"),
        (errors.OfflineModeIsEnabled("offline"), r"HF_HUB_OFFLINE is set; unset it, or run `hf download owner/name`"),
        (_reply(errors.HfHubHTTPError, 503), "cannot be reached; run `hf download owner/name`"),
        (httpx.ConnectError("no route"), r"cannot be reached.* give model\.weights=FOLDER"),
        (httpx.ReadTimeout("slow"), "cannot be reached"),
        (OSError("no name server"), "cannot be reached"),
        ({"README.md": 10}, r"has no config\.json on the hub"),
    ],
)
def test_what_the_hub_refuses_is_reported_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, reply: object, words: str
) -> None:
    answer(monkeypatch, reply)
    raises_in_one_line(lambda: check_source(source("owner/name", revision="v9")), words)


def test_one_file_of_a_repository_is_reported_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, httpx.ConnectError("no route"))
    one = WeightSource("owner/name/vq/vqgan.ckpt", "model.vq_weights", may_be_file=True)
    raises_in_one_line(
        lambda: check_source(one), r"`hf download owner/name vq/vqgan\.ckpt` .*give model\.vq_weights=FILE"
    )
    hub._ask_hub.cache_clear()
    answer(monkeypatch, {"other.ckpt": 3})
    raises_in_one_line(lambda: check_source(one), r"has no vq/vqgan\.ckpt on the hub")


def test_offline_without_replacing_the_client(tmp_path: Path) -> None:
    """conftest sets HF_HUB_OFFLINE; nothing here is replaced."""
    raises_in_one_line(lambda: check_source(source("owner/name")), "HF_HUB_OFFLINE is set")
    raises_in_one_line(lambda: locate(source("owner/name")), "HF_HUB_OFFLINE is set")
    raises_in_one_line(lambda: check_source(source("owner/na..me")), "give a local folder or a hub id")


def test_a_full_disk_is_reported_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {"config.json": 2, "model.safetensors": 14 * 10**9, "other.bin": 10**12})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**9))
    raises_in_one_line(
        lambda: check_source(source("owner/name")),
        r"takes 14\.0 GB of disk and .* has 5\.0 GB free; make room, or set HF_HOME",
    )


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, {"config.json": 2})
    for _ in range(3):
        check_source(source("owner/name"))
    assert len(asked) == 1


def test_a_trained_part_may_lie_on_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE heads, correctors and fine-tunings: by hub id, else their own folder says what it lacks."""
    snapshot = cached(hub_cache, "owner/eagle")
    snapshot.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, snapshot / "eagle.safetensors")
    (snapshot / "eagle.json").write_text("{}")
    described = SimpleNamespace(name="x", layout=SimpleNamespace(vocabulary=100))
    Eagle(weights="owner/eagle").check(described, 60)
    answer(monkeypatch, {"README.md": 1})
    raises_in_one_line(
        lambda: Eagle(weights="owner/other").check(described, 60),
        r"decoder\.drafter\.weights=owner/other has no eagle\.json",
    )
    raises_in_one_line(lambda: Eagle(weights="/nope").check(described, 60), "/nope has no eagle.json")
