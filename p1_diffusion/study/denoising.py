"""Error of the denoised image at several timesteps, beside that of a Wiener filter.

A network that learned the data is better than the best linear filter at every t, and calibrated:
the regression of x0 on its prediction has slope 1. A slope above 1 means that predictions are too
close to the mean; samples then lack contrast.
"""

from typing import Any

import torch
from torch import Tensor

from common.data.digits import DATASETS, Digits
from common.diffusion.process import predict_x0, q_sample
from common.diffusion.schedule import make_schedule
from common.images import to_model_range
from common.seeds import StackedRandomGenerator, derive_seeds
from p1_diffusion.model import ContextUNet

TIMESTEPS = (50, 200, 350, 500, 650, 800, 950)


@torch.no_grad()
def denoising_errors(
    model: ContextUNet, train: Digits, held_out: Digits, count: int = 250, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each dataset and t of TIMESTEPS, from `count` held-out digits of each dataset.

    `error` and `wiener` are the mean squared errors of x0, in [-1, 1], of the network and of the
    Wiener filter fitted to the training digits; `slope` is that of the regression of x0 on the
    network's prediction.
    """
    schedule, device = make_schedule(model.config.schedule), next(model.parameters()).device
    rows = []
    for i, dataset in enumerate(DATASETS):
        mine = torch.nonzero(held_out.datasets == i).flatten()[:count]
        x0 = to_model_range(held_out.images[mine])
        context = torch.stack([held_out.digits[mine], held_out.datasets[mine]], 1)
        wiener = WienerFilter(to_model_range(train.images[train.datasets == i][:10000]))
        noise = StackedRandomGenerator(derive_seeds(seed, count=len(x0)), "cpu")
        for step in TIMESTEPS:
            t = torch.full((len(x0),), step)
            x_t = q_sample(schedule, x0, t, noise.randn(*x0.shape[1:]))
            alpha, sigma = schedule.alpha_sigma(step)
            output = model(x_t.to(device), t.to(device), context.to(device)).float().cpu()
            predicted = predict_x0(model.config.parameterization, output, x_t, alpha, sigma)
            rows.append(
                {
                    "dataset": dataset,
                    "t": step,
                    "error": (predicted - x0).square().mean().item(),
                    "wiener": (wiener(x_t, alpha, sigma) - x0).square().mean().item(),
                    "slope": ((predicted * x0).sum() / predicted.square().sum()).item(),
                }
            )
    return rows


class WienerFilter:
    """The best linear denoiser for images of stationary statistics.

    It works on the three channels of each spatial frequency (Wiener 1949).
    """

    def __init__(self, images: Tensor) -> None:
        """Fits the mean image and the spectrum to `images`, [N, C, H, W]."""
        self.mean = images.mean(0)
        spectrum = torch.fft.fft2(images - self.mean, norm="ortho")
        # [H, W, C, C]
        self.covariance = torch.einsum("nchw,ndhw->hwcd", spectrum, spectrum.conj()) / len(images)

    def __call__(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """The estimate of x0 from x_t = alpha x0 + sigma eps, both [N, C, H, W]."""
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(x_t.shape[1])
        gain = alpha * self.covariance @ torch.linalg.inv(noisy)
        spectrum = torch.fft.fft2(x_t - alpha * self.mean, norm="ortho")
        filtered = torch.einsum("hwcd,ndhw->nchw", gain, spectrum)
        return torch.fft.ifft2(filtered, norm="ortho").real + self.mean
