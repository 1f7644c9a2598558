"""The training loss of a latent-diffusion model, with or without ControlNet, on cached latents."""

from typing import Any

from torch import Tensor

from common.diffusion.guidance import drop_context
from common.diffusion.loss import diffusion_loss
from common.diffusion.process import Network
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
    network: Network | None = None,
    **options: Any,
) -> Tensor:
    """The diffusion loss of a batch from `LatentCache.take`, a scalar.

    With probability `cond_drop_prob`, the text features of an example are replaced by `null`
    [L, D], those of the empty prompt. The hint, if the batch has one, is always kept. `network`
    replaces `model.apply_model`. `options` are keyword arguments of
    `common.diffusion.loss.diffusion_loss`.
    """
    context = drop_context(batch["context"].float(), null.float(), cond_drop_prob, draws)
    textless = "hint" in batch and model.controlnet.control_text == "empty"
    hint = to_hint(batch["hint"]).expand(-1, 3, -1, -1) if "hint" in batch else None
    return diffusion_loss(
        network or model.apply_model,
        model.schedule,
        batch["latent"].float(),
        LatentCondition(
            context, hint, control_context=null.float().expand_as(context) if textless else None
        ),
        draws,
        parameterization=model.parameterization,
        **options,
    )
