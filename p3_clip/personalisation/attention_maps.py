"""Attention maps of a U-Net's cross-attention, and a loss that keeps a word's on its object."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

LARGEST = 16 * 16
"""Places of the largest maps that are kept, as in Break-A-Scene: finer ones are less semantic."""


class KeepsMap:
    """A processor of diffusers' `Attention`, which keeps the attention map of its last call."""

    def __init__(self) -> None:
        self.map: Tensor | None = None
        """[N, H * W, L]: mean over the heads; None before a call or if it is above LARGEST."""

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of `hidden_states` [N, H * W, C] to the text `encoder_hidden_states`."""
        text = encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1).to(v.dtype)
        self.map = weights.mean(1) if hidden_states.shape[1] <= LARGEST else None
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def keep_maps(unet: nn.Module) -> list[KeepsMap]:
    """Sets a `KeepsMap` as the processor of every cross-attention, and returns them."""
    processors = []
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            processors.append(KeepsMap())
            module.set_processor(processors[-1])
    return processors


def attention_outside(maps: Sequence[Tensor], places: Tensor, regions: Tensor) -> Tensor:
    """The fraction of a word's attention that is outside its concept's region, a scalar in [0, 1].

    It is averaged over the concepts that an image both names and shows (0 if there are none), over
    the images and over the maps. Break-A-Scene pulls the maps to the masks of their concepts
    (Equation 3 of arXiv:2305.16311); this fraction (as in arXiv:2304.03373, Equation 2) does not
    depend on the scale of the maps, which changes with the number of words.

    - `maps`: each [N, h * w, L], of square latents.
    - `places` bool [N, K, L]: the places of concept k's words in the text.
    - `regions` [N, K, H, W] in [0, 1]: how much of each place concept k covers.
    """
    shown = (places.any(-1) & (regions.flatten(2).amax(-1) > 0.0)).float()  # [N, K]
    outside = []
    for attention in maps:
        inside = F.adaptive_avg_pool2d(regions, math.isqrt(attention.shape[1])).flatten(2)
        own = torch.einsum("npl,nkl->nkp", attention.float(), places.float())  # [N, K, h * w]
        fraction = 1.0 - (own * inside).sum(-1) / own.sum(-1).clamp(min=1e-12)
        outside.append(((fraction * shown).sum(1) / shown.sum(1).clamp(min=1.0)).mean())
    return torch.stack(outside).mean()
