"""Where weights come from: local files, the hub's cache, and one sentence with the mend for all that goes wrong."""

from __future__ import annotations

import json
import pickle
import shutil
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
from torch import nn

from baselines.eagle.eagle_drafter import Eagle
from sjd2.errors import UserError
from sjd2.models import weights
from sjd2.models.base import ModelSpec
from sjd2.models.weights import Source, check_loading, check_memory, fit, locate, pretrained, reach, read_tensors

COMMIT = "0123456789012345678901234567890123456789"
CPU = torch.device("cpu")


def source(where: object, **more: object) -> Source:
    return Source(str(where), "model.weights", **({"files": ("config.json",)} | more))


def spec(where: object, **more: object) -> ModelSpec:
    return ModelSpec(name="x", weights=str(where), vocabulary=8, **more)


def told(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def fill(folder: Path, *, shards: int = 1) -> Path:
    """Write a config and weights, sharded with an index if `shards` is more than 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = ["model.safetensors"] if shards == 1 else [f"model-{i}.safetensors" for i in range(shards)]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.full((4, 2), float(number))}, folder / name)
    if shards > 1:
        weight_map = {f"w{number}": name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client; nothing here may ask the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    weights._ask_hub.cache_clear()
    return tmp_path / "hub"


def cached(hub: Path, name: str = "owner/name") -> Path:
    """Return the snapshot folder that the hub's client keeps of a repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
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


def test_a_folder_and_a_file_are_found_where_they_lie(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", shards=2)
    assert locate(source(folder)) == folder
    file = folder / "model-0.safetensors"
    assert locate(source(file, files=(), single=True)) == file
    assert locate(source(folder, inside="model-1.safetensors")) == folder / "model-1.safetensors"
    told(lambda: locate(source(file)), "is a file; give the folder that holds config.json")
    told(lambda: locate(source(folder, inside="vq.ckpt")), r"has no vq\.ckpt")
    told(lambda: locate(source(folder, files=("tokenizer.json",))), r"has no tokenizer\.json")
    told(lambda: locate(source(tmp_path / "nope")), "does not exist; give a local folder or a hub id")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model-1.safetensors").unlink(), r"lacks model-1\.safetensors, which its index names"),
        (lambda f: _cut(f / "model-0.safetensors"), "bytes and should have"),
        (
            lambda f: (f / "model-0.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (lambda f: (f / "model-0.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0not json!"), "damaged one"),
        (lambda f: (f / "model-0.safetensors").write_bytes(b""), "damaged one"),
    ],
)
def test_incomplete_downloads_are_told_before_anything_loads(tmp_path: Path, spoil: Callable, words: str) -> None:
    folder = fill(tmp_path / "model", shards=2)
    spoil(folder)
    told(lambda: reach(source(folder)), words)


# ---- the hub


def test_what_is_cached_needs_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, AssertionError("the hub was asked"))
    snapshot = fill(cached(hub), shards=2)
    (snapshot / "tokenizer").mkdir()
    (snapshot / "tokenizer" / "vqgan.ckpt").write_bytes(b"x")
    reach(source("owner/name"))
    assert locate(source("owner/name")) == snapshot
    one = source("owner/name/tokenizer/vqgan.ckpt", files=(), single=True)  # one file of a repository
    assert locate(one) == snapshot / "tokenizer" / "vqgan.ckpt"
    assert asked == []


def test_an_unfinished_download_goes_on(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot whose index names a shard that is not there yet is not taken for whole."""
    snapshot = fill(cached(hub), shards=2)
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


def test_an_index_of_bin_files_says_nothing_beside_safetensors(tmp_path: Path) -> None:
    """google/flan-t5-xl has both kinds, of which the safetensors alone are fetched, with all .json files."""
    folder = fill(tmp_path / "both", shards=2)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w0": "pytorch_model-1.bin"}}))
    assert locate(source(folder)) == folder
    assert sorted(read_tensors(folder, "model.weights")) == ["w0", "w1"]
    assert weights._complete(folder, source("owner/name"))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    told(lambda: locate(source(folder)), "lacks pytorch_model-1.bin")


def test_only_the_wanted_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, {"config.json": 2, "tokenizer/vqgan.ckpt": 10})
    calls = []

    def fetch(repo_id: str, *, local_files_only: bool = False, **settings: object) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        calls.append((repo_id, settings))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    file = locate(source("owner/name/tokenizer/vqgan.ckpt", files=(), revision="v2"))
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
def test_a_hub_that_refuses_is_told_with_the_mend(monkeypatch: pytest.MonkeyPatch, reply: object, words: str) -> None:
    answer(monkeypatch, reply)
    told(lambda: reach(source("owner/name", revision="v9")), words)


def test_one_file_of_a_repository_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, httpx.ConnectError("no route"))
    one = Source("owner/name/vq/vqgan.ckpt", "model.vq_weights", single=True)
    told(lambda: reach(one), r"`hf download owner/name vq/vqgan\.ckpt` .*give model\.vq_weights=FILE")
    weights._ask_hub.cache_clear()
    answer(monkeypatch, {"other.ckpt": 3})
    told(lambda: reach(one), r"has no vq/vqgan\.ckpt on the hub")


def test_offline_the_client_itself_is_told(tmp_path: Path) -> None:
    """conftest sets HF_HUB_OFFLINE; nothing here is replaced."""
    told(lambda: reach(source("owner/name")), "HF_HUB_OFFLINE is set")
    told(lambda: locate(source("owner/name")), "HF_HUB_OFFLINE is set")
    told(lambda: reach(source("owner/na..me")), "give a local folder or a hub id")


def test_a_disk_that_is_too_small_is_told_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {"config.json": 2, "model.safetensors": 14 * 10**9, "other.bin": 10**12})
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**9))
    told(
        lambda: reach(source("owner/name")),
        r"takes 14\.0 GB of disk and .* has 5\.0 GB free; make room, or set HF_HOME",
    )


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, {"config.json": 2})
    for _ in range(3):
        reach(source("owner/name"))
    assert len(asked) == 1


def test_a_trained_part_may_lie_on_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE heads, correctors and fine-tunings: by hub id, else their own folder says what it lacks."""
    snapshot = cached(hub, "owner/eagle")
    snapshot.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, snapshot / "eagle.safetensors")
    (snapshot / "eagle.json").write_text("{}")
    described = SimpleNamespace(name="x", layout=SimpleNamespace(vocabulary=100))
    Eagle(weights="owner/eagle").check(described, 60)
    answer(monkeypatch, {"README.md": 1})
    told(
        lambda: Eagle(weights="owner/other").check(described, 60),
        r"decoder\.drafter\.weights=owner/other has no eagle\.json",
    )
    told(lambda: Eagle(weights="/nope").check(described, 60), "/nope has no eagle.json")


# ---- loading


def test_settings_of_loading_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    told(lambda: check_loading("8bits", None), "did you mean '8bit'")
    told(lambda: check_loading(None, "autos"), "did you mean 'auto'")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told(lambda: check_loading("4bit", None), r"needs bitsandbytes: pip install -e '\.\[quantisation\]'")


@pytest.mark.parametrize(
    ("settings", "need"), [({}, "64.0"), ({"quantisation": "8bit"}, "35.2"), ({"quantisation": "4bit"}, "20.5")]
)
def test_a_memory_that_is_too_small_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, need: str
) -> None:
    """Counted from the headers of the files, in the dtype that they will have."""
    folder = fill(tmp_path / "model")
    monkeypatch.setattr(weights, "stored_bytes", lambda _folder, dtype: 16e9 * dtype.itemsize)
    monkeypatch.setattr(weights, "free_bytes", lambda device, everywhere=False: 8e9)
    told(
        lambda: check_memory(folder, spec(folder, **settings), CPU, torch.float32),
        rf"needs {need} GB in float32 and cpu has 8\.0",
    )
    monkeypatch.undo()
    assert weights.stored_bytes(folder, torch.bfloat16) == 16.0
    assert weights.stored_bytes(folder, torch.float64) == 64.0
    assert weights.stored_bytes(folder, torch.float64, ("another.",)) == 0.0
    check_memory(folder, spec(folder), CPU, torch.float32)


def test_files_that_are_no_model_are_told(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = fill(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}))  # fmt: skip
    told(
        lambda: pretrained(LlamaForCausalLM, folder, spec(folder), CPU, torch.float32),
        "lacks .* of the model's tensors",
    )
    (folder / "model.safetensors").unlink()
    told(
        lambda: pretrained(LlamaForCausalLM, folder, spec(folder), CPU, torch.float32),
        r"model\.weights=.* cannot be loaded",
    )


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code was run",))


def test_tensors_are_read_without_running_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    for wrap in (lambda t: t, lambda t: {"model": t, "step": 3}, lambda t: {"state_dict": t | {"note": "x"}}):
        torch.save(wrap(tensors), tmp_path / "w.pt")
        assert read_tensors(tmp_path / "w.pt", "k").keys() == tensors.keys()
    save_file(tensors, tmp_path / "w.safetensors")
    assert torch.equal(read_tensors(tmp_path / "w.safetensors", "k")["a"], tensors["a"])
    assert set(read_tensors(fill(tmp_path / "sharded", shards=3), "k")) == {"w0", "w1", "w2"}
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    told(
        lambda: read_tensors(tmp_path / "evil.pt", "model.vq_weights"),
        r"model\.vq_weights=.* cannot be read as weights",
    )
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    told(lambda: read_tensors(tmp_path / "evil.pt", "k"), "cannot be read as weights")
    assert "code was run" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pt")
    told(lambda: read_tensors(tmp_path / "list.pt", "k"), "holds a list, not named tensors")
    shutil.rmtree(tmp_path / "sharded")
    (tmp_path / "sharded").mkdir()
    told(lambda: read_tensors(tmp_path / "sharded", "k"), r"holds no \.safetensors file")


def test_tensors_fit_by_name_and_shape() -> None:
    module = nn.Linear(2, 3)
    fit(module, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "k")
    assert module.weight.sum() == 6
    told(lambda: fit(module, {"weight": torch.ones(3, 2)}, "k"), "lack 'bias'")
    told(
        lambda: fit(module, {"weight": torch.ones(3, 2), "bias": torch.ones(3), "c": torch.ones(1)}, "k"), "unknown 'c'"
    )
    told(lambda: fit(module, {"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "k"), r"has shape \(2, 3\)")
