"""Types and bounds of what the configuration files of CLIPs hold, of transformers and open_clip."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from common.config import Depth, Fraction, NonNegative, Positive, Size, bounds, check_entries

_Channels = tuple[float, float, float]
_Deviations = tuple[Positive, Positive, Positive]
_Sides = Size | tuple[Size, Size]
_Tokens = Annotated[int, *bounds(at_least=1, at_most=10**6)]
_Token = Annotated[int, *bounds(at_least=0, at_most=10**6)]

TRANSFORMERS_TOWER: dict[str, Any] = {
    "vocab_size": _Tokens,
    "hidden_size": Size,
    "intermediate_size": Size,
    "projection_dim": Size,
    "num_hidden_layers": Depth,
    "num_attention_heads": Depth,
    "max_position_embeddings": Size,
    "image_size": Size,
    "patch_size": Size,
    "layer_norm_eps": Positive,
    "attention_dropout": Fraction,
    "dropout": Fraction,
    "hidden_act": str,
    "initializer_range": NonNegative,
    "initializer_factor": NonNegative,
    "bos_token_id": _Token,
    "eos_token_id": _Token,
    "pad_token_id": _Token,
    "return_dict": Literal[True],
    "output_hidden_states": bool,
    "output_attentions": bool,
    "quantization_config": None,
}
"""Entries of transformers' config.json: a text encoder, or each tower of a CLIP."""


TRANSFORMERS_IMAGES: dict[str, Any] = {"image_mean": _Channels, "image_std": _Deviations}
"""Entries of transformers' preprocessor_config.json."""

MODEL: dict[str, Any] = {
    "embed_dim": Size,
    "quick_gelu": bool,
    "vision_cfg": dict,
    "text_cfg": dict,
}
"""Entries of model_cfg in open_clip_config.json."""

TOWER: dict[str, Any] = {
    "image_size": _Sides,
    "patch_size": _Sides,
    "layers": Depth | tuple[Depth, ...],
    "width": Size,
    "heads": Depth,
    "head_width": Size,
    "mlp_ratio": Positive,
    "context_length": Size,
    "vocab_size": _Tokens,
}
"""Entries of vision_cfg and text_cfg in it."""

IMAGES: dict[str, Any] = {
    "mean": _Channels,
    "std": _Deviations,
    "size": _Sides,
    "interpolation": str,
    "resize_mode": str,
}
"""Entries of preprocess_cfg in open_clip_config.json."""


def check_model_cfg(model_cfg: Mapping[str, Any], path: Path) -> None:
    """Checks the entries of a model_cfg of open_clip; absent ones are open_clip's to judge.

    Raises InputError that names the file `path` and the entry.
    """
    check_entries(model_cfg, MODEL, path)
    for tower in ("vision_cfg", "text_cfg"):
        check_entries(model_cfg.get(tower) or {}, TOWER, path)
