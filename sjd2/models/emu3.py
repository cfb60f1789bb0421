"""Emu3-Gen: one Llama-like model over text and image tokens; an image is rows of codes, each with a row end.

Prompts, sizes and forced tokens are those of processing_emu3.py and utils_emu3.py in baaivision/Emu3; the classes are
transformers' own.

# B samples, S slots of a pass, P prompt tokens, V image vocabulary, C width of a code, D width, N image-phase tokens
# H x W pixels, h x w codes
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2.errors import UserError, choose
from sjd2.models.base import Condition
from sjd2.models.hub import WeightSource, locate
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import load_pretrained, load_tokenizer, read_config
from sjd2.models.shared import CodesAmongWords, pad_right, to_bytes
from sjd2.models.spec import ModelSpec
from sjd2.models.tensors import load_exactly

if TYPE_CHECKING:
    from transformers import Emu3VQVAE, Emu3VQVAEConfig, PreTrainedTokenizerFast

DOWN = 8  # pixels per code, each way
POSITIONS = 9216  # what the position table was trained on: prompt and image
BOS, START, IMAGE = "<|extra_203|>", "<|image start|>", "<|image token|>"  # BOS text START h*w IMAGE codes
ROW_END, FRAME_END, END, EOS = "<|extra_200|>", "<|extra_201|>", "<|image end|>", "<|extra_204|>"
# image_generation.py in baaivision/Emu3: appended to every prompt, and the text of the unconditional branch
POSITIVE = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
# tokenization_emu3.py in baaivision/Emu3: the pieces within which byte pairs are merged. transformers' conversion has GPT-2's
# instead, which splits the mark from the word after it: "old", "-", "fashioned" for "old", "-fashioned"
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Emu3Spec(ModelSpec):
    """An Emu3-Gen checkpoint in transformers' layout, and the size of its images.

    size: side in pixels or WIDTHxHEIGHT. positive: appended to each prompt; negative: text of the unconditional branch.
    words: how text is split before it becomes tokens, `original` or `converted`. row_end, suffix: ids of the forced tokens.
    """

    size: int | str = 720
    positive: str = POSITIVE
    negative: str = NEGATIVE
    words: str = "original"
    row_end: int = 151846
    suffix: tuple[int, ...] = (151847, 151853, 151850)

    def __post_init__(self) -> None:
        choose("model.words", self.words, ("original", "converted"))

    @property
    def layout(self) -> TokenGrid:
        return TokenGrid(*grid(self.size), self.vocabulary, (), self.row_end, tuple(self.suffix))

    def sources(self) -> list[WeightSource]:
        return [WeightSource(self.weights, "model.weights", ("config.json", "tokenizer.json"), revision=self.revision)]

    def build(self, device: torch.device, dtype: torch.dtype) -> Emu3:
        return Emu3(self, device, dtype)


def grid(size: int | str) -> tuple[int, int]:
    """Return the codes (rows, columns) of an image. Raises `UserError` for sizes that the model cannot generate."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", str(size))
    width, height = (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)
    if min(width, height) < DOWN or width % DOWN or height % DOWN:
        raise UserError(
            f"model.size must be a side or WIDTHxHEIGHT in multiples of {DOWN} pixels, e.g. 720 or 960x544, got {size}."
        )
    rows, columns = height // DOWN, width // DOWN
    length = rows * (columns + 1) + 3
    if length > POSITIONS:
        raise UserError(
            f"model.size={size} takes {length} tokens, more than the {POSITIONS} positions of Emu3; use a smaller size, "
            "760 at most for a square."
        )
    return rows, columns


def split_as_published(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make a tokenizer split text as Emu3's own does, which the model was trained with."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])


class Emu3(CodesAmongWords):
    """A loaded Emu3-Gen (contract: `ImageModel`)."""

    spec: Emu3Spec

    def __init__(self, spec: Emu3Spec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import Emu3ForConditionalGeneration, PreTrainedTokenizerFast

        (folder,) = map(locate, spec.sources())
        read_config(folder, "model.weights", "emu3", "BAAI/Emu3-Gen-hf")
        self.spec = spec
        self.tokenizer = load_tokenizer(folder, "model.weights")
        if spec.words == "original":
            assert isinstance(self.tokenizer, PreTrainedTokenizerFast)  # read from tokenizer.json
            split_as_published(self.tokenizer)
        ids = self._model_ids()
        self.full = load_pretrained(Emu3ForConditionalGeneration, folder, spec.load_options(device, dtype))
        super().__init__(self.full.get_decoder(), spec.layout)
        self.head_module = self.full.lm_head
        self.first_code = ids[0]
        self.ids = torch.tensor(ids, device=self.device)  # [V + F] the model's id of each local id
        self.vq = Emu3Pixels.load(folder, self.full.config.vq_config).to(self.device)
        self.full.model.vqmodel = None  # float32 in every dtype, as in the reference, and never quantised
        if len(self.codebook) != spec.vocabulary:
            raise UserError(
                f"{spec.weights} has {len(self.codebook)} image codes, but model.vocabulary is "
                f"{spec.vocabulary}; set model.vocabulary={len(self.codebook)}."
            )

    def _model_ids(self) -> list[int]:
        """Look up the model's ids of all codes and forced tokens by name; raises `UserError` if they are not as expected."""
        spec, ids = self.spec, self.tokenizer.get_vocab()
        codes = [ids.get(f"<|visual token {code:06d}|>", -1) for code in range(spec.vocabulary)]
        if codes[0] < 0 or codes != list(range(codes[0], codes[0] + len(codes))):
            raise UserError(
                f"the tokenizer of {spec.weights} does not have {spec.vocabulary} visual tokens in one range; check "
                "model.vocabulary."
            )
        forced, names = [spec.row_end, *spec.suffix], [ROW_END, FRAME_END, END, EOS]
        found = [ids.get(name) for name in names]
        if forced != found:
            raise UserError(
                f"model.row_end and model.suffix are {forced}, but {spec.weights} has {found} for {' '.join(names)}; set them "
                "to those."
            )
        return [*codes, *spec.layout.forced_ids]

    def encode(self, prompts: list[str]) -> Condition:
        """Tokenise and embed both guidance branches; the unconditional one, the negative text, is the same for all."""
        frame = f"{START}{self.layout.rows}*{self.layout.columns}{IMAGE}"
        texts = [*(prompt + self.spec.positive for prompt in prompts), self.spec.negative]
        ids = self.tokenizer([BOS + text + frame for text in texts], add_special_tokens=False)["input_ids"]
        padded, lengths = pad_right(ids[:-1], self.device)
        negative, negative_length = pad_right(ids[-1:], self.device)
        table = self.full.get_input_embeddings()
        return Condition(table(padded), lengths, table(negative), negative_length)

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode whole token sequences to images, one at a time: [B, N] -> uint8 [B, 3, H, W]."""
        codes = self.layout.codes(tokens.to(self.device))
        return torch.cat([self.vq.decode(image) for image in codes.split(1)])


class Emu3Pixels(nn.Module):
    """Emu3's image tokeniser: `encode` [B, 3, H, W] -> codes [B, h, w], `decode` back to uint8."""

    def __init__(self, vae: Emu3VQVAE) -> None:
        super().__init__()
        self.vae = vae

    @classmethod
    def load(cls, folder: Path, config: Emu3VQVAEConfig) -> Emu3Pixels:
        """Read the tokeniser's weights from a checkpoint's shards. Raises `UserError` if they do not fit."""
        from safetensors import safe_open
        from transformers import Emu3VQVAE

        with torch.device("meta"):  # saves 271M random numbers that the file replaces
            vae = Emu3VQVAE(config)
        vae.to_empty(device="cpu")
        tensors = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - the handle is not a dictionary
                    # transformers 4 wrote "vqmodel.", 5 writes "model.vqmodel."
                    if part := re.fullmatch(r"(?:model\.)?vqmodel\.(.+)", name):
                        tensor = file.get_tensor(name)
                        tensors[part[1]] = tensor.float() if tensor.is_floating_point() else tensor
        load_exactly(vae, tensors, f"model.weights={folder}")
        return cls(vae.eval().requires_grad_(False))

    @property
    def codebook(self) -> Tensor:
        """The code vectors [V, C]."""
        return self.vae.quantize.embedding.weight

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1] -> codes [B, h, w], one at a time; sides are multiples of 8."""
        latents = [self.latents(image) for image in images.to(self.codebook).split(1)]
        return torch.cat([self.vae.quantize(latent[:, None])[:, 0] for latent in latents])

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Encode without quantising: [B, 3, H, W] -> [B, C, h, w].

        The encoder takes an image as four equal frames and joins them in its last layers: until then one frame is enough.
        """
        encoder = self.vae.encoder
        x = encoder.norm_out(encoder.middle_block(encoder.down_block(encoder.conv_in(images))))
        frames = self.vae.config.temporal_downsample_factor
        video = encoder.conv_out(F.silu(x))[:, :, None].repeat(1, 1, frames, 1, 1)  # [B, C, frames, h, w]
        for layer in encoder.time_conv:
            video = F.silu(layer(video))
        for layer in encoder.time_res_stack:
            video = layer(video)
        return self.vae.quant_conv(video)[:, :, 0]

    @torch.no_grad()
    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> [B, 3, H, W], in [-1, 1] before clipping.

        The decoder makes four frames of an image, of which the first is kept. Only its first layers join frames, so the rest
        runs on that frame alone: a quarter of the time and memory, the same pixels.
        """
        vae, decoder = self.vae, self.vae.decoder
        vectors = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)[:, :, None]  # [B, C, frames, h, w]
        vectors = vectors.to(vae.post_quant_conv.conv.weight.dtype)
        video = torch.cat([vae.post_quant_conv(vectors), vectors])
        for layer in decoder.time_res_stack:
            video = layer(video)
        for layer in decoder.time_conv:
            video = F.silu(layer(video))
        x, vectors = video[:, :, 0].chunk(2)
        x = decoder.up_block(decoder.middle_block(decoder.conv_in(x), vectors), vectors)
        return decoder.conv_out(F.silu(decoder.norm_out(x, vectors)))

    def pixel_parts(self) -> list[nn.Module]:
        """Return what turns code vectors into pixels."""
        return [self.vae.post_quant_conv, self.vae.decoder]

    def compiled_parts(self) -> list[nn.Module]:
        """Return the networks of `decode` that are worth compiling: they are called once for an image."""
        return [self.vae.decoder.middle_block, self.vae.decoder.up_block]

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> uint8 [B, 3, H, W]; rounds down, as the reference does."""
        return to_bytes(self.pixels(codes), rounded=False)
