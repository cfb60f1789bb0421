"""The Cosmos DV8x16x16 image tokeniser (NVIDIA/Cosmos-Tokenizer), for images: a video of one frame.

The past of the first frame is the frame itself, so a kernel over time acts as its sum, attention over time as its values,
and the wavelets' differences in time are zero: what is left are plain 2D convolutions. Codes are finite scalar quantisation
(arXiv 2309.15505): each channel is rounded to a few levels, the code counts the combinations.

B images, H x W pixels, h x w codes, V codes of C channels
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2.errors import UserError
from sjd2.models.shared import to_bytes
from sjd2.models.tensors import load_exactly, read_torchscript

KEY = "model.vq_weights"
FILES = ("encoder.jit", "decoder.jit")
EXAMPLE = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
DOWN = 16  # pixels per code, each way
PATCH = 4  # of them by wavelets, the rest by two levels of the network
EPS = 1e-3  # how far beyond the outermost level a channel may reach, relative (quantizers.py)
# tensors that do not matter for one frame: constants, queries and keys over time, the unused halves of two layers
UNUSED = re.compile(
    r"(.*\.)?(quantizer|(un)?patcher3d)\..*|.*\.attn_1\.1\.[qk]\..*"
    r"|decoder\.up\.2\.upsample\.conv1\..*|encoder\.down\.1\.downsample\.conv2\..*"
)


class CosmosTokenizer(nn.Module):
    """An image tokeniser: `encode` [B, 3, H, W] -> codes [B, h, w], `decode` back to uint8.

    levels: of each channel of a code. width, factors: of the network's three levels, the finest first. blocks: per level.
    latent: channels between network and code.
    """

    codebook: Tensor
    steps: Tensor

    def __init__(
        self, levels: tuple[int, ...], *, width: int = 128, factors: tuple[int, ...] = (2, 4, 4), blocks: int = 2,
        latent: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [width * factor for factor in factors]
        self.encoder = FrameEncoder(width, widths, blocks, latent)
        self.quant_conv = nn.Conv2d(latent, len(levels), 1)
        self.post_quant_conv = nn.Conv2d(len(levels), latent, 1)
        self.decoder = FrameDecoder(widths, blocks, latent)
        self.register_buffer("steps", torch.tensor(levels), persistent=False)
        self.register_buffer("codebook", code_vectors(levels), persistent=False)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Encode without quantising: [B, 3, H, W] in [-1, 1] -> [B, C, h, w]."""
        return self.quant_conv(self.encoder(images))

    def nearest(self, latents: Tensor) -> Tensor:
        """Round every channel to its levels: [B, C, h, w] -> codes [B, h, w]."""
        levels = self.steps[:, None, None]
        reach = (levels - 1) * (1 + EPS) / 2
        offset = (levels % 2 == 0) * 0.5  # an even number of levels has none in the middle
        rounded = ((latents + (offset / reach).atanh()).tanh() * reach - offset).round().long() + levels // 2
        return (rounded * _places(self.steps)[:, None, None]).sum(1)

    @torch.no_grad()
    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> [B, 3, H, W], in [-1, 1] before clipping."""
        vectors = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(vectors.to(self.post_quant_conv.weight.dtype)))

    def pixel_parts(self) -> list[nn.Module]:
        """Return what turns code vectors into pixels."""
        return [self.post_quant_conv, self.decoder]

    def compiled_parts(self) -> list[nn.Module]:
        """Return the networks of `decode` that are worth compiling: they are called once for an image."""
        return [self.decoder]

    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1] -> codes [B, h, w]; sides are multiples of 16."""
        return self.nearest(self.latents(images.to(self.codebook)))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> uint8 [B, 3, H, W]; rounds, as the public code does (torchvision's save_image)."""
        return to_bytes(self.pixels(codes), rounded=True)

    @classmethod
    def load(cls, folder: Path, levels: tuple[int, ...]) -> CosmosTokenizer:
        """Read the published files encoder.jit and decoder.jit. Raises `UserError` if they do not fit.

        The public code tolerates missing tensors, which stay random: noise instead of an image.
        """
        tensors = {k: v for file in FILES for k, v in read_torchscript(folder / file, KEY).items()}
        what = f"{KEY}={folder}"
        found = next((v.tolist() for k, v in tensors.items() if k.endswith("quantizer._levels")), list(levels))
        if found != list(levels):
            raise UserError(f"{what} has codes of {found} levels; set model.levels={str(found).replace(' ', '')}.")
        frame = {one_frame_name(k): one_frame(v) for k, v in tensors.items() if not UNUSED.fullmatch(k)}
        with torch.device("meta"):  # saves random numbers that the files replace
            module = cls(levels, **_sizes(frame, folder))
        module.to_empty(device="cpu")
        module.steps, module.codebook = torch.tensor(levels), code_vectors(levels)
        load_exactly(module, frame, what)
        return module.eval().requires_grad_(False)


def code_vectors(levels: tuple[int, ...]) -> Tensor:
    """Return the vectors of all codes, in [-1, 1]: [V, C]; the first channel counts fastest."""
    steps = torch.tensor(levels)
    digits = torch.arange(math.prod(levels))[:, None] // _places(steps) % steps
    return (digits - steps // 2) / (steps // 2)


def _places(steps: Tensor) -> Tensor:
    """Return what one level of each channel adds to the code: [C]."""
    return torch.cat([steps.new_ones(1), steps[:-1]]).cumprod(0)


def one_frame_name(name: str) -> str:
    """Rename a published tensor to the name here: no wrappers around convolutions and norms."""
    return re.sub(r"\.norm\.(weight|bias)$", r".\1", name.replace(".conv3d.", "."))


def one_frame(tensor: Tensor) -> Tensor:
    """Return what a published weight is to a video of one frame, in float32: [O, I, time, x, y] -> [O, I, x, y]."""
    return tensor.float().sum(2) if tensor.ndim == 5 else tensor.float()


def _sizes(tensors: dict[str, Tensor], folder: Path) -> dict:
    """Read the network's sizes off its tensors."""
    try:
        width, latent = len(tensors["encoder.conv_in.0.weight"]), tensors["quant_conv.weight"].shape[1]
        blocks = 1 + max(int(m[1]) for m in map(re.compile(r"encoder\.down\.0\.block\.(\d+)\.").match, tensors) if m)
        widths = [len(tensors[f"encoder.down.{level}.block.0.norm2.weight"]) for level in range(3)]
    except (KeyError, ValueError) as error:
        raise UserError(f"{KEY}={folder} is not a Cosmos DV8x16x16 tokeniser; use {EXAMPLE}.") from error
    return {"width": width, "factors": tuple(w // width for w in widths), "blocks": blocks, "latent": latent}


# ---- the network; attribute names are those of the published tensors


class FrameEncoder(nn.Module):
    """[B, 3, H, W] -> [B, latent, h, w]; widths: of the three levels, the finest first."""

    def __init__(self, width: int, widths: list[int], blocks: int, latent: int) -> None:
        super().__init__()
        self.conv_in = _pair(3 * PATCH**3, width)
        self.down = nn.Sequential()
        for level, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            change = Downsample(after, temporal=level == 0) if level < 2 else nn.Identity()
            self.down.append(NetworkLevel(before, after, blocks, downsample=change))
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _pair(widths[-1], latent)

    def forward(self, images: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(wavelets(wavelets(images)))))
        return self.conv_out(F.silu(self.norm_out(x)))


class FrameDecoder(nn.Module):
    """[B, latent, h, w] -> [B, 3, H, W]; widths: of the three levels, the finest first."""

    def __init__(self, widths: list[int], blocks: int, latent: int) -> None:
        super().__init__()
        self.conv_in = _pair(latent, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for level, (after, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            change = Upsample(after, temporal=level == 1) if level > 0 else nn.Identity()
            self.up.append(NetworkLevel(before, after, blocks + 1, upsample=change))
        self.norm_out = _norm(widths[0])
        self.conv_out = _pair(widths[0], 3 * PATCH**3)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return last_frame(last_frame(self.conv_out(F.silu(self.norm_out(x)))))


class NetworkLevel(nn.Sequential):
    """Residual blocks and the change of size after them, under its published name."""

    def __init__(self, before: int, after: int, blocks: int, **change: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*(SpaceTimeBlock(after if k else before, after) for k in range(blocks)))
        for name, module in change.items():
            self.add_module(name, module)


class SpaceTimeBlock(nn.Module):
    """A residual block: [B, before, H, W] -> [B, after, H, W]."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before), _pair(before, after)
        self.norm2, self.conv2 = _norm(after), _pair(after, after)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.nin_shortcut(x) + inner


class Middle(nn.Module):
    """The coarsest level: attention between two blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = SpaceTimeBlock(width, width), SpaceTimeBlock(width, width)
        self.attn_1 = nn.Sequential(SpaceAttention(width), TimeAttention(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class TimeAttention(nn.Module):
    """Attention over one frame: it sees itself alone, so its values are the result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.v, self.proj_out = _norm(width), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def attend(self, x: Tensor) -> Tensor:
        return self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.attend(self.norm(x)))


class SpaceAttention(TimeAttention):
    """Attention of every place to all places, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.q, self.k = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2).view_as(x)


class Downsample(nn.Module):
    """Halve both sides; temporal: the level halves time too, which leaves one frame as it is."""

    def __init__(self, width: int, *, temporal: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride=2)
        self.conv2 = nn.Conv2d(width, width, 1) if temporal else None
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        x = self.conv1(x) + F.avg_pool2d(x, 2, 2)
        return self.conv3(x if self.conv2 is None else self.conv2(x) + x)


class Upsample(nn.Module):
    """Double both sides; temporal: the level doubles time too, which leaves one frame as it is."""

    def __init__(self, width: int, *, temporal: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1) if temporal else None
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.conv1 is None else self.conv1(x) + x
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return self.conv3(self.conv2(x) + x)


def _pair(before: int, after: int) -> nn.Sequential:
    """A convolution over space and one over time, which is 1 x 1 for one frame."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 1))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, width, eps=1e-6)


def wavelets(x: Tensor) -> Tensor:
    """Apply one level of the Haar transform to a frame that stands still: [B, C, H, W] -> [B, 8C, H / 2, W / 2]."""
    left, right = x[..., ::2], x[..., 1::2]
    bands = []
    for columns in (left + right, left - right):
        top, bottom = columns[..., ::2, :], columns[..., 1::2, :]
        bands.append(((top + bottom) / 4, (top - bottom) / 4))
    (mean, rows), (columns, both) = bands
    still = torch.cat([mean, columns, rows, both], 1)
    return torch.cat([still, torch.zeros_like(still)], 1)  # nothing changes in time


def last_frame(x: Tensor) -> Tensor:
    """Undo one level of the Haar transform and keep the later frame: [B, 8C, H, W] -> [B, C, 2H, 2W]."""
    still, change = x.chunk(2, 1)
    mean, columns, rows, both = (still - change).chunk(4, 1)
    left = torch.stack([mean + columns + rows + both, mean + columns - rows - both], 3)  # [B, C, H, 2, W]
    right = torch.stack([mean - columns + rows - both, mean - columns - rows + both], 3)
    return torch.stack([left, right], 5).reshape(len(x), -1, 2 * x.shape[2], 2 * x.shape[3])
