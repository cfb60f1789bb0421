"""An independent reference for Chameleon models that draw: transformers' class on whole sequences, none of our code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

CODES = slice(4, 8196)  # ids of the image codes
SMALL_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "embed_dim": 4,
    "num_embeddings": 4,
}


class Plain:
    """A checkpoint folder in float64, read tensor by tensor; a norm that all heads share is repeated for each."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        tensors = {name: t.double() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        heads = config["num_attention_heads"]
        for name, tensor in list(tensors.items()):
            if "_norm." in name and tensor.ndim == 2:
                tensors[name] = tensor.repeat_interleave(heads // len(tensor), 0)
        self.model = (
            ChameleonForConditionalGeneration(ChameleonConfig(**(config | {"vq_config": SMALL_VQ}))).double().eval()
        )
        language = {name: tensor for name, tensor in tensors.items() if "vqmodel" not in name}
        report = self.model.load_state_dict(language, strict=False)
        assert not report.unexpected_keys
        assert all(name.startswith("model.vqmodel.") for name in report.missing_keys)
        self.words = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def text(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return self.words.encode(text, add_special_tokens=False).ids

    @torch.no_grad()
    def states(self, ids: list[int]) -> Tensor:
        """Return the final states of a whole sequence, positions from 0: [T, D]."""
        return self.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]

    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits of all ids after each token of a sequence: [T, vocabulary]."""
        return self.states(ids) @ self.model.lm_head.weight.detach().T

    def guided(self, conditional: list[int], unconditional: list[int], image: list[int], scale: float) -> Tensor:
        """Return u + scale (c - u) of the image codes after the last token of `image`: [8192]."""
        c, u = (self.logits([*prompt, *image])[-1] for prompt in (conditional, unconditional))
        return (u + scale * (c - u))[CODES]
