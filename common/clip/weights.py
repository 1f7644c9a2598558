"""Finding CLIP weights, in local caches before downloading, and reading all their file formats.

Weights are given as a tag of open_clip, a file (`.pt`, OpenAI's TorchScript archives included,
`.bin`, `.safetensors`) or a transformers folder.
"""

import contextlib
import difflib
import hashlib
import http.client
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common.clip.formats import State, from_transformers
from common.errors import InputError
from common.versions import text_prefix, without_positions
from common.weights import followed, read_weights, weights_file

NETWORK_TIMEOUT = 5.0  # seconds
CACHE = Path("~/.cache/clip")  # where open_clip keeps files that it downloads from a URL
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
"""Entries that only OpenAI's TorchScript archives hold besides the weights."""


def find_weights(name: str, pretrained: str) -> Path:
    """The file or folder with the weights: as given, from a local cache, or downloaded.

    Raises InputError that says what is missing and where to put it; without a network it does so at
    once.
    """
    check_model_name(name)
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.pretrained import download_pretrained

    if Path(pretrained).exists():
        return Path(pretrained)
    entry = tag_entry(name, pretrained)
    if not entry:
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise InputError(
            f"{pretrained!r} is neither a file nor a set of weights of {name}, which has: {tags}"
        )
    if found := _cached(entry):
        return found
    missing = (
        f"the weights {pretrained!r} of {name} are not in the local cache ({_places(entry)}) and"
        " could not be downloaded ({}); download that file where there is a network and put it in"
        " the cache, or give it by --pretrained FILE"
    )
    if not network_reachable():
        raise InputError(missing.format("no network"))
    print(
        f"downloading the weights {pretrained!r} of {name}, some hundred megabytes or more ...",
        file=sys.stderr,
        flush=True,
    )
    try:
        return Path(download_pretrained(get_pretrained_cfg(name, pretrained) or entry))
    except Exception as error:  # open_clip and the hub raise many kinds
        raise InputError(missing.format(error)) from None


def check_model_name(name: str) -> None:
    """Raises InputError if open_clip does not know the model.

    The message suggests similar names.
    """
    from open_clip import list_models

    if name in list_models():
        return
    if Path(name).is_file():
        raise InputError(
            f"{name} is a file of weights: name it with --pretrained, and its model with --model"
        )
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
        raise InputError(
            f"{name} must be downloaded to a folder first: run hf download {repository}"
            " --local-dir FOLDER, then use --model FOLDER"
        )
    if (folder := name.removeprefix("local-dir:")) != name:
        raise InputError(f"a model folder is named by itself: --model {folder}")
    if name.replace("/", "-") in list_models():
        raise InputError(f"open_clip's name of the model {name} is {name.replace('/', '-')}")
    if "/" in name or name.startswith("."):
        raise InputError(f"the model folder {name} does not exist")
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"open_clip knows no model {name!r}{hint}")


def network_reachable() -> bool:
    """Whether the Hugging Face hub answers within NETWORK_TIMEOUT seconds.

    Proxies and the hub's offline switch are respected. A proxy that requires a password (407) or
    cannot reach the hub (500 and above) counts as no network.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT):
                answers.append(True)
        except urllib.error.HTTPError as error:  # something answered
            if error.code < 500 and error.code != 407:
                answers.append(True)
        except (OSError, ValueError, http.client.HTTPException):
            pass

    # Name resolution has no timeout of its own, so the request runs in a thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    return bool(answers)


def tag_entry(name: str, tag: str) -> dict[str, Any]:
    """open_clip's entry for a tag: location of the weights, preprocessing and activation.

    Empty if the model has no such tag.
    """
    from open_clip import get_pretrained_cfg

    return get_pretrained_cfg(name, tag) or {}


def preprocessing(name: str, tag: str | None) -> tuple[dict[str, Any], bool]:
    """The preprocessing of a tag in open_clip's form, and whether it is certain.

    For weights without a tag (None) it is the preprocessing that all tags of the model share. If
    they do not share one, the result is ({}, False), and the empty dict means OpenAI's
    preprocessing.
    """
    from open_clip import list_pretrained_tags_by_model

    keys = ("mean", "std", "interpolation", "resize_mode")
    entries = [
        tag_entry(name, known) for known in ([tag] if tag else list_pretrained_tags_by_model(name))
    ]
    found = [{key: entry[key] for key in keys if entry.get(key)} for entry in entries]
    agreed = bool(found) and all(one == found[0] for one in found)
    return (found[0] if agreed else {}), agreed


@contextlib.contextmanager
def hub_files(name: str) -> Iterator[None]:
    """Inside the block, open_clip may read a model's tokenizer and text configuration from the hub.

    Some models have these files on the hub only. Without a network they are read from the local
    cache; if they are not there either, InputError is raised at once and names the repository.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from open_clip import get_model_config

    text = get_model_config(name)["text_cfg"]
    wanted = {
        text.get("hf_tokenizer_name"): "tokenizer_config.json",
        text.get("hf_model_name"): "config.json",
    }
    wanted = {repository: file for repository, file in wanted.items() if repository}
    before = constants.HF_HUB_OFFLINE
    if wanted and not network_reachable():
        for repository, file in wanted.items():
            if not isinstance(try_to_load_from_cache(repository, file), str):
                raise InputError(
                    f"{name} needs {file} of the repository {repository} on the Hugging Face hub,"
                    " which is not in the local cache, and there is no network: run hf download"
                    f" {repository} where there is one, and copy the cache"
                )
        constants.HF_HUB_OFFLINE = True  # without it open_clip retries for minutes
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _cached(entry: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if entry.get("url"):
        file = CACHE.expanduser() / _file_name(entry["url"])
        if file.is_file():
            check_download(file, entry["url"])
            return file
    if entry.get("hf_hub"):
        repository, names = _hub_files(entry)
        for file_name in names:
            if isinstance(found := try_to_load_from_cache(repository, file_name), str):
                return Path(found)
    return None


def _file_name(url: str) -> str:
    return Path(urllib.parse.urlparse(url).path).name


def check_download(file: Path, url: str) -> None:
    """Raises InputError if the file's SHA-256 is not the one in OpenAI's download address.

    open_clip leaves an incomplete file when a download is interrupted.
    """
    if "openaipublic" not in url:
        return
    with open(file, "rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != url.split("/")[-2]:
            raise InputError(
                f"{file} is incomplete or damaged (its SHA-256 is not the published one): delete it"
            )


def _hub_files(entry: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The repository on the hub and the file names its weights may have, safetensors first."""
    repository, _, name = entry["hf_hub"].rpartition("/")
    name = name or "open_clip_pytorch_model.bin"
    safe = [str(Path(name).with_suffix(".safetensors"))]
    return repository, list(
        dict.fromkeys(
            (["open_clip_model.safetensors"] if name.startswith("open_clip_") else [])
            + safe
            + [name]
        )
    )


def _places(entry: Mapping[str, Any]) -> str:
    """Where a cached file of the weights would be, in words."""
    places = []
    if entry.get("url"):
        places.append(f"{CACHE / _file_name(entry['url'])}")
    if entry.get("hf_hub"):
        repository, names = _hub_files(entry)
        places.append(f"{names[0]} of {repository} in the Hugging Face cache")
    return " or ".join(places)


# ----------------------------------------------------------------------------
# Reading.


FOLDER_NAMES = ("open_clip_model", "model", "open_clip_pytorch_model", "pytorch_model")
"""Names, without their endings, that the file of the weights in a folder may have."""


def read_state(path: Path) -> State:
    """The tensors of a weight file or of a folder of open_clip or transformers, by open_clip's
    names."""
    return read_clip_weights(path)[0]


def read_clip_weights(path: Path) -> tuple[State, bool]:
    """As `read_state`, and whether the file is one of OpenAI's archives."""
    path = followed(path)
    content = read_weights(weights_file(path, FOLDER_NAMES) if path.is_dir() else path)
    # Attention masks are constants, not weights.
    state = {
        name: value
        for name, value in without_positions(content).items()
        if name not in OPENAI_SIZES and not name.endswith("attn_mask")
    }
    from_openai = any(name in content for name in OPENAI_SIZES)
    return from_transformers(state) if text_prefix(state) else state, from_openai


def fitted(network: nn.Module, state: State) -> State:
    """The state dict converted to the network's form.

    Forms differ in whether the text encoder is a module of its own, and in whether the logit scale
    has a dimension.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(network, state)
    if "positional_embedding" in state and not hasattr(network, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state = state | {"logit_scale": state["logit_scale"].reshape(network.logit_scale.shape)}
    return state
