"""A conditional diffusion model as a classifier: the digit under which the network predicts an
image's noise best.

After Li et al. 2023 (arXiv:2303.16203, Algorithm 1). How often it is right says how well the
network knows its condition, which guidance hides in samples.
"""

import torch
from torch import Tensor

from common.data.digits import NUM_DIGITS
from common.diffusion.process import output_target, q_sample
from common.diffusion.schedule import make_schedule
from common.images import to_model_range
from common.seeds import StackedRandomGenerator, derive_seeds
from p1_diffusion.model import ContextUNet

TIMESTEPS = (200, 350, 500, 650)


@torch.no_grad()
def classify_by_error(
    model: ContextUNet, images: Tensor, datasets: Tensor, *, seed: int = 0, chunk_size: int = 50
) -> Tensor:
    """Digits long [N] of uint8 images [N, 3, 28, 28] of known datasets [N]: the least squared error
    of the network's output.

    The error is summed over TIMESTEPS; at each, all ten digits are tried on the same noise.
    """
    schedule, device = make_schedule(model.config.schedule), next(model.parameters()).device
    digits = torch.arange(NUM_DIGITS, device=device)
    found = []
    seeds = derive_seeds(seed, count=len(images))
    for start in range(0, len(images), chunk_size):
        part = slice(start, start + chunk_size)
        x0, kinds = to_model_range(images[part]).to(device), datasets[part].to(device)
        noise = StackedRandomGenerator(seeds[part], device)
        error = torch.zeros(len(x0), NUM_DIGITS, device=device)
        for step in TIMESTEPS:
            eps, t = noise.randn(*x0.shape[1:]), torch.full((len(x0),), step, device=device)
            target = output_target(
                model.config.parameterization, x0, eps, *schedule.alpha_sigma_like(t, x0)
            )
            x_t = q_sample(schedule, x0, t, eps)
            for digit in digits:
                output = model(x_t, t, torch.stack([digit.expand_as(kinds), kinds], 1))
                error[:, digit] += (output - target).square().flatten(1).mean(1)
        found.append(error.argmin(1).cpu())
    return torch.cat(found)
