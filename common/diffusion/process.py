"""The diffusion process: adding noise, parameterizations, and the network's output as (x0, eps).

The conventions (index, alpha, sigma) are those of `common/diffusion/schedule.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from common.diffusion.schedule import NoiseSchedule

Parameterization = Literal["eps", "x0", "v"]
Coefficient = float | Tensor  # a number, or [N, 1, ...] for a batch of different t


class Stackable(Protocol):
    """A condition of a class of its own, which can concatenate two conditions into one batch."""

    def stack(self, other: Any) -> Any:
        """Both conditions as one batch, this one first."""
        ...


Condition = Tensor | Mapping[str, Tensor] | Stackable
Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t [N, ...], t long [N], condition) -> output [N, ...]."""
Predict = Callable[[Tensor, int], Tensor]
"""(x_t [N, ...], t) -> a network's output [N, ...] under a fixed condition."""
Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x_t [N, ...], t) -> (x0, eps), each [N, ...]."""


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t of the forward process (Equation 4 of DDPM, arXiv:2006.11239).

    `x0` and `eps` are [N, ...], `t` is long [N]; the result is [N, ...].
    """
    alpha_t, sigma_t = schedule.alpha_sigma_like(t, x0)
    return alpha_t * x0 + sigma_t * eps


def output_target(
    parameterization: Parameterization,
    x0: Tensor,
    eps: Tensor,
    alpha_t: Coefficient,
    sigma_t: Coefficient,
) -> Tensor:
    """The training target of the network's output: eps, x0 or v = alpha_t eps - sigma_t x0.

    v prediction is that of Salimans and Ho 2022 (arXiv:2202.00512).
    """
    if parameterization == "eps":
        return eps
    if parameterization == "x0":
        return x0
    return alpha_t * eps - sigma_t * x0


def predict_x0(
    parameterization: Parameterization,
    output: Tensor,
    x_t: Tensor,
    alpha_t: Coefficient,
    sigma_t: Coefficient,
) -> Tensor:
    """The clean image x0 that a network's output implies; for eps prediction `alpha_t` is not 0."""
    if parameterization == "eps":
        return (x_t - sigma_t * output) / alpha_t
    if parameterization == "x0":
        return output
    return alpha_t * x_t - sigma_t * output


def predict_eps(
    parameterization: Parameterization,
    output: Tensor,
    x_t: Tensor,
    alpha_t: Coefficient,
    sigma_t: Coefficient,
) -> Tensor:
    """The noise eps that a network's output implies; for x0 prediction `sigma_t` is not 0."""
    if parameterization == "eps":
        return output
    if parameterization == "x0":
        return (x_t - alpha_t * output) / sigma_t
    return sigma_t * x_t + alpha_t * output


def denoiser(
    predict: Predict,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    *,
    clip_x0: bool,
    eps_of_clipped: bool = False,
) -> Denoise:
    """Converts a network's output to `(x0, eps)`, the form that the samplers take.

    `clip_x0` clamps x0 to [-1, 1] after guidance: on for pixels, off for latents. By default eps
    stays the network's own, which the homework's reference faces need. With `eps_of_clipped`, eps
    is recomputed from x_t and the clamped x0, as in the code of Dhariwal and Nichol 2021
    (arXiv:2105.05233): under strong guidance, where much is clamped, DDIM fails without it.

    The denoiser raises ValueError for eps prediction at a signal-to-noise ratio of 0.
    """

    def denoise(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        if alpha_t == 0.0 and parameterization == "eps":
            raise ValueError(
                "eps prediction is undefined at a signal-to-noise ratio of 0: use v or x0"
                " prediction"
            )
        output = predict(x_t, t)
        x0 = predict_x0(parameterization, output, x_t, alpha_t, sigma_t)
        if not clip_x0:
            return x0, predict_eps(parameterization, output, x_t, alpha_t, sigma_t)
        clamped = x0.clamp(-1.0, 1.0)
        if eps_of_clipped:
            return clamped, (x_t - alpha_t * clamped) / sigma_t
        return clamped, predict_eps(parameterization, output, x_t, alpha_t, sigma_t)

    return denoise
