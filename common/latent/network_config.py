"""Types and bounds of what the configuration files of latent-diffusion models hold.

diffusers and transformers build a network from almost any value and fail later, or not at all.
Their classes share the names of these entries.
"""

from typing import Annotated, Any, Literal

from common.config import Depth, Fraction, Positive, Size, bounds
from common.latent.control import ControlText

_Sizes = Size | tuple[Size, ...]
_Side = Annotated[int, *bounds(at_least=1, at_most=1024)]
Layers = Annotated[int, *bounds(at_least=0, at_most=256)]
"""A number of residual blocks at one resolution, which may be none."""

NETWORK: dict[str, Any] = {
    "sample_size": _Side | tuple[_Side, _Side],
    "in_channels": Size,
    "out_channels": Size,
    "conditioning_channels": Size,
    "latent_channels": Size,
    "block_out_channels": tuple[Size, ...],
    "encoder_block_out_channels": tuple[Size, ...],
    "decoder_block_out_channels": tuple[Size, ...],
    "conditioning_embedding_out_channels": tuple[Size, ...],
    "hint_strides": tuple[Annotated[int, *bounds(at_least=1, at_most=16)], ...] | None,
    "control_text": ControlText,
    "layers_per_block": Depth | tuple[Depth, ...],
    "encoder_layers_per_block": tuple[Layers, ...],
    "decoder_layers_per_block": tuple[Layers, ...],
    "transformer_layers_per_block": Depth | tuple[Depth, ...],
    "attention_head_dim": _Sizes,
    "cross_attention_dim": _Sizes,
    "norm_num_groups": Size,
    "norm_eps": Positive,
    "dropout": Fraction,
    "freq_shift": Annotated[float, *bounds(at_least=0, at_most=1)],
    "downsample_padding": Annotated[int, *bounds(at_least=0, at_most=1)],
    "mid_block_scale_factor": Positive,
    "resnet_out_scale_factor": Positive,
    "scaling_factor": Positive,
    "conv_in_kernel": Size,
    "conv_out_kernel": Size,
    "down_block_types": tuple[str, ...],
    "up_block_types": tuple[str, ...],
    "act_fn": str,
    "upsample_block_type": Literal["pixel_shuffle", "interpolate"],
    "downsample_block_type": Literal["pixel_unshuffle", "conv"],
    "flip_sin_to_cos": bool,
    "use_linear_projection": bool,
    "upcast_attention": bool,
    "encoder_out_shortcut": bool,
    "decoder_in_shortcut": bool,
    "quantization_config": None,
}
"""Entries of diffusers' U-Nets, ControlNets and deep-compression autoencoders."""

SCHEDULER: dict[str, Any] = {
    "_class_name": str,
    "num_train_timesteps": Literal[1000],
    "beta_start": Literal[0.00085],
    "beta_end": Literal[0.012],
    "beta_schedule": Literal["scaled_linear"],
    "rescale_betas_zero_snr": bool,
    "prediction_type": Literal["epsilon", "sample", "v_prediction"],
    "timestep_spacing": Literal["leading", "trailing", "linspace"],
    "clip_sample": bool,
    "set_alpha_to_one": bool,
}
"""Entries of the small model's noise schedule; its constants are those of Stable Diffusion."""
