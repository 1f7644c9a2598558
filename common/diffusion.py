"""The maths of diffusion between images and networks: noising, parameterizations, the training loss, guidance.

Conventions (which index, which alpha, which rates) are those of `common/schedule.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from common.embedding import SinusoidalEmbedding
from common.schedule import NoiseSchedule
from common.seeds import Draws

Parameterization = Literal["eps", "x0", "v"]
Rate = float | Tensor  # a number, or [N, 1, ...] for a batch of different t


class Stackable(Protocol):
    """A condition of its own type, which knows how two of them become one batch."""

    def stack(self, other: Any) -> Any: ...


Condition = Tensor | Mapping[str, Tensor] | Stackable
Network = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t [N, ...], t long [N], condition) -> output [N, ...]
Predict = Callable[[Tensor, int], Tensor]  # (x_t, t) -> a network's output under a fixed condition
Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x_t, t) -> (x0, eps)


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t of the forward process for `x0` and `eps` [N, ...] and `t` long [N] (Equation 4 of DDPM, arXiv:2006.11239)."""
    signal, noise = schedule.rates_like(t, x0)
    return signal * x0 + noise * eps


def output_target(parameterization: Parameterization, x0: Tensor, eps: Tensor, signal: Rate, noise: Rate) -> Tensor:
    """What a network of this parameterization should put out; v is that of Salimans and Ho 2022 (arXiv:2202.00512)."""
    if parameterization == "eps":
        return eps
    if parameterization == "x0":
        return x0
    return signal * eps - noise * x0


def predict_x0(parameterization: Parameterization, output: Tensor, x_t: Tensor, signal: Rate, noise: Rate) -> Tensor:
    """The clean image that a network's output implies; with eps prediction `signal` must not be 0."""
    if parameterization == "eps":
        return (x_t - noise * output) / signal
    if parameterization == "x0":
        return output
    return signal * x_t - noise * output


def predict_eps(parameterization: Parameterization, output: Tensor, x_t: Tensor, signal: Rate, noise: Rate) -> Tensor:
    """The noise that a network's output implies; with x0 prediction `noise` must not be 0."""
    if parameterization == "eps":
        return output
    if parameterization == "x0":
        return (x_t - signal * output) / noise
    return noise * x_t + signal * output


# ----------------------------------------------------------------------------
# Training.


TimestepDistribution = Literal["uniform", "logit_normal"]
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
) -> Tensor:
    """The mean squared error of the network's output at random t, a scalar (Equation 14 of DDPM, arXiv:2006.11239).

    `x0` [N, ...] on the network's device; t and eps are drawn from `draws`.
    `min_snr_gamma` and `snr_offset` weight each image by `min_snr_weight`; `weight` [N, 1, ...], of mean 1 over an image, weights
    its pixels, for example by a mask of what is valid. `log_variance` is a learned u(t): the error e of an image becomes
    e / exp(u) + u, which at the best u, log e, lets every noise level count equally (Equation 21 of EDM2, arXiv:2312.02696).
    """
    t = draw_timesteps(schedule.num_timesteps, timesteps, draws)
    eps = draws.randn(*x0.shape[1:])
    signal, noise = schedule.rates_like(t, x0)
    output = network(signal * x0 + noise * eps, t, condition)
    target = output_target(parameterization, x0, eps, signal, noise)
    error = (output.float() - target.float()).square()
    per_image = (error if weight is None else error * weight).flatten(1).mean(1)
    if min_snr_gamma is not None:
        per_image = per_image * min_snr_weight(schedule.snr(t), min_snr_gamma, parameterization, snr_offset)
    if log_variance is not None:
        u = log_variance(t).float()
        per_image = per_image / u.exp() + u
    return per_image.mean()


def draw_timesteps(num_timesteps: int, distribution: TimestepDistribution, draws: Draws) -> Tensor:
    """Timesteps long [N]: uniform, or T sigmoid(n) for normal n, which is denser in the middle (Equation 19 of arXiv:2403.03206)."""
    if distribution == "uniform":
        return draws.randint(num_timesteps)
    return (draws.randn().sigmoid() * num_timesteps).long().clamp(max=num_timesteps - 1)


class LossWeighting(nn.Module):
    """How noise levels count in training: `options` are arguments of `diffusion_loss`, and the parameters are trained beside
    the network's and not kept.

    "learned" is a learned log-variance, "min_snr" the weight min(SNR + 1, 5) on the x0 error (min(SNR, 5) with eps prediction,
    where an offset is undefined), "none" the plain error of the output.
    """

    def __init__(self, kind: LossWeight, parameterization: Parameterization, timesteps: TimestepDistribution) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"timesteps": timesteps}
        if kind == "learned":
            self.log_variance = LogVariance()
            self.options["log_variance"] = self.log_variance
        if kind == "min_snr":
            self.options |= {"min_snr_gamma": 5.0, "snr_offset": 0.0 if parameterization == "eps" else 1.0}


class LogVariance(nn.Module):
    """A learned u(t) for `diffusion_loss`: one linear layer on sines and cosines of t, 0 at first; used in training alone."""

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.embed = SinusoidalEmbedding(channels)
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear(self.embed(t)).squeeze(-1)  # [N]


def min_snr_weight(snr: Tensor, gamma: float, parameterization: Parameterization, offset: float = 0.0) -> Tensor:
    """The weight min(SNR + offset, gamma) on the x0 error, for the error of the given output.

    Offset 0 is min-SNR (Hang et al. 2023, arXiv:2303.09556, Section 3.4): for eps min(SNR, gamma) / SNR, written as
    min(1, gamma / SNR) to be finite (1) at SNR 0; for v min(SNR, gamma) / (SNR + 1). Offset 1 clips the weight SNR + 1 that
    v prediction has by itself (Appendix D of arXiv:2202.00512), and so keeps it at high noise, where an image's coarse
    structure is decided; with eps prediction it would be infinite at SNR 0 and raises ValueError.
    """
    if parameterization == "eps":
        if offset:
            raise ValueError("an offset to the SNR weight needs x0 or v prediction")
        return (gamma / snr).clamp(max=1.0)
    weight = (snr + offset).clamp(max=gamma)
    return weight if parameterization == "x0" else weight / (snr + 1.0)


def drop_context(context: Tensor, null: Tensor | int, probability: float, draws: Draws) -> Tensor:
    """`context` [N, ...] with each image's entry replaced by `null` with the given probability.

    Training on both is what classifier-free guidance needs (Algorithm 1 of Ho and Salimans 2022, arXiv:2207.12598).
    """
    dropped = draws.rand() < probability
    null = torch.as_tensor(null, dtype=context.dtype, device=context.device)
    return torch.where(dropped.view(-1, *[1] * (context.dim() - 1)), null, context)


# ----------------------------------------------------------------------------
# Sampling: from a network to (x0, eps).


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond): scale 1 is conditional, 0 unconditional.

    Ho and Salimans (arXiv:2207.12598, Equation 6) and the homework's `guide_w` count from the conditional: scale = w + 1.
    The map from eps to x0 or v is affine at a fixed x_t, so the formula holds for each of them.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided_output: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Pulls each image's standard deviation towards the conditional output's (Equations 15 and 16 of arXiv:2305.08891)."""
    axes = tuple(range(1, cond.dim()))
    rescaled = guided_output * (cond.std(axes, keepdim=True) / guided_output.std(axes, keepdim=True))
    return phi * rescaled + (1.0 - phi) * guided_output


def guided(
    network: Network,
    condition: Condition,
    null: Condition,
    scale: float,
    *,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Predict:
    """Classifier-free guidance in one network call: both halves go through as one batch of 2N.

    `interval` = (lowest t, highest t) limits guidance to those t (Kynkäänniemi et al. 2024, arXiv:2404.07724); outside it, and
    at scale 1, only the conditional half is computed. `rescale` is phi of `rescale_guidance`.
    """

    def predict(x_t: Tensor, t: int) -> Tensor:
        timesteps = torch.full((len(x_t),), t, device=x_t.device)
        inside = interval is None or interval[0] <= t <= interval[1]
        if scale == 1.0 or not inside:
            return network(x_t, timesteps, condition)
        if scale == 0.0:
            return network(x_t, timesteps, null)
        output = network(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), _stack(condition, null))
        cond, uncond = output.chunk(2)
        result = guide(cond, uncond, scale)
        return rescale_guidance(result, cond, rescale) if rescale else result

    return predict


def switched(inside: Predict, outside: Predict, interval: tuple[int, int]) -> Predict:
    """One prediction at lowest t <= t <= highest t, another elsewhere."""
    return lambda x_t, t: (inside if interval[0] <= t <= interval[1] else outside)(x_t, t)


def denoiser(
    predict: Predict,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    *,
    clip_x0: bool,
    eps_of_clipped: bool = False,
) -> Denoise:
    """Turns a network's output into `(x0, eps)` for the samplers.

    `clip_x0` clamps x0 to [-1, 1]: on for pixels, off for latents. It comes after guidance. eps stays the network's own, which
    the homework's faces need, or with `eps_of_clipped` is what x_t holds beside the clamped x0 (as in the code of Dhariwal and
    Nichol 2021, arXiv:2105.05233): under strong guidance, where much is clamped, DDIM loses the image otherwise.
    """

    def denoise(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        signal, noise = schedule.rates(t)
        if signal == 0.0 and parameterization == "eps":
            raise ValueError("eps prediction is undefined at a signal-to-noise ratio of 0: use v or x0 prediction")
        output = predict(x_t, t)
        x0 = predict_x0(parameterization, output, x_t, signal, noise)
        if not clip_x0:
            return x0, predict_eps(parameterization, output, x_t, signal, noise)
        clamped = x0.clamp(-1.0, 1.0)
        if eps_of_clipped:
            return clamped, (x_t - signal * clamped) / noise
        return clamped, predict_eps(parameterization, output, x_t, signal, noise)

    return denoise


def _stack(condition: Condition, null: Condition) -> Condition:
    if isinstance(condition, Mapping):
        return {name: torch.cat([condition[name], null[name]]) for name in condition}
    if isinstance(condition, Tensor):
        return torch.cat([condition, null])
    return condition.stack(null)
