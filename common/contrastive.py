"""The contrastive loss of CLIP and of the face features."""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(logits: Tensor) -> Tensor:
    """The mean of both cross-entropies, pictures against captions and captions against pictures,
    for logits [N, N] whose diagonal is right (Figure 3 of Radford et al. 2021,
    arXiv:2103.00020)."""
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2.0
