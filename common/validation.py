"""Loss on held-out images, comparable between validations."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.seeds import Draws, StackedRandomGenerator, derive_seeds
from common.training import Batch


@torch.no_grad()
def held_out_loss(
    model: nn.Module, loss_fn: Callable[[Batch, Draws], Tensor], images: Batch, size: int = 100
) -> float:
    """Mean of `loss_fn` over held-out images, in batches of `size`.

    The model is in evaluation mode, and the batches are on its device. Each image has the same seed
    in every validation, and so the same t and noise.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    count = len(next(iter(images.values())))
    seeds = derive_seeds(0, count=count)
    total = 0.0
    for start in range(0, count, size):
        part = {name: value[start : start + size].to(device) for name, value in images.items()}
        generators = StackedRandomGenerator(seeds[start : start + size], device)
        total += loss_fn(part, generators).item() * min(size, count - start) / size
    model.train(was_training)
    return total / (count / size)
