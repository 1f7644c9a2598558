"""Differences between versions of transformers and diffusers, in memory and in saved folders.

- Names of CLIPTextModel's weights. Earlier: the prefix `text_model.`, in files up to transformers 4
  and in memory up to transformers 5.0. Later: no prefix.
- Table of position indices among CLIP's weights. Earlier: in files of transformers 4. Later: none.
- Vocabulary of a tokenizer. Earlier: vocab.json (transformers 4). Later: tokenizer.json.
- Arguments of CLIPTokenizer. Earlier: file names (transformers 4, which is not supported). Later:
  the vocabulary itself.
- Configuration with values of a wrong type. Earlier: an exception of the network. Later:
  `StrictDataclassError`, before the network is built.
- Keys of a configuration: each version writes the keys that it knows; later ones have defaults.

requirements.txt states the oldest supported versions. The libraries are imported inside the
functions that need them.
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


# ----------------------------------------------------------------------------
# Names of weights.


def text_prefix(names: Iterable[str], before: str = "") -> str:
    """TEXT_PREFIX if any name of a CLIPTextModel's weights has this prefix, else "".

    `before` is a prefix that the file puts in front of all names.
    """
    return TEXT_PREFIX if any(name.startswith(before + TEXT_PREFIX) for name in names) else ""


def without_positions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the tables of position indices, which hold just 0, 1, 2, ..."""
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


# ----------------------------------------------------------------------------
# Configurations and tokenizers.


def defaults_of(build: Callable[..., Any]) -> dict[str, Any]:
    """Default values of the parameters of a function or class, by name.

    They fill in the keys that a configuration leaves out, since a library version writes only the
    keys that it knew.
    """
    parameters = inspect.signature(build).parameters.items()
    return {
        name: given.default
        for name, given in parameters
        if given.default is not inspect.Parameter.empty
    }


def new_text_model(config: "Mapping[str, Any] | CLIPTextConfig") -> "CLIPTextModel":
    """A new CLIPTextModel in evaluation mode.

    Raises ValueError if the configuration does not describe one.
    """
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
    """A byte-pair CLIPTokenizer that pads and truncates to `context_length` ids."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), model_max_length=context_length
    )


def read_vocabulary(folder: Path) -> Any:
    """The vocabulary {token: id} in a tokenizer's folder, from vocab.json or tokenizer.json.

    Raises InputError if the folder has neither file.
    """
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json").get("model", {}).get("vocab")
    raise InputError(f"{folder} holds no tokenizer: neither vocab.json nor tokenizer.json")
