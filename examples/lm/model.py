"""A small GPT in pure PyTorch: pre-norm blocks, causal attention, an untied head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

__all__ = ["GPT", "SIZES", "GPTConfig", "initial_params", "loss_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """The shape of a model; the vocabulary is the 256 bytes."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int = 256


SIZES = {
    "tiny": GPTConfig(layers=2, width=32, heads=2, context=32),
    "small": GPTConfig(layers=4, width=128, heads=4, context=128),
    "medium": GPTConfig(layers=6, width=256, heads=8, context=256),
}


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[batch, time, width]` to the same shape."""
        batch, time, width = x.shape
        split = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return merged


class Block(nn.Module):
    """Attention, then a perceptron four times as wide, each normalised first and added back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[batch, time, width]` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        added: torch.Tensor = x + self.mlp_out(
            functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        )
        return added


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self._initialise(config)

    def _initialise(self, config: GPTConfig) -> None:
        """Draw weights from N(0, 0.02); what writes to the residual stream is scaled by depth."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("out.weight", "mlp_out.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** (0.5 * residual))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens `[batch, time]` to logits `[batch, time, vocabulary]`."""
        x = self.token(tokens) + self.position[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def initial_params(
    config: GPTConfig, seed: int, device: torch.device
) -> tuple[GPT, dict[str, torch.Tensor]]:
    """Return the model and its initial weights as a dict of plain tensors.

    The weights are drawn on the CPU, so that a seed means the same start on every device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config)
    params = {name: weight.detach().to(device) for name, weight in model.named_parameters()}
    return model.to("meta"), params


def loss_of(
    model: nn.Module, params: dict[str, torch.Tensor], windows: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross-entropy (nats per byte) of predicting every next byte.

    Args:
        model: The network, called with `params` in place of its own weights.
        params: The weights by name.
        windows: Bytes `[batch, context + 1]` as int64.
    """
    logits = torch.func.functional_call(model, params, (windows[:, :-1],))
    return functional.cross_entropy(logits.flatten(0, -2), windows[:, 1:].reshape(-1))
