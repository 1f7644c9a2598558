"""Conversion of a ViT CLIP's weights and configuration between open_clip and transformers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.clip.fingerprint import uses_quick_gelu
from common.errors import InputError
from common.versions import without_positions

if TYPE_CHECKING:
    from transformers import CLIPConfig

State = dict[str, Tensor]
VOCABULARY = 49408  # tokens of CLIP's tokenizer

# (open_clip's name, transformers' name). The projections are transposed, and open_clip stacks q, k
# and v in one matrix.
_TOWERS = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("logit_scale", "logit_scale"),
)
_BLOCKS = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
_TRANSPOSED = {"visual.proj", "text_projection"}


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """The weights of an open_clip ViT under the names of transformers' CLIPModel."""
    result: State = {}
    for name, value in state.items():
        new = _renamed(name, _TOWERS, _BLOCKS)
        if ".attn.in_proj_" in new:
            stem, kind = new.split(".attn.in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                result[f"{stem}.self_attn.{part}_proj.{kind}"] = rows.contiguous()
        else:
            result[new] = value.T.contiguous() if name in _TRANSPOSED else value
    return result


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """The weights of transformers' CLIPModel under the names of open_clip.

    Raises InputError if one of q, k and v is missing or a weight has no counterpart.
    """
    towers, blocks = [tuple((b, a) for a, b in table) for table in (_TOWERS, _BLOCKS)]
    result: State = {}
    for name, value in without_positions(state).items():
        new = _renamed(name, towers, blocks)
        if ".self_attn.q_proj." in new:
            parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if missing := [part for part in parts if part not in state]:
                raise InputError(f"the weights lack {missing[0]}")
            stem, kind = new.split(".self_attn.q_proj.")
            result[f"{stem}.attn.in_proj_{kind}"] = torch.cat([state[part] for part in parts])
        elif ".self_attn.k_proj." not in new and ".self_attn.v_proj." not in new:
            result[new] = value.T.contiguous() if new in _TRANSPOSED else value
    return result


def _renamed(
    name: str, towers: Sequence[tuple[str, str]], blocks: Sequence[tuple[str, str]]
) -> str:
    for old, new in towers:
        if name == old or (old.endswith(".") and name.startswith(old)):
            name = new + name[len(old) :]
            break
    else:
        raise InputError(
            f"the weight {name} has no counterpart in the other library: only plain ViT CLIPs are"
            " converted"
        )
    for old, new in blocks:
        name = name.replace(old, new)
    return name


def transformers_config(network: nn.Module) -> "CLIPConfig":
    """transformers' configuration of an open_clip ViT.

    Raises InputError for other architectures.
    """
    import open_clip
    from transformers import CLIPConfig

    if type(network) is not open_clip.CLIP or not isinstance(
        network.visual, open_clip.transformer.VisionTransformer
    ):
        raise InputError("only plain ViT CLIPs have a counterpart in transformers")
    act = "quick_gelu" if uses_quick_gelu(network) else "gelu"

    def tower(blocks: nn.ModuleList, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": blocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.num_heads,
            "hidden_act": act,
            "projection_dim": network.text_projection.shape[1],
        }

    text_width = network.token_embedding.embedding_dim
    image_width = network.visual.conv1.out_channels
    text = tower(network.transformer.resblocks, text_width) | {
        "vocab_size": network.vocab_size,
        "max_position_embeddings": network.context_length,
        "eos_token_id": network.vocab_size - 1,
        "bos_token_id": network.vocab_size - 2,
        "pad_token_id": network.vocab_size - 1,
    }
    vision = tower(network.visual.transformer.resblocks, image_width) | {
        "image_size": network.visual.image_size[0],
        "patch_size": network.visual.patch_size[0],
    }
    return CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=network.text_projection.shape[1]
    )


def open_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg from the config.json of a CLIPModel.

    Keys that config.json leaves out have transformers' defaults. Raises InputError for an
    activation that open_clip does not have, and for a tokenizer other than CLIP's.
    """
    from transformers import CLIPConfig

    full = CLIPConfig.from_dict(dict(config))
    text, vision = full.text_config, full.vision_config
    if text.hidden_act != vision.hidden_act or text.hidden_act not in ("gelu", "quick_gelu"):
        raise InputError(
            "the activation must be gelu or quick_gelu, the same in both towers, not"
            f" {text.hidden_act} and {vision.hidden_act}"
        )
    if text.vocab_size != VOCABULARY:
        raise InputError(
            f"CLIP's tokenizer has {VOCABULARY} tokens, but this model has {text.vocab_size}"
        )
    return {
        "embed_dim": full.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }
