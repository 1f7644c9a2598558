"""The one embedding of time."""

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Embeds t [N] as sines then cosines of t exp(-ln(10000) 2i / dim), float [N, dim] (Section 3.5
    of arXiv:1706.03762)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer(
            "inv_freq", torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        )

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.inv_freq.dtype)[:, None] * self.inv_freq[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
