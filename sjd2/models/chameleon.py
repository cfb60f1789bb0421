"""Chameleon models that generate images: the embedded `tiny` and, through the same code, Anole and Lumina-mGPT.

# B samples, R model rows, S slots of a pass, P prompt tokens, V image vocabulary, D width, N image-phase tokens
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sjd2.errors import UserError
from sjd2.files import find
from sjd2.models.base import Condition
from sjd2.models.hub import WeightSource, locate
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import load_pretrained
from sjd2.models.shared import CodesAmongWords, pad_right
from sjd2.models.spec import ModelSpec
from sjd2.models.tensors import stored_shape

BOS = "<s>"  # id 0; the configs of Chameleon, Anole and Lumina-mGPT say 1, which is <pad>
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChameleonSpec(ModelSpec):
    """A Chameleon checkpoint in transformers' layout that generates rows x columns codes.

    vq_weights: VQGAN folder or file. text_weights: tokenizer.json or its folder, unless it is with the weights.
    instruction: text before the prompt. text_end, image_start: tokens after the text and before the image.
    uncond: tokens of the unconditional prompt; () is legal where the first image token is forced (null: [bos, image_start]).
    forced_names: what the vocabulary must call the forced ids, checked on loading.
    """

    vq_weights: str
    rows: int
    columns: int
    text_weights: str | None = None
    instruction: str = ""
    text_end: tuple[str, ...] = ()
    image_start: tuple[str, ...] = ("<racm3:break>",)
    uncond: tuple[str, ...] | None = None
    prefix: tuple[int, ...] = ()
    row_end: int | None = None
    suffix: tuple[int, ...] = ()
    forced_names: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.uncond is not None and not self.uncond and not self.prefix:
            raise UserError(
                "model.uncond=[] leaves nothing before the first image token, so that token must be forced by model.prefix; "
                "set model.uncond=null for [bos, image_start]."
            )

    @property
    def layout(self) -> TokenGrid:
        return TokenGrid(self.rows, self.columns, self.vocabulary, tuple(self.prefix), self.row_end, tuple(self.suffix))

    def sources(self) -> list[WeightSource]:
        text_files = () if self.text_weights else ("tokenizer.json",)
        model = WeightSource(
            self.weights, "model.weights", required=("config.json", *text_files), revision=self.revision
        )
        vq = WeightSource(
            self.vq_weights, "model.vq_weights", patterns=("*.json", "*.safetensors", "*.ckpt"), may_be_file=True
        )
        if self.text_weights is None:
            return [model, vq]
        return [
            model,
            vq,
            WeightSource(self.text_weights, "model.text_weights", may_be_file=True, file_inside="tokenizer.json"),
        ]

    def build(self, device: torch.device, dtype: torch.dtype) -> Chameleon:
        return Chameleon(self, device, dtype)


class Chameleon(CodesAmongWords):
    """A loaded Chameleon text-to-image model (contract: `ImageModel`)."""

    spec: ChameleonSpec

    def __init__(self, spec: ChameleonSpec, device: torch.device, dtype: torch.dtype) -> None:
        from sjd2.models.chameleon_lm import ChameleonLM, lm_config
        from sjd2.models.vqgan import VQGAN

        folder, vq, *text = map(locate, spec.sources())
        self.spec = spec
        self.tokenizer = read_tokenizer(text[0] if text else folder / "tokenizer.json")
        settings = json.loads((folder / "config.json").read_text())
        names = settings.get("vocabulary_map") or self.tokenizer.get_vocab()
        ids = self._model_ids(names)
        config = lm_config(settings, names, norm_rows(folder, spec.weights))
        self.full = load_pretrained(ChameleonLM, folder, spec.load_options(device, dtype), config)
        super().__init__(self.full.get_decoder(), spec.layout)
        self.head_module = self.full.lm_head
        self.vq = VQGAN.load(vq, spec.vocabulary).to(self.device)  # float32 in every dtype
        self.ids = ids.to(self.device)  # [V + F] the model's id of each local id
        self.first_code = int(ids[0])
        self.warned = False

    def _model_ids(self, names: dict[str, int]) -> Tensor:
        """Return the model's id of each local id, by the names in its vocabulary (IMGIMG + digits as letters + Z): [V + F].

        Raises `UserError` if codes or forced tokens are not what the settings say.
        """
        spec, letters = self.spec, str.maketrans("ABCDEFGHIJ", "0123456789")
        codes = {int(name[6:-1].translate(letters)): i for name, i in names.items() if name.startswith("IMGIMG")}
        if sorted(codes) != list(range(spec.vocabulary)):
            raise UserError(
                f"{spec.weights} has {len(codes)} image codes, but model.vocabulary is "
                f"{spec.vocabulary}; set model.vocabulary={len(codes)}."
            )
        ids = [codes[code] for code in range(len(codes))]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise UserError(
                f"the image codes of {spec.weights} are not one range of ids; only checkpoints where they are can be loaded."
            )
        for name, expected in spec.forced_names.items():
            if names.get(name) != expected:
                raise UserError(
                    f"the vocabulary of {spec.weights} has id {names.get(name)} for {name} instead of {expected}; use "
                    f"weights of model={spec.name}."
                )
        return torch.tensor(ids + list(self.spec.layout.forced_ids))

    def token_ids(self, names: tuple[str, ...]) -> list[int]:
        """Look up tokens by name. Raises `UserError` if the tokenizer lacks one."""
        ids = {name: self.tokenizer.token_to_id(name) for name in names}
        known = [token for token in ids.values() if token is not None]
        if len(known) < len(ids):
            lacking = next(name for name, token in ids.items() if token is None)
            raise UserError(f"the tokenizer of {self.spec.name} has no token {lacking}; use one of its family.")
        return known

    def prompt_ids(self, prompts: list[str]) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of the conditional prompts and of the unconditional one, which may be empty."""
        spec = self.spec
        start = self.token_ids(tuple(spec.image_start))
        after, begin = [*self.token_ids(tuple(spec.text_end)), *start], self.token_ids((BOS,))
        encoded = self.tokenizer.encode_batch(
            [spec.instruction + prompt for prompt in prompts], add_special_tokens=False
        )
        nothing = [*begin, *start] if spec.uncond is None else self.token_ids(tuple(spec.uncond))
        return [[*begin, *text.ids, *after] for text in encoded], nothing

    def _unknown_words(self, prompts: list[str]) -> list[str]:
        """Return the words of prompts that the tokenizer has no token for, each once."""
        unk = self.tokenizer.token_to_id("<unk>")
        encoded = self.tokenizer.encode_batch(prompts, add_special_tokens=False)
        found = [
            prompt[start:end]
            for prompt, text in zip(prompts, encoded, strict=True)
            for token, (start, end) in zip(text.ids, text.offsets, strict=True)
            if token == unk
        ]
        return list(dict.fromkeys(found))

    def encode(self, prompts: list[str]) -> Condition:
        """Tokenise and embed both guidance branches; the unconditional one is the same for all prompts."""
        ids, nothing = self.prompt_ids(prompts)
        if not self.warned and (unknown := self._unknown_words(prompts)):
            self.warned = True
            words = f"word{'s' * (len(unknown) > 1)} {', '.join(unknown)}"
            logger.warning(
                "%s does not know the %s (read as <unk>); further ones are not shown.", self.spec.name, words
            )
        padded, lengths = pad_right(ids, self.device)
        table = self.full.get_input_embeddings()
        empty = torch.tensor([nothing or [0]], device=self.device)  # one row of padding where there is no prompt
        return Condition(table(padded), lengths, table(empty), torch.tensor([len(nothing)], device=self.device))


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer.json (or Meta's text_tokenizer.json) as it is: no class may cut text differently or add tokens."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file} cannot be read as a tokenizer.json: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def default_tokenizer(weights: str, elsewhere: str) -> str | None:
    """Return where the tokenizer of `weights` is: None if in their own folder, else `elsewhere`."""
    return None if (find(weights) / "tokenizer.json").is_file() else elsewhere


def norm_rows(folder: Path, weights: str) -> int | None:
    """Return the rows of the query norms in the files, None for one per head; raises `UserError` for any other.

    weights: value of model.weights, for the message.
    """
    shape = stored_shape(folder, "model.layers.0.self_attn.q_norm.weight")
    heads = json.loads((folder / "config.json").read_text()).get("num_attention_heads", 32)
    if shape is None or shape[0] == heads:
        return None
    if shape[0] != 1:
        raise UserError(
            f"model.weights={weights} has query norms for {shape[0]} shards of the heads (a 34B model); only checkpoints "
            "with one norm, or one per head, are supported."
        )
    return 1
