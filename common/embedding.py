"""Sinusoidal timestep embedding."""

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Embeds t [N] as [N, dim]: sines, then cosines, of t exp(-ln(10000) 2i / dim).

    Section 3.5 of Vaswani et al. 2017 (arXiv:1706.03762).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer(
            "inv_freq", torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        )

    def forward(self, t: Tensor) -> Tensor:
        """The embedding [N, dim] of t [N]."""
        angles = t.to(self.inv_freq.dtype)[:, None] * self.inv_freq[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
