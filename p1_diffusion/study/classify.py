"""A conditional diffusion model as a classifier (Li et al. 2023, arXiv:2303.16203, Algorithm 1).

The predicted class is the digit whose condition gives the smallest error of the network's output.
The accuracy measures how much the network learned about its condition. The accuracy of guided
samples does not, since guidance compensates for a weak condition.
"""

import torch
from torch import Tensor

from common.data.digits import NUM_DIGITS
from common.diffusion.process import output_target, q_sample
from common.diffusion.schedule import make_schedule
from common.images import to_model_range
from common.seeds import StackedRandomGenerator, derive_seeds
from p1_diffusion.model import ContextUNet

TIMESTEPS = (200, 350, 500, 650)  # t at which the errors are summed


@torch.no_grad()
def classify_by_error(
    model: ContextUNet, images: Tensor, datasets: Tensor, *, seed: int = 0, chunk_size: int = 50
) -> Tensor:
    """Predicted digits, long [N] on the CPU, of uint8 images [N, 3, 28, 28] with datasets [N].

    The prediction has the smallest mean squared error of the network's output, summed over
    TIMESTEPS. At each timestep all ten digits see the same noise.
    """
    schedule, device = make_schedule(model.config.schedule), next(model.parameters()).device
    digits = torch.arange(NUM_DIGITS, device=device)
    found = []
    seeds = derive_seeds(seed, count=len(images))
    for start in range(0, len(images), chunk_size):
        part = slice(start, start + chunk_size)
        x0, part_datasets = to_model_range(images[part]).to(device), datasets[part].to(device)
        noise = StackedRandomGenerator(seeds[part], device)
        error = torch.zeros(len(x0), NUM_DIGITS, device=device)
        for step in TIMESTEPS:
            eps, t = noise.randn(*x0.shape[1:]), torch.full((len(x0),), step, device=device)
            target = output_target(
                model.config.parameterization, x0, eps, *schedule.alpha_sigma_like(t, x0)
            )
            x_t = q_sample(schedule, x0, t, eps)
            for digit in digits:
                output = model(
                    x_t, t, torch.stack([digit.expand_as(part_datasets), part_datasets], 1)
                )
                error[:, digit] += (output - target).square().flatten(1).mean(1)
        found.append(error.argmin(1).cpu())
    return torch.cat(found)
