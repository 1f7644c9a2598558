"""What differs between versions of transformers and diffusers, in memory and in the folders that
they wrote.

| | earlier | later | |---|---|---| | CLIPTextModel's weights | `text_model.` before each name: in
files up to transformers 4, in memory up to 5.0 | no prefix | | a table of positions among CLIP's
weights | files of transformers 4 | none | | a tokenizer's vocabulary | vocab.json (transformers 4)
| tokenizer.json | | CLIPTokenizer's arguments | files (transformers 4, which is not supported) |
the vocabulary itself | | a configuration of wrong types | the network's own exception |
`StrictDataclassError` before it is built | | AutoencoderKL's attention | query, key, value,
proj_attn (diffusers of 2022) | to_q, to_k, to_v, to_out.0 | | a configuration's keys | those that
its version had | new keys, with defaults |

requirements.txt states the oldest versions that work. Nothing here is imported before it is needed.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from common.errors import InputError
from common.files import read_json

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_PREFIX = "text_model."
_OLD_ATTENTION = (
    (".to_q.", ".query."),
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
)


# ----------------------------------------------------------------------------
# Names of weights.


def text_prefix(names: Iterable[str], before: str = "") -> str:
    """TEXT_PREFIX if any of a CLIPTextModel's weights is named so, else "".

    `before` is what the file puts in front of all names.
    """
    return TEXT_PREFIX if any(name.startswith(before + TEXT_PREFIX) for name in names) else ""


def without_positions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the tables of positions, which are the numbers 0, 1, 2 and so on."""
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def has_old_attention(names: Iterable[str]) -> bool:
    """Whether an autoencoder's weights have the names that diffusers gave them when Stable
    Diffusion came out."""
    return any(".query." in name for name in names)


def old_attention_names(names: Iterable[str]) -> dict[str, str]:
    """{own name: name in such a file} of an autoencoder's weights."""
    table = {}
    for name in names:
        old = name
        for ours, theirs in _OLD_ATTENTION:
            old = old.replace(ours, theirs)
        table[name] = old
    return table


# ----------------------------------------------------------------------------
# Configurations and tokenizers.


def defaults_of(build: Callable[..., Any]) -> dict[str, Any]:
    """What a library assumes where a configuration is silent: a version writes only the keys that
    it knew."""
    parameters = inspect.signature(build).parameters.items()
    return {
        name: given.default
        for name, given in parameters
        if given.default is not inspect.Parameter.empty
    }


def new_text_model(config: "Mapping[str, Any] | CLIPTextConfig") -> "CLIPTextModel":
    """A new CLIPTextModel in evaluation mode. Raises ValueError if the configuration describes
    none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        if isinstance(config, Mapping):
            config = CLIPTextConfig.from_dict(dict(config))
        return CLIPTextModel(config).eval()
    except (StrictDataclassError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def new_tokenizer(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int
) -> "CLIPTokenizer":
    """A CLIPTokenizer of byte pairs that pads and cuts to `context_length` ids."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), model_max_length=context_length
    )


def read_vocabulary(folder: Path) -> Any:
    """The vocabulary {word: id} in a tokenizer's folder. Raises InputError if neither of its two
    forms is there."""
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json").get("model", {}).get("vocab")
    raise InputError(f"{folder} holds no tokenizer: neither vocab.json nor tokenizer.json")
