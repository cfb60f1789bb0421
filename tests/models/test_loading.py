"""Loading: settings, memory, files that do not fit; tensors read without running code."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sjd2.models import loading
from sjd2.models.kv_cache import cache_argument
from sjd2.models.loading import LoadOptions, load_pretrained
from sjd2.models.tensors import load_exactly, read_tensors, stored_bytes
from tests.helpers.weights import fill, raises_in_one_line

OPTIONS = LoadOptions(weights="w", device=torch.device("cpu"), dtype=torch.float32)


def test_load_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    raises_in_one_line(replace(OPTIONS, quantisation="8bits").check, "did you mean '8bit'")
    raises_in_one_line(replace(OPTIONS, device_map="autos").check, "did you mean 'auto'")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    raises_in_one_line(
        replace(OPTIONS, quantisation="4bit").check, r"needs bitsandbytes: pip install -e '\.\[quantisation\]'"
    )


@pytest.mark.parametrize(
    ("settings", "needed"), [({}, "64.0"), ({"quantisation": "8bit"}, "35.2"), ({"quantisation": "4bit"}, "20.5")]
)
def test_too_little_memory_is_reported(monkeypatch: pytest.MonkeyPatch, settings: dict, needed: str) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda device, everywhere=False: 8e9)
    raises_in_one_line(
        lambda: replace(OPTIONS, **settings).check_memory(64e9),
        rf"model\.weights=w needs {needed} GB in float32 and cpu has 8\.0",
    )
    OPTIONS.check_memory(7e9)


def test_bytes_are_counted_from_the_headers_in_the_dtype_they_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    folder = fill(tmp_path / "model")
    assert stored_bytes(folder, torch.bfloat16) == 16.0
    assert stored_bytes(folder, torch.float64) == 64.0
    assert stored_bytes(folder, torch.float64, ("another.",)) == 0.0
    monkeypatch.setattr(loading, "free_bytes", lambda device, everywhere=False: 31)
    raises_in_one_line(lambda: load_pretrained(LlamaForCausalLM, folder, OPTIONS), "cpu has 0.0 GB free")


def test_files_that_are_not_the_model_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = fill(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}))  # fmt: skip
    raises_in_one_line(
        lambda: load_pretrained(LlamaForCausalLM, folder, OPTIONS),
        "lacks .* of the model's tensors",
    )
    (folder / "model.safetensors").unlink()
    raises_in_one_line(
        lambda: load_pretrained(LlamaForCausalLM, folder, OPTIONS),
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
    raises_in_one_line(
        lambda: read_tensors(tmp_path / "evil.pt", "model.vq_weights"),
        r"model\.vq_weights=.* cannot be read as weights",
    )
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    raises_in_one_line(lambda: read_tensors(tmp_path / "evil.pt", "k"), "cannot be read as weights")
    assert "code was run" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pt")
    raises_in_one_line(lambda: read_tensors(tmp_path / "list.pt", "k"), "holds a list, not named tensors")
    shutil.rmtree(tmp_path / "sharded")
    (tmp_path / "sharded").mkdir()
    raises_in_one_line(lambda: read_tensors(tmp_path / "sharded", "k"), r"holds no \.safetensors file")


def test_tensors_must_match_by_name_and_shape() -> None:
    module = nn.Linear(2, 3)
    load_exactly(module, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "k")
    assert module.weight.sum() == 6
    raises_in_one_line(lambda: load_exactly(module, {"weight": torch.ones(3, 2)}, "k"), "k lacks 'bias'")
    raises_in_one_line(
        lambda: load_exactly(module, {"weight": torch.ones(3, 2), "bias": torch.ones(3), "c": torch.ones(1)}, "k"),
        "unknown 'c'",
    )
    raises_in_one_line(
        lambda: load_exactly(module, {"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "k"), r"has shape \(2, 3\)"
    )


def test_the_cache_goes_to_the_argument_that_this_transformers_has() -> None:
    """Every forward of transformers takes any keywords: a cache under a wrong name would be dropped without a word."""

    class Before(nn.Module):
        def forward(self, x: torch.Tensor, past_key_values: object = None, **more: object) -> None: ...

    class Since(nn.Module):
        def forward(self, x: torch.Tensor, cache: object = None, **more: object) -> None: ...

    class Neither(nn.Module):
        def forward(self, x: torch.Tensor, **more: object) -> None: ...

    assert [cache_argument(each) for each in (Before, Since)] == ["past_key_values", "cache"]
    with pytest.raises(TypeError, match=r"Neither\.forward takes no cache"):
        cache_argument(Neither)
