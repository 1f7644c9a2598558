"""The loss on held-out images, comparable from one validation to the next."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.seeds import Draws, StackedRandomGenerator, derive_seeds
from common.training import Batch


@torch.no_grad()
def held_out_loss(
    model: nn.Module, loss_fn: Callable[[Batch, Draws], Tensor], images: Batch, size: int = 100
) -> float:
    """The mean of `loss_fn` over held-out images, `size` at a time, on the model's device and in
    evaluation mode.

    The generators of an image are the same each time, and so are its t and its noise.
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
