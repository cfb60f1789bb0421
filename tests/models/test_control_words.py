"""Words of a prompt that spell a control token become that token, as in the public code; docs/models/ says so for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from sjd2.files import ROOT
from sjd2.models.emu3 import split_as_published
from sjd2.models.llamagen_text import clean
from sjd2.models.loading import load_tokenizer
from tests.helpers import (
    checkpoints_chameleon,
    checkpoints_emu3,
    checkpoints_glm_image,
    checkpoints_janus,
    checkpoints_lumina2,
    checkpoints_simplear,
)

NAMED = "becomes that token"


def pieces(family: str, text: str, folder: Path) -> list[str]:
    """Return the tokens that a family's encode() makes of a text, on the special tokens of the public checkpoint."""
    if family in ("lumina", "anole"):
        return checkpoints_chameleon.tokenizer().encode(text, add_special_tokens=False).tokens
    if family in ("emu3", "glm-image"):
        {"emu3": checkpoints_emu3, "glm-image": checkpoints_glm_image}[family].write_tokenizer(folder, 64)
    else:
        {"janus": checkpoints_janus, "lumina2": checkpoints_lumina2, "simplear": checkpoints_simplear}[
            family
        ].write_tokenizer(folder)
    tokenizer = load_tokenizer(folder, "model.weights")
    if family == "emu3":
        split_as_published(tokenizer)
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("family", "words", "others"),
    [
        ("lumina", ("<image>", "</s>", "<racm3:break>", "<reserved08706>", "IMGIMGAZ"), ("<image_placeholder>",)),
        ("anole", ("<image>", "</s>", "<racm3:break>", "<reserved08706>", "IMGIMGAZ"), ("<image_placeholder>",)),
        ("lumina2", ("<racm3:break>", "<eoss>", "<reserved08706>", "<|endoftext|>"), ("</s>", "<image>")),
        ("emu3", ("<|image start|>", "<|extra_203|>", "<image>", "<|endoftext|>"), ("</s>",)),
        ("glm-image", ("<sop>", "<eop>", "<|endoftext|>", "<|dit_token_0|>"), ("<image>", "</s>")),
        ("janus", ("<begin_of_image>", "<image_placeholder>", "<|User|>"), ("<image>", "</s>")),
        ("simplear", ("<|t2i|>", "<|soi|>", "<|vtokens|>", "<|im_end|>", "<|endoftext|>"), ("<image>", "</s>")),
    ],
)
def test_control_words(family: str, words: tuple[str, ...], others: tuple[str, ...], tmp_path: Path) -> None:
    for word in words:
        assert word in pieces(family, f"a sign with {word} on it", tmp_path)
    for word in others:
        assert word not in pieces(family, f"a sign with {word} on it", tmp_path)
    page = " ".join((ROOT / "docs" / "models" / f"{family}.md").read_text(encoding="utf-8").split())
    assert NAMED in page
    assert all(f"`{word}`" in page for word in words)


@pytest.mark.parametrize("word", ["</s>", "<pad>", "<extra_id_0>"])
def test_llamagen_takes_them_for_mark_up(word: str) -> None:
    assert clean(f"a sign with {word} on it") == "a sign with on it"
    assert "`</s>`" in (ROOT / "docs" / "models" / "llamagen.md").read_text(encoding="utf-8")
