"""Finding CLIP's weights, in the local caches before any network, and reading them in every form they come in.

Weights come as a tag of open_clip, a file (`.pt`, OpenAI's TorchScript archives included, `.bin`, `.safetensors`) or a
transformers folder.
"""

import difflib
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_pickle, load_tensors
from common.clip.formats import State, from_transformers
from common.errors import InputError

NETWORK_TIMEOUT = 5.0  # seconds to find out whether there is a network


def find_weights(name: str, pretrained: str) -> Path:
    """The file or folder with the weights: as given, or from a local cache, or fetched. Raises InputError that says what is
    missing and where to put it, at once where there is no network."""
    check_model_name(name)
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.pretrained import download_pretrained

    if Path(pretrained).exists():
        return Path(pretrained)
    entry = tag_entry(name, pretrained)
    if not entry:
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise InputError(f"{pretrained!r} is neither a file nor a set of weights of {name}, which has: {tags}")
    if found := _cached(entry):
        return found
    missing = (
        f"the weights {pretrained!r} of {name} are not in the local cache ({_source(entry)}) and could not be fetched ({{}}); "
        "fetch that file where there is a network and give it by --pretrained FILE"
    )
    if not network_reachable():
        raise InputError(missing.format("no network"))
    try:
        return Path(download_pretrained(get_pretrained_cfg(name, pretrained) or entry))
    except Exception as error:  # open_clip and the hub raise many kinds
        raise InputError(missing.format(error)) from None


def check_model_name(name: str) -> None:
    """Raises InputError that suggests the nearest names if open_clip does not know the model."""
    from open_clip import list_models

    if name in list_models():
        return
    if "/" in name or name.startswith("."):
        raise InputError(f"the model folder {name} does not exist")
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"open_clip knows no model {name!r}{hint}")


def network_reachable() -> bool:
    """Whether the hub answers within seconds; proxies and the hub's offline switch are respected."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT):
                answers.append(True)
        except urllib.error.HTTPError:  # it answered
            answers.append(True)
        except (OSError, ValueError):
            pass

    # Name resolution knows no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    return bool(answers)


def tag_entry(name: str, tag: str) -> dict[str, Any]:
    """What open_clip knows of a tag: where the weights are, preprocessing, activation; empty if it is no tag of the model."""
    from open_clip import get_pretrained_cfg

    return get_pretrained_cfg(name, tag) or {}


def _cached(entry: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if entry.get("url"):
        file = Path("~/.cache/clip").expanduser() / Path(urllib.parse.urlparse(entry["url"]).path).name
        if file.is_file():
            return file
    if entry.get("hf_hub"):
        repository, names = _hub_files(entry)
        for file_name in names:
            if isinstance(found := try_to_load_from_cache(repository, file_name), str):
                return Path(found)
    return None


def _hub_files(entry: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The repository on the hub and the files it may keep the weights in, the safe ones first."""
    repository, _, name = entry["hf_hub"].rpartition("/")
    name = name or "open_clip_pytorch_model.bin"
    safe = [str(Path(name).with_suffix(".safetensors"))]
    return repository, list(
        dict.fromkeys((["open_clip_model.safetensors"] if name.startswith("open_clip_") else []) + safe + [name])
    )


def _source(entry: Mapping[str, Any]) -> str:
    if entry.get("hf_hub"):
        repository, names = _hub_files(entry)
        return f"{names[0]} of {repository}"
    return Path(urllib.parse.urlparse(entry.get("url", "")).path).name


# ----------------------------------------------------------------------------
# Reading.


def weight_files(folder: Path) -> list[Path]:
    """Where a folder may keep its weights, the safe forms first."""
    names = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
    return [folder / name for name in names]


def read_state(path: Path) -> State:
    """The tensors of a weight file or transformers folder, by open_clip's names where they had transformers'."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in weight_files(path) if file.is_file()]
        if not files:
            raise InputError(f"{path} holds no weights: one of model.safetensors and pytorch_model.bin is expected")
        path = files[0]
    if path.suffix == ".safetensors":
        content: Any = load_tensors(path)[0]
    elif _is_torchscript(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.jit.load(str(path), map_location="cpu").state_dict()
    else:
        content = load_pickle(path)
        content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no weights of a network")
    # Data parallelism prefixes names; OpenAI's archives carry three sizes beside the weights.
    state = {
        name.removeprefix("module."): value
        for name, value in content.items()
        if name not in ("input_resolution", "context_length", "vocab_size") and not name.endswith("position_ids")
    }
    return from_transformers(state) if any(name.startswith("text_model.") for name in state) else state


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def fitted(network: nn.Module, state: State) -> State:
    """The state in the form of the network: text tower apart or not, logit scale with or without a dimension."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(network, state)
    if "positional_embedding" in state and not hasattr(network, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state = state | {"logit_scale": state["logit_scale"].reshape(network.logit_scale.shape)}
    return state
