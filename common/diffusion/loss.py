"""The diffusion training loss, mean squared error at random t, and its weighting over t."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.diffusion.process import Condition, Network, Parameterization, output_target, q_sample
from common.diffusion.schedule import NoiseSchedule
from common.embedding import SinusoidalEmbedding
from common.seeds import Draws

TEMPERATURE, HIGHEST_TOLD = 0.01, 750  # of `Discrimination`
SHIFT = 3.0  # of the timesteps "shifted": their median is 0.75 T
TimestepDistribution = Literal["mixed", "uniform", "logit_normal", "shifted"]
LossWeight = Literal["learned", "min_snr", "none"]


def diffusion_loss(
    network: Network,
    schedule: NoiseSchedule,
    x0: Tensor,
    condition: Condition,
    draws: Draws,
    *,
    parameterization: Parameterization,
    min_snr_gamma: float | None = None,
    snr_offset: float = 0.0,
    weight: Tensor | None = None,
    log_variance: Callable[[Tensor], Tensor] | None = None,
    timesteps: TimestepDistribution = "uniform",
    guidance: "TrainedGuidance | None" = None,
    discrimination: "Discrimination | None" = None,
) -> Tensor:
    """Mean squared error of the network's output at random t, a scalar (Equation 14 of DDPM).

    DDPM is Ho et al. 2020 (arXiv:2006.11239). `x0` is [N, ...] on the network's device; t and eps
    come from `draws`.

    - `min_snr_gamma` and `snr_offset` weight each image by `min_snr_weight`.
    - `weight` [N, 1, ...], of mean 1 over an image, weights pixels, for example by a validity mask.
    - `log_variance` is a learned function u(t): the error e of an image becomes e / exp(u) + u. At
      the optimum u = log e, every noise level has an equal weight (Equation 21 of EDM2,
      arXiv:2312.02696).
    - `timesteps` is the distribution of t.
    - `guidance` shifts the target so that the network learns guided outputs (`TrainedGuidance`).
    - `discrimination` adds the loss of telling each image's condition from a wrong one
      (`Discrimination`).
    """
    t = draw_timesteps(schedule.num_timesteps, timesteps, draws)
    eps = draws.randn(*x0.shape[1:])
    alpha_t, sigma_t = schedule.alpha_sigma_like(t, x0)
    x_t = q_sample(schedule, x0, t, eps)
    output = network(x_t, t, condition)
    target = output_target(parameterization, x0, eps, alpha_t, sigma_t)
    if guidance is not None:
        with torch.no_grad():
            inside = ((t >= guidance.interval[0]) & (t <= guidance.interval[1])).view(
                -1, *[1] * (x0.dim() - 1)
            )
            direction = output.detach() - network(x_t, t, guidance.null)
        target = target + inside * (1.0 - 1.0 / guidance.scale) * direction
    error = (output.float() - target.float()).square()
    per_image = (error if weight is None else error * weight).flatten(1).mean(1)
    if min_snr_gamma is not None:
        per_image = per_image * min_snr_weight(
            schedule.snr(t), min_snr_gamma, parameterization, snr_offset
        )
    if log_variance is not None:
        u = log_variance(t).float()
        per_image = per_image / u.exp() + u
    loss = per_image.mean()
    if discrimination is not None:
        some = discrimination.images
        mistaken = network(x_t[some], t[some], discrimination.wrong)
        wrong_error = (mistaken.float() - target[some].float()).square().flatten(1).mean(1)
        evidence = (wrong_error / error[some].flatten(1).mean(1)).log() / TEMPERATURE
        told = F.softplus(-evidence) * (t[some] <= HIGHEST_TOLD)
        loss = loss + discrimination.weight * told.mean()
    return loss


@dataclasses.dataclass(frozen=True)
class Discrimination:
    """Cross entropy of telling an image's condition from a wrong one, in `diffusion_loss`.

    A diffusion model classifies an image by the condition with the smallest error (Li et al. 2023,
    arXiv:2303.16203). Where x_t shows its class by itself, the plain loss hardly asks for the
    condition to be used; this one does. With e_y the error given condition y, the log-odds of the
    right condition are log(e_wrong / e_right) / TEMPERATURE: those of Gaussian errors of unknown
    variance in 2 / TEMPERATURE independent dimensions. Above HIGHEST_TOLD noise hides the class.
    """

    weight: float
    """Weight of this loss beside the error's."""
    images: slice
    """The images of a batch that take part; each costs one more evaluation of the network."""
    wrong: Condition
    """A wrong condition for each of these images."""


@dataclasses.dataclass(frozen=True)
class TrainedGuidance:
    """Guidance built in during training: sampling then needs one evaluation instead of two.

    The method is Model Guidance (arXiv:2502.12154). The target of a conditional output is shifted
    by (1 - 1 / scale) (conditional - unconditional); the fixed point of this shift is the guided
    output, unconditional + scale (conditional - unconditional). Where the condition is the null
    condition the shift is 0.
    """

    scale: float
    """The guidance scale, at least 1."""
    null: Condition
    """The null condition of each image."""
    interval: tuple[int, int] = (0, 999)
    """Lowest and highest timestep t at which the target is shifted."""


def draw_timesteps(num_timesteps: int, distribution: TimestepDistribution, draws: Draws) -> Tensor:
    """Random timesteps, long [N].

    - "uniform" is DDPM's choice.
    - "logit_normal" is T sigmoid(n) with n standard normal (Equation 19 of arXiv:2403.03206). It is
      denser in the middle, where most of an image is decided, but leaves only 0.16 % of the draws
      to t above 0.95 T.
    - "mixed" draws each timestep from one of the two with equal probability.
    - "shifted" moves the logit-normal ones of a fraction u of T to SHIFT u / (1 + (SHIFT - 1) u)
      (Equation 23 there), and draws every fourth timestep uniformly. It is for smooth pictures and
      latents, whose forms are decided at higher noise.
    """
    if distribution == "uniform":
        return draws.randint(num_timesteps)
    shift = math.log(SHIFT) if distribution == "shifted" else 0.0
    fraction = (draws.randn() + shift).sigmoid()  # sigmoid(n + log s) is the shifted sigmoid(n)
    normal = (fraction * num_timesteps).long().clamp(max=num_timesteps - 1)
    if distribution == "logit_normal":
        return normal
    every = {"mixed": 2, "shifted": 4}[distribution]
    return torch.where(draws.randint(every) < every - 1, normal, draws.randint(num_timesteps))


class LossWeighting(nn.Module):
    """Weighting of noise levels in training; `options` are keyword arguments of `diffusion_loss`.

    - "learned": a learned log-variance (`LogVariance`). Its parameters are trained with the
      network's and not saved with the model.
    - "min_snr": the weight min(SNR + 1, 5) on the x0 error; min(SNR, 5) with eps prediction, where
      an offset is undefined.
    - "none": the plain error of the output.
    """

    def __init__(
        self, kind: LossWeight, parameterization: Parameterization, timesteps: TimestepDistribution
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"timesteps": timesteps}
        if kind == "learned":
            self.log_variance = LogVariance()
            self.options["log_variance"] = self.log_variance
        if kind == "min_snr":
            self.options |= {
                "min_snr_gamma": 5.0,
                "snr_offset": 0.0 if parameterization == "eps" else 1.0,
            }


class LogVariance(nn.Module):
    """A learned log-variance u(t) for `diffusion_loss`: one linear layer on sines and cosines of t.

    It starts at 0 and is used in training only.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.embed = SinusoidalEmbedding(channels)
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """u(t), float32 [N], for t [N], under autocast too."""
        with torch.autocast(t.device.type, enabled=False):
            return self.linear(self.embed(t)).squeeze(-1)


def min_snr_weight(
    snr: Tensor, gamma: float, parameterization: Parameterization, offset: float = 0.0
) -> Tensor:
    """The weight [N] on the output's error that equals min(SNR + offset, gamma) on the x0 error.

    Offset 0 is min-SNR (Hang et al. 2023, arXiv:2303.09556, Section 3.4): min(SNR, gamma) / SNR for
    eps, written as min(1, gamma / SNR) so that it is finite (1) at SNR 0, and min(SNR, gamma) /
    (SNR + 1) for v. Offset 1 clips the weight SNR + 1, which v prediction has by itself (Appendix D
    of arXiv:2202.00512), and so keeps it at high noise, where an image's coarse structure is
    decided. Raises ValueError for eps prediction with an offset, whose weight would be infinite at
    SNR 0.
    """
    if parameterization == "eps":
        if offset:
            raise ValueError("an offset to the SNR weight needs x0 or v prediction")
        return (gamma / snr).clamp(max=1.0)
    weight = (snr + offset).clamp(max=gamma)
    return weight if parameterization == "x0" else weight / (snr + 1.0)
