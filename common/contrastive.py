"""The contrastive loss, used for CLIP and for the face features."""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(logits: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, a scalar, for logits [N, N] of N matching pairs.

    Row i holds the logits of picture i for all captions; the diagonal is the right match. The loss
    is the mean of the cross-entropies over rows and over columns (Figure 3 of Radford et al. 2021,
    arXiv:2103.00020).
    """
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2.0
