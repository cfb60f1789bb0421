"""MoVQGAN written out over the tensors of its file, none of our modules: the reference for `sjd2.models.movqgan`.

# B images, C channels, h x w codes
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class PlainMoVQGAN:
    """The networks of a file in float64; every convolution and norm by the name of its tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], stride, padding)

    def norm(self, name: str, x: Tensor, codes: Tensor | None) -> Tensor:
        """Normalise groups of channels; in the decoder with a scale and a shift that the codes [B, C, h, w] give."""
        inner = name if codes is None else f"{name}.norm_layer"
        out = F.group_norm(x, 32, self.tensors[f"{inner}.weight"], self.tensors[f"{inner}.bias"], 1e-6)
        if codes is None:
            return out
        near = F.interpolate(codes, x.shape[-2:])
        return out * self.conv(f"{name}.conv_y", near) + self.conv(f"{name}.conv_b", near)

    def block(self, name: str, x: Tensor, codes: Tensor | None) -> Tensor:
        out = x
        for part in "12":
            out = self.conv(f"{name}.conv{part}", F.silu(self.norm(f"{name}.norm{part}", out, codes)))
        return out + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.tensors else x)

    def attention(self, name: str, x: Tensor, codes: Tensor | None) -> Tensor:
        y = self.norm(f"{name}.norm", x, codes)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")  # [B, C, h w]
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def level(self, name: str, x: Tensor, codes: Tensor | None) -> Tensor:
        number = 0
        while f"{name}.block.{number}.conv1.weight" in self.tensors:
            x = self.block(f"{name}.block.{number}", x, codes)
            if f"{name}.attn.{number}.q.weight" in self.tensors:
                x = self.attention(f"{name}.attn.{number}", x, codes)
            number += 1
        return x

    def middle(self, name: str, x: Tensor, codes: Tensor | None) -> Tensor:
        x = self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x, codes), codes)
        return self.block(f"{name}.block_2", x, codes)

    def encode(self, images: Tensor, levels: int = 4) -> Tensor:
        """Return the codes of images in [-1, 1]: [B, 3, H, W] -> [B, h, w]."""
        x = self.conv("encoder.conv_in", images.double())
        for number in range(levels):
            x = self.level(f"encoder.down.{number}", x, None)
            if number < levels - 1:
                x = self.conv(f"encoder.down.{number}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x, None), None))
        latents = self.conv("quant_conv", self.conv("encoder.conv_out", x)).permute(0, 2, 3, 1)
        return (latents[..., None, :] - self.tensors["quantize.embedding.weight"]).square().sum(-1).argmin(-1)

    def pixels(self, codes: Tensor, levels: int = 4) -> Tensor:
        """Return the images of codes, in [-1, 1] before clipping: [B, h, w] -> [B, 3, H, W]."""
        vectors = self.tensors["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", vectors))
        x = self.middle("decoder.mid", x, vectors)
        for number in reversed(range(levels)):
            x = self.level(f"decoder.up.{number}", x, vectors)
            if number:
                x = self.conv(f"decoder.up.{number}.upsample.conv", F.interpolate(x, scale_factor=2.0))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x, vectors)))
