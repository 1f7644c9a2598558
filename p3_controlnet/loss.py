"""The one training loss over a latent-diffusion model, with or without control: that of a batch
from the cache."""

from torch import Tensor

from common.diffusion.guidance import drop_context
from common.diffusion.loss import diffusion_loss
from common.images import to_hint
from common.latent.model import LatentCondition, LatentDiffusion
from common.seeds import Draws
from common.training import Batch


def latent_loss(
    model: LatentDiffusion,
    batch: Batch,
    null: Tensor,
    draws: Draws,
    *,
    cond_drop_prob: float,
    min_snr_gamma: float | None,
    snr_offset: float,
) -> Tensor:
    """`common.diffusion.loss.diffusion_loss` of a batch of `LatentCache.take`, a scalar.

    A caption gives way to `null` [L, D], the empty prompt's features, with the probability
    `cond_drop_prob`; the hint, where the batch has one, stays.
    """
    context = drop_context(batch["context"].float(), null.float(), cond_drop_prob, draws)
    hint = to_hint(batch["hint"]).expand(-1, 3, -1, -1) if "hint" in batch else None
    return diffusion_loss(
        model.apply_model,
        model.schedule,
        batch["latent"].float(),
        LatentCondition(context, hint),
        draws,
        parameterization=model.parameterization,
        min_snr_gamma=min_snr_gamma,
        snr_offset=snr_offset,
    )
