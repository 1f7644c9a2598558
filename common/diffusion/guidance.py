"""Guidance in sampling (classifier-free, by perturbed attention), and dropout of the condition."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.diffusion.process import Condition, Network, Predict
from common.seeds import Draws


def drop_context(context: Tensor, null: Tensor | int, probability: float, draws: Draws) -> Tensor:
    """`context` [N, ...] with each image's entry replaced by `null` at the given probability.

    Classifier-free guidance needs a network trained with and without the condition (Algorithm 1 of
    Ho and Salimans 2022, arXiv:2207.12598).
    """
    dropped = draws.rand() < probability
    if isinstance(null, Tensor):
        null = null.to(context)
    return torch.where(dropped.view(-1, *[1] * (context.dim() - 1)), null, context)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """The guided prediction uncond + scale (cond - uncond).

    Scale 1 gives the conditional prediction, 0 the unconditional one. Ho and Salimans (Equation 6
    of arXiv:2207.12598) and the homework's `guide_w` state the weight w = scale - 1 instead. At a
    fixed x_t the maps from eps to x0 and to v are affine, so the formula holds for all three.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided_output: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Moves each image's standard deviation towards the conditional output's by the fraction `phi`.

    `guided_output` and `cond` are [N, ...]; `phi` lies in [0, 1], and 0 changes nothing (Equations
    15 and 16 of Lin et al. 2023, arXiv:2305.08891).
    """
    axes = tuple(range(1, cond.dim()))
    rescaled = guided_output * (
        cond.std(axes, keepdim=True) / guided_output.std(axes, keepdim=True)
    )
    return phi * rescaled + (1.0 - phi) * guided_output


def guided(
    network: Network,
    condition: Condition,
    null: Condition,
    scale: float,
    *,
    perturbed: Condition | None = None,
    pag_scale: float = 0.0,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Predict:
    """A prediction with classifier-free guidance; both halves share one network call.

    The call has batch size 2N. `interval` = (lowest t, highest t) limits guidance to those t
    (Kynkäänniemi et al. 2024, arXiv:2404.07724); None is no limit. Outside it, and at scale 1, only
    the conditional half is computed; at scale 0 only the unconditional half. `rescale` is phi of
    `rescale_guidance`.

    With `perturbed`, the condition under which self-attention maps are the identity, and a
    `pag_scale` other than 0, pag_scale (cond - perturbed) is added inside the interval
    (perturbed-attention guidance, Ahn et al. 2024, arXiv:2403.17377). That needs the conditional
    half at every scale, and a further call of batch size N.
    """

    def predict(x_t: Tensor, t: int) -> Tensor:
        timesteps = torch.full((len(x_t),), t, device=x_t.device)
        inside = interval is None or interval[0] <= t <= interval[1]
        guides = inside and scale != 1.0
        perturbs = inside and perturbed is not None and pag_scale != 0.0
        if not guides and not perturbs:
            return network(x_t, timesteps, condition)
        if scale == 0.0 and not perturbs:
            return network(x_t, timesteps, null)
        if guides:
            x_both, t_both = torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps])
            cond, uncond = network(x_both, t_both, _stack(condition, null)).chunk(2)
            result = guide(cond, uncond, scale)
        else:
            result = cond = network(x_t, timesteps, condition)
        if perturbs:
            result = result + pag_scale * (cond - network(x_t, timesteps, perturbed))
        return rescale_guidance(result, cond, rescale) if rescale else result

    return predict


def switched(inside: Predict, outside: Predict, interval: tuple[int, int]) -> Predict:
    """The prediction `inside` where lowest t <= t <= highest t, and `outside` elsewhere."""
    return lambda x_t, t: (inside if interval[0] <= t <= interval[1] else outside)(x_t, t)


def _stack(condition: Condition, null: Condition) -> Condition:
    """Both conditions as one batch, `condition` first."""
    if isinstance(condition, Mapping):
        return {name: torch.cat([condition[name], null[name]]) for name in condition}
    if isinstance(condition, Tensor):
        return torch.cat([condition, null])
    return condition.stack(null)
