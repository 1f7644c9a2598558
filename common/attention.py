"""Attention, for the project's own networks."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v for q, k, v [..., L, C] (Equation 1 of arXiv:1706.03762).

    In half precision on a CPU it is computed as two matrix products and a softmax, because the
    backward pass of PyTorch's fused function takes five times as long there.
    """
    if q.dtype in (torch.bfloat16, torch.float16) and q.device.type == "cpu" and q.requires_grad:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
