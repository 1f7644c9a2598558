"""Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) with an optional ControlNet.

One class serves Stable Diffusion and the small model. It maps images to latents and back, prompts
to context, and provides `apply_model`, the network that `common.diffusion.process` and
`common.diffusion.samplers` take. ControlNet is Zhang et al. 2023 (arXiv:2302.05543).

    cond, null = (LatentCondition(model.encode_text(texts), hint) for texts in (prompts, [""] * N))
    predict = model.predictor(cond, null, scale=7.5)
    denoise = denoiser(predict, model.schedule, model.parameterization, clip_x0=False)
    x0 = sample("dpmpp_2m", denoise, model.schedule, x_T, timestep_pairs, noise=noise)
    images = model.decode(x0)
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from common.diffusion.guidance import guided, switched
from common.diffusion.process import Network, Parameterization, Predict
from common.diffusion.schedule import NoiseSchedule
from common.errors import InputError
from common.seeds import StackedRandomGenerator

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from transformers import CLIPTextModel, CLIPTokenizer

SD_SCALE_FACTOR = 0.18215
"""The factor by which Stable Diffusion v1 multiplies the autoencoder's latents."""
LARGE = 512 * 512
"""Pixels of an image from which on images are encoded and decoded one by one."""


@dataclasses.dataclass(frozen=True)
class LatentCondition:
    """The network's inputs besides x_t and t."""

    context: Tensor
    """Text features [N, L, D]."""
    hint: Tensor | None = None
    """Control image [N, 3, H, W] in [0, 1] (not [-1, 1]: see `common.images.to_hint`); None is no
    control."""
    control_scales: tuple[float, ...] | None = None
    """Factor of each control residual, the middle block's last; None is 1 for each."""
    control_context: Tensor | None = None
    """Text features [N, L, D] that the ControlNet reads; None is `context`."""
    hint_features: Tensor | None = None
    """The hint, encoded by the ControlNet [N, width, h, w], so that sampling does it once for all
    steps; None: it is encoded in each."""
    controlled: int | None = None
    """Number of images, from the first on, that the hint applies to; None is all. Set by `stack`.
    """
    perturbed: bool = False
    """Whether self-attention in the U-Net's `pag_applied_layers` is the identity, as
    perturbed-attention guidance needs it."""

    def stack(self, other: "LatentCondition") -> "LatentCondition":
        """Both conditions as one batch, this one first.

        If only this condition has a hint, the other half of the batch has no control. Raises
        ValueError if only the other has a hint, or if both have one and their scales differ.
        """
        context = torch.cat([self.context, other.context])
        if other.hint is None:
            controlled = None if self.hint is None else len(self.hint)
            return dataclasses.replace(self, context=context, controlled=controlled)
        if (
            self.hint is None
            or self.control_scales != other.control_scales
            or (self.control_context is None) != (other.control_context is None)
        ):
            raise ValueError(
                "if the second condition has a hint, the first needs one with the same control"
                " scales and kind of control context"
            )

        def both(name: str) -> Tensor | None:
            parts = [getattr(self, name), getattr(other, name)]
            return None if any(part is None for part in parts) else torch.cat(parts)

        names = ("hint", "control_context", "hint_features")
        return dataclasses.replace(self, context=context, **{name: both(name) for name in names})

    def without_control(self) -> "LatentCondition":
        """This condition without its hint."""
        return LatentCondition(self.context)

    def perturb(self) -> "LatentCondition":
        """This condition with perturbed self-attention."""
        return dataclasses.replace(self, perturbed=True)


class Guidance(NamedTuple):
    """The scales of both kinds of guidance."""

    scale: float
    """Of classifier-free guidance; 1 is none."""
    pag_scale: float
    """Of perturbed-attention guidance; 0 is none."""


SD_GUIDANCE = Guidance(7.5, 0.0)


class LatentDiffusion(nn.Module):
    """Frozen networks of a latent-diffusion model; only `controlnet` is trained.

    - `autoencoder` is diffusers' AutoencoderKL or AutoencoderDC, `unet` is diffusers',
      `text_encoder` and `tokenizer` are transformers'. The constructor freezes the three networks;
      they stay in evaluation mode after `train()`.
    - `schedule` and `parameterization` are those that the U-Net was trained with.
    - Latents are (z - latent_mean) / latent_std, each one number or one for each channel; the
      defaults are Stable Diffusion's.
    - `default_guidance` has the scales used if none are given, `default_controlled_guidance` those
      with a ControlNet; both are Stable Diffusion's by default.
    - Perturbed-attention guidance perturbs the blocks of the U-Net whose names begin with one of
      `pag_applied_layers`; the default is the choice of Ahn et al. 2024 (arXiv:2403.17377) for
      Stable Diffusion.
    - `controlnet(x_t, hint, t, context, hint_features)` returns the residuals of the decoder's skip
      connections, then the residual of the middle block.

    `no_grad` wraps encoding and decoding of images and `encode_text` only; ControlNet's gradient
    flows through the frozen decoder of the U-Net.
    """

    def __init__(
        self,
        autoencoder: "AutoencoderKL | AutoencoderDC",
        text_encoder: "CLIPTextModel",
        tokenizer: "CLIPTokenizer",
        unet: "UNet2DConditionModel",
        schedule: NoiseSchedule,
        *,
        parameterization: Parameterization = "eps",
        latent_mean: float | Sequence[float] = 0.0,
        latent_std: float | Sequence[float] = 1.0 / SD_SCALE_FACTOR,
        default_guidance: Guidance = SD_GUIDANCE,
        default_controlled_guidance: Guidance = SD_GUIDANCE,
        pag_applied_layers: Sequence[str] = ("mid_block",),
        controlnet: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.text_encoder, self.unet = autoencoder, text_encoder, unet
        self.controlnet, self.default_guidance = controlnet, default_guidance
        self.default_controlled_guidance = default_controlled_guidance
        self.pag_applied_layers = tuple(pag_applied_layers)
        self.tokenizer, self.schedule, self.parameterization = tokenizer, schedule, parameterization
        # Not persistent: they belong to the configuration, and a state dict of the ControlNet alone
        # must not contain them.
        for name, value in (("latent_mean", latent_mean), ("latent_std", latent_std)):
            self.register_buffer(
                name,
                torch.as_tensor(value, dtype=torch.float32).view(1, -1, 1, 1),
                persistent=False,
            )
        for frozen in self._frozen():
            frozen.requires_grad_(False).eval()

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return downscale_of(self.autoencoder)

    @property
    def latent_side(self) -> int:
        """Side of the latents that the U-Net was trained on."""
        return self.unet.config.sample_size

    @property
    def side(self) -> int:
        """Side of the model's pictures, in pixels."""
        return self.latent_side * self.downscale

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Sets the mode of `controlnet` only: dropout in a frozen network would add noise."""
        super().train(mode)
        for frozen in self._frozen():
            frozen.eval()
        return self

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Saves memory in training: activations are recomputed in the backward pass.

        With a ControlNet, this applies to it and the U-Net's frozen decoder: the frozen encoder and
        middle block then store no activations for the backward pass, and a checkpoint would keep
        their inputs. Without one, the gradient runs through the whole U-Net, to what is learned in
        its text.
        """
        if enabled:
            self.unet.enable_gradient_checkpointing()
            if self.controlnet is None:
                return
            for module in (*self.unet.down_blocks.modules(), *self.unet.mid_block.modules()):
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
        else:
            self.unet.disable_gradient_checkpointing()
        if self.controlnet is not None:
            self.controlnet.enable_gradient_checkpointing(enabled)

    def cast(self, dtype: torch.dtype) -> "LatentDiffusion":
        """Converts the frozen weights of U-Net, ControlNet and text encoder, in place.

        Weights that are trained (`requires_grad`) keep their dtype: run the network under autocast
        then. The autoencoder stays as it is, in float32: the activations of its decoder can exceed
        fp16's largest number, 65504 (diffusers' `force_upcast`), and bf16's numbers near 1 are
        1 / 128 apart, a grey level of the picture. Decoding is 5 % of a picture's operations.
        """
        for network in (self.unet, self.controlnet, self.text_encoder):
            for param in network.parameters() if network is not None else ():
                if not param.requires_grad:
                    param.data = param.data.to(dtype)
        return self

    def choose_attention(self, mixed_precision: str) -> None:
        """Selects the attention implementation that trains faster.

        In bf16 on a CPU that is two matrix products and a softmax, because the backward pass of
        PyTorch's fused function takes several times as long there; otherwise diffusers' choice is
        kept.
        """
        from diffusers.models.attention_processor import Attention, AttnProcessor

        if mixed_precision != "bf16" or self.unet.device.type != "cpu":
            return
        for network in (self.unet, self.controlnet):
            for module in network.modules() if network is not None else ():
                if isinstance(module, Attention):
                    module.set_processor(AttnProcessor())

    # ------------------------------------------------------------------------
    # Images and text.

    @torch.no_grad()
    def encode(self, images: Tensor, generators: StackedRandomGenerator | None = None) -> Tensor:
        """Latents [N, C, h, w] of images [N, 3, H, W] in [-1, 1].

        They are the posterior's mean or, with `generators`, a sample from the posterior.
        AutoencoderDC has no posterior: its latents are deterministic. From 512x512 pixels on images
        are encoded one by one, which needs 0.8 GB each.
        """
        images = images.to(self.autoencoder.dtype)
        large = images[0, 0].numel() >= LARGE
        with _full_precision(images.device):
            parts = [
                self.autoencoder.encode(part) for part in images.split(1 if large else len(images))
            ]
        if "latent" in parts[0]:
            z = torch.cat([part.latent for part in parts]).float()
        else:
            z = torch.cat([part.latent_dist.mean for part in parts]).float()
            if generators is not None:
                std = torch.cat([part.latent_dist.std for part in parts]).float()
                z = z + std * generators.randn(*z.shape[1:])
        return (z - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 [N, 3, H, W] of latents [N, C, h, w]; about in [-1, 1], not clamped.

        From 512x512 pixels on they are decoded one by one, which needs 0.8 GB each.
        """
        z = (latents * self.latent_std + self.latent_mean).to(self.autoencoder.dtype)
        large = z[0, 0].numel() * self.downscale**2 >= LARGE
        with _full_precision(latents.device):
            parts = [
                self.autoencoder.decode(part).sample for part in z.split(1 if large else len(z))
            ]
        return torch.cat(parts).float()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Context [N, 77, D] of prompts.

        It is the text encoder's last hidden state after the final layer norm, at all positions,
        padding included. A prompt that is too long is truncated, as in Stable Diffusion.
        """
        return self.encode_tokens(self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, long [N, 77], padded or truncated."""
        length = self.tokenizer.model_max_length
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Context [N, 77, D] of token ids.

        The gradient reaches the trained parameters of the text encoder, such as a learned word.
        """
        return self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state

    # ------------------------------------------------------------------------
    # The network.

    def apply_model(self, x_t: Tensor, t: Tensor, cond: LatentCondition) -> Tensor:
        """The U-Net's output, like x_t [N, C, h, w], for t long [N].

        `parameterization` states what the output is: eps, x0 or v. With a hint, each control
        residual, times its scale, is added to its skip connection in the decoder, and the last one
        to the middle block's output (Equation 2 and Figure 3 of arXiv:2302.05543). The frozen
        encoder receives none.
        """
        if cond.perturbed:
            with self._perturbed_attention():
                return self.apply_model(x_t, t, dataclasses.replace(cond, perturbed=False))
        dtype = self.unet.dtype
        skips = middle = None
        if cond.hint is not None:
            *skips, middle = (residual.to(dtype) for residual in self._control(x_t, t, cond))
        output = self.unet(
            x_t.to(dtype),
            t,
            cond.context.to(dtype),
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def predictor(
        self,
        condition: LatentCondition,
        null: LatentCondition,
        scale: float,
        *,
        pag_scale: float = 0.0,
        control: tuple[int, int] | None = None,
        interval: tuple[int, int] | None = None,
        rescale: float = 0.0,
        network: Network | None = None,
    ) -> Predict:
        """`common.diffusion.guidance.guided` of this model, with control at selected timesteps.

        `pag_scale` is the scale of perturbed-attention guidance; 0 is none. `control` =
        (lowest t, highest t) limits control to those t (see `control_interval`, which
        computes it from fractions of the trajectory); None is no limit. For guess mode, `null` has
        no hint and `condition` has `guess_mode_scales`. `network` replaces `apply_model`.
        """
        network = network or self.apply_model

        def predict(condition: LatentCondition, null: LatentCondition) -> Predict:
            return guided(
                network,
                condition,
                null,
                scale,
                perturbed=condition.perturb(),
                pag_scale=pag_scale,
                interval=interval,
                rescale=rescale,
            )

        controlled = predict(condition, null)
        if control is None or condition.hint is None:
            return controlled
        free = predict(condition.without_control(), null.without_control())
        return switched(controlled, free, control)

    def encode_hint(self, hint: Tensor) -> Tensor:
        """The ControlNet's features of a hint [N, 3, H, W] in [0, 1], for `hint_features`."""
        return self.controlnet.encode_hint(hint.to(next(self.controlnet.parameters()).dtype))

    def _control(self, x_t: Tensor, t: Tensor, cond: LatentCondition) -> list[Tensor]:
        """The scaled control residuals; zero for the images that the hint does not apply to."""
        if self.controlnet is None:
            raise InputError("a control image was given, but the model has no ControlNet")
        n = len(x_t) if cond.controlled is None else cond.controlled
        dtype = next(self.controlnet.parameters()).dtype
        context = cond.context if cond.control_context is None else cond.control_context
        residuals = self.controlnet(
            x_t[:n].to(dtype), cond.hint.to(dtype), t[:n], context[:n].to(dtype), cond.hint_features
        )
        if cond.control_scales is not None:
            if len(cond.control_scales) != len(residuals):
                raise InputError(
                    f"the model takes {len(residuals)} control scales, not"
                    f" {len(cond.control_scales)}"
                )
            residuals = [r * scale for r, scale in zip(residuals, cond.control_scales, strict=True)]
        if n == len(x_t):
            return residuals
        return [torch.cat([r, r.new_zeros(len(x_t) - n, *r.shape[1:])]) for r in residuals]

    @contextlib.contextmanager
    def _perturbed_attention(self) -> Iterator[None]:
        """Inside the block, each latent attends only to itself in `pag_applied_layers`.

        Only self-attention is replaced. Its map becomes the identity, so that its output is the
        projected values (arXiv:2403.17377).
        """
        layers = [
            block.attn1
            for name, block in self.unet.named_modules()
            if hasattr(block, "attn1") and name.startswith(self.pag_applied_layers)
        ]
        processors = [layer.processor for layer in layers]
        try:
            for layer in layers:
                layer.set_processor(_identity_attention)
            yield
        finally:
            for layer, processor in zip(layers, processors, strict=True):
                layer.set_processor(processor)

    def _frozen(self) -> tuple[nn.Module, ...]:
        return self.autoencoder, self.text_encoder, self.unet


def _identity_attention(attention: "Attention", hidden_states: Tensor, **_: Any) -> Tensor:
    """diffusers' attention processor with the identity as the attention map."""
    project, dropout = attention.to_out
    return dropout(project(attention.to_v(hidden_states)))


def _full_precision(device: torch.device) -> torch.autocast:
    """Inside the block, autocast is off."""
    return torch.autocast(device.type, enabled=False)


def downscale_of(autoencoder: "AutoencoderKL | AutoencoderDC") -> int:
    """Pixels per latent along each side."""
    config = autoencoder.config
    return 2 ** (len(config.get("block_out_channels") or config.encoder_block_out_channels) - 1)
