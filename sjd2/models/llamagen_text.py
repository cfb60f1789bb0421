"""LlamaGen's text encoder: the caption clean-up of its training, then the encoder of flan-T5.

# B prompts, P text tokens, F text features
"""

from __future__ import annotations

import html
import re
from html.entities import html5
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote_plus

import ftfy
import torch
from torch import Tensor

from sjd2.errors import UserError, first_line
from sjd2.models.loading import free_bytes, load_tokenizer
from sjd2.models.tensors import stored_bytes

KEY = "model.text_weights"
_FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+"
)

Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# in the order of clean_caption in LlamaGen's language/t5.py, which follows DeepFloyd IF; the order matters
ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
)
CHARACTERS = _rules(
    (r"@\w+\b", ""),
    (r"[\u31c0-\u9fff]+", ""),  # Chinese and Japanese characters
    (_DASHES, "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean(caption: str) -> str:
    """Clean a caption as the training data was cleaned: lower case, no addresses, markup, shop talk or odd characters."""
    for _ in range(2):  # the reference cleans twice
        caption = _once(caption)
    return caption


def _once(caption: str) -> str:
    caption = _apply(ADDRESSES, unquote_plus(caption).strip().lower())
    caption = _apply(CHARACTERS, _text(caption))
    if len(re.findall("[-_]", caption)) > 3:  # words joined as in a file name
        caption = re.sub("[-_]", " ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return _apply(WORDS, caption).strip()


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


class _Page(HTMLParser):
    """Collect the text of markup as Beautiful Soup's `.text` over html.parser does."""

    HIDDEN: ClassVar[set[str]] = {"script", "style", "template", "rt", "rp"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            self.open.remove(tag)

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.parts.append(data)

    def unknown_decl(self, data: str) -> None:
        if data.lower().startswith("cdata["):
            self.handle_data(data[6:])

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))


def _text(markup: str) -> str:
    if not {"<", "&"} & set(markup):
        return markup
    page = _Page()
    page.feed(markup)
    page.close()
    return "".join(page.parts)


class TextEncoder:
    """The encoder of flan-T5 and its tokenizer; every caption becomes at most `max_tokens` vectors.

    dtype float16 becomes float32: T5 was trained in bfloat16, and its activations overflow in float16.
    """

    def __init__(self, folder: Path, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import T5EncoderModel

        dtype = torch.float32 if dtype == torch.float16 else dtype
        needed, free = stored_bytes(folder, dtype, ("encoder.", "shared.")), free_bytes(device)
        if needed > free:
            raise UserError(
                f"{KEY}={folder} needs {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; use "
                "model.text_device=cpu or a smaller dtype."
            )
        try:
            # Any: the stubs give transformers' own `to` no usable signature
            self.model: Any = T5EncoderModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{KEY}={folder} cannot be loaded: {first_line(error)}") from error
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(folder, KEY)
        self.max_tokens = max_tokens

    @property
    def width(self) -> int:
        """F, the width of the features."""
        return self.model.config.d_model

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts -> features [B, P, F], right-padded, and their lengths [B] (the end token counts)."""
        batch = self.tokenizer(
            [clean(prompt) for prompt in prompts],
            max_length=self.max_tokens,
            truncation=True,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return features, batch["attention_mask"].sum(1)
