"""Lumina-mGPT 2.0 (arXiv 2507.17801): Chameleon's transformer over Qwen's tokens and MoVQGAN's codes, 8 pixels a code.

Prompt: beginning of text, instruction with the size, text, end of turn. Image: start, height, width, rows of codes with an
end of row each, end of image. Ids and prompts as in item_processor.py and inference_solver.py of Alpha-VLLM/Lumina-mGPT-2.0.

# V image vocabulary, F forced ids
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sjd2.errors import UserError
from sjd2.models.base import Condition
from sjd2.models.chameleon import norm_rows
from sjd2.models.hub import WeightSource, locate
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import load_pretrained, load_tokenizer, read_config
from sjd2.models.lumina import CELL, parse_size
from sjd2.models.shared import CodesAmongWords, pad_right
from sjd2.models.spec import ModelSpec

DOWN = 8  # pixels per code, each way
FIRST_CODE = 155000  # the model's id of code 0
START, END, ROW_END = 151665, 151666, 151670
TURN = "<reserved08706>"
NAMES = {START: "<racm3:break>", END: "<eoss>", ROW_END: "<reserved08799>"}
SIDE = 8800  # plus cells: the number in the name of a height's or width's token, which stands for its id in the layout
CODE = "<MOVQGAN"  # how the names of codes begin, where a vocabulary has names for them
LONGEST = 4  # times the shorter side: images of the training were cropped to that
HUB = "Alpha-VLLM/Lumina-mGPT-2.0"
MOVQGAN = "movqgan_270M.ckpt"


@dataclass(frozen=True, kw_only=True)
class Lumina2Spec(ModelSpec):
    """A Lumina-mGPT 2.0 checkpoint, and the size of its images.

    size: side in pixels or WIDTHxHEIGHT. trained_size: side of the square whose area the weights were trained for.
    vq_weights: MoVQGAN's checkpoint, its folder or hub id.
    """

    vq_weights: str
    size: int | str = 768
    trained_size: int = 768

    @property
    def layout(self) -> TokenGrid:
        height, width = cells(self.size, self.trained_size)
        per_cell = CELL // DOWN
        prefix = (START, SIDE + height, SIDE + width)
        return TokenGrid(height * per_cell, width * per_cell, self.vocabulary, prefix, ROW_END, (END,))

    def sources(self) -> list[WeightSource]:
        files = ("config.json", "tokenizer.json", "tokenizer_config.json")
        return [
            WeightSource(self.weights, "model.weights", files, revision=self.revision),
            WeightSource(self.vq_weights, "model.vq_weights", may_be_file=True, file_inside=MOVQGAN),
        ]

    def build(self, device: torch.device, dtype: torch.dtype) -> Lumina2:
        return Lumina2(self, device, dtype)


def cells(size: int | str, trained_size: int) -> tuple[int, int]:
    """Return height and width in cells of 32 pixels. Raises `UserError` for sizes that the model cannot draw."""
    if not isinstance(trained_size, int) or trained_size < CELL or trained_size % CELL:
        raise UserError(
            f"model.trained_size must be a side in multiples of {CELL} pixels, e.g. 768, got {trained_size}."
        )
    width, height = (side // CELL for side in parse_size(size))
    longest, area = LONGEST * min(width, height), (trained_size // CELL) ** 2
    if max(width, height) > longest:
        raise UserError(
            f"model.size={size} is more than {LONGEST} times as long as it is wide, which Lumina-mGPT 2.0 was not "
            f"trained for; use {longest * CELL} pixels at most beside {min(width, height) * CELL}."
        )
    if width * height > area:
        raise UserError(
            f"model.size={size} is larger than the area of {trained_size} x {trained_size} pixels that the weights were "
            "trained for; use a smaller size, or set model.trained_size to that of other weights."
        )
    return height, width


class Lumina2(CodesAmongWords):
    """A loaded Lumina-mGPT 2.0 (contract: `ImageModel`)."""

    spec: Lumina2Spec

    def __init__(self, spec: Lumina2Spec, device: torch.device, dtype: torch.dtype) -> None:
        from sjd2.models.chameleon_lm import ChameleonLM, lm_config
        from sjd2.models.movqgan import MoVQGAN

        folder, movqgan = map(locate, spec.sources())
        settings = read_config(folder, "model.weights", "chameleon", HUB)
        self.spec = spec
        self.tokenizer = load_tokenizer(folder, "model.weights")
        names = self.tokenizer.get_vocab()
        ids, self.begin = self._model_ids(names, settings), self._begin()
        config = lm_config(settings, names, norm_rows(folder, spec.weights))
        # float32 in every dtype; first, since the language model takes minutes and a wrong file shows at once
        self.vq = MoVQGAN.load(movqgan, spec.vocabulary)
        self.full = load_pretrained(ChameleonLM, folder, spec.load_options(device, dtype), config)
        super().__init__(self.full.get_decoder(), spec.layout)
        self.head_module = self.full.lm_head
        self.vq.to(self.device)
        self.first_code = FIRST_CODE
        self.ids = torch.tensor(ids, device=self.device)  # [V + F] the model's id of each local id

    def _model_ids(self, names: dict[str, int], settings: dict[str, object]) -> list[int]:
        """Return the model's id of each local id; raises `UserError` if they are not as expected."""
        spec = self.spec
        codes = list(range(FIRST_CODE, FIRST_CODE + spec.vocabulary))
        vocabulary = settings.get("vocabulary_map")
        table = vocabulary if isinstance(vocabulary, dict) else names
        named = {i for name, i in table.items() if name.startswith(CODE)}
        size = settings.get("vocab_size")
        if (named and not named.issuperset(codes)) or not isinstance(size, int) or codes[-1] >= size:
            raise UserError(
                f"{spec.weights} does not have {spec.vocabulary} image codes from id {FIRST_CODE} on; check model.vocabulary, "
                f"and that the weights are {HUB}."
            )
        wanted = {number: NAMES.get(number, f"<reserved{number:05d}>") for number in spec.layout.forced_ids}
        for number, name in wanted.items():
            found = names.get(name)
            if found is None or (number in NAMES and found != number):
                expected = f" instead of {number}" if number in NAMES else ""
                raise UserError(
                    f"the tokenizer of {spec.weights} has id {found} for {name}{expected}; use weights of model={spec.name}."
                )
        if TURN not in names:
            raise UserError(f"the tokenizer of {spec.weights} has no token {TURN}; use weights of model={spec.name}.")
        return [*codes, *(names[name] for name in wanted.values())]

    def _begin(self) -> int:
        """Return the id that prompts begin with: the beginning of text, else the end. Raises `UserError` without either."""
        tokenizer: Any = self.tokenizer
        found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if found is None:
            raise UserError(
                f"the tokenizer of {self.spec.weights} names neither a bos_token nor an eos_token, which prompts begin with; "
                "check its tokenizer_config.json."
            )
        return found

    def prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """Return the token ids of the conditional prompts; the unconditional one is empty."""
        width, height = parse_size(self.spec.size)
        instruction = f"Generate an image of {width}x{height} according to the following prompt:\n"
        tokenizer: Any = self.tokenizer
        texts = [f"{instruction}{prompt}{TURN}" for prompt in prompts]
        return [[self.begin, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def encode(self, prompts: list[str]) -> Condition:
        """Tokenise and embed both guidance branches; the unconditional one begins with the image's start, at position 0."""
        padded, lengths = pad_right(self.prompt_ids(prompts), self.device)
        table = self.full.get_input_embeddings()
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)  # one row of padding
        return Condition(table(padded), lengths, table(nothing), nothing[0])
