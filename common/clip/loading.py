"""Loading a CLIP: by open_clip's name, from a folder, or the small model in checkpoints/."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import build_network, load_strict, save_tensors
from common.clip.config import (
    IMAGES,
    TRANSFORMERS_IMAGES,
    TRANSFORMERS_TOWER,
    check_model_cfg,
)
from common.clip.fingerprint import (
    FINGERPRINT_TEXT,
    check_activation,
    check_own_fingerprint,
    fingerprint,
    require_activation,
    uses_quick_gelu,
)
from common.clip.formats import open_clip_config
from common.clip.model import Clip, encode_tokens
from common.clip.weights import (
    FOLDER_NAMES,
    find_weights,
    fitted,
    hub_files,
    preprocessing,
    read_clip_weights,
    read_state,
    tag_entry,
)
from common.config import check_entries, describing, read_entries
from common.devices import DeviceName, pick_device
from common.errors import InputError
from common.files import ROOT, atomic_write, make_folder, shown, write_json
from common.weights import followed, weights_file

SHIPPED = ROOT / "checkpoints" / "clip_shapes"
DEFAULT_MODEL, DEFAULT_TAG = "ViT-B-32-quickgelu", "openai"


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Which CLIP to use, and on which device."""

    model: str | None = None
    """Name of an open_clip model, or a model folder. Default: ViT-B-32-quickgelu, or the project's
    small model if the weights of the former are not available."""
    pretrained: str | None = None
    """Weights: a tag of open_clip, a weight file or a transformers folder. Default: the tag openai.
    """
    device: DeviceName = "auto"
    """Device; auto is CUDA if present, else MPS, else the CPU."""

    def load(self) -> tuple[Clip, str]:
        """The CLIP, and a sentence that says what was loaded (see `load_clip`)."""
        return load_clip(self.model, self.pretrained, self.device)


def load_clip(
    name: str | None = None, pretrained: str | None = None, device: DeviceName = "auto"
) -> tuple[Clip, str]:
    """The requested CLIP, and a sentence that says what was loaded.

    `name` is an open_clip model or a folder; `pretrained` is a tag, a file or a transformers folder
    (default: the tag openai; for a folder its own weights). With neither, it is OpenAI's ViT-B/32
    if that is in a cache or can be downloaded, else the project's small model. Raises InputError if
    the model or tag is unknown, or if the weights do not fit or cannot be found.
    """
    target = pick_device(device)
    if name is None and pretrained is None:
        try:
            weights = find_weights(DEFAULT_MODEL, DEFAULT_TAG)
        except InputError as error:
            if not (SHIPPED / "model.safetensors").is_file():
                raise InputError(
                    f"{error}; the project's small model cannot be used instead, because"
                    f" {SHIPPED}/model.safetensors is missing (clone the repository again, or train"
                    " it with scripts/train_clip.sh)"
                ) from None
            note = (
                f"{DEFAULT_MODEL} with OpenAI's weights is not available, so this is the small"
                f" model of the project, checkpoints/{SHIPPED.name}, which knows coloured shapes"
                f" only: {error}."
            )
            return load_folder(SHIPPED, target), note
        return (
            _load_named(DEFAULT_MODEL, DEFAULT_TAG, weights, target)[0],
            f"{DEFAULT_MODEL} with OpenAI's weights.",
        )
    name = name or DEFAULT_MODEL
    if Path(name).is_dir():
        if pretrained:
            raise InputError(
                f"{name} is a model folder with its own weights: leave out --pretrained"
            )
        name = str(followed(Path(name)))
        return load_folder(Path(name), target), f"The model in {shown(Path(name))}."
    pretrained = pretrained or DEFAULT_TAG
    clip, remark = _load_named(name, pretrained, find_weights(name, pretrained), target)
    return clip, f"{name} with {clip.pretrained}{remark}."


def load_judge(
    name: str | None = None, pretrained: str | None = None, device: DeviceName = "auto"
) -> tuple[Clip | None, str]:
    """Loads a CLIP for scoring and says which; returns (None, reason) if none is available.

    `name` and `pretrained` are those of `load_clip`; the default is OpenAI's ViT-B/32, and "none"
    for either returns (None, reason). The project's small CLIP is never used instead, since it
    conditions the small diffusion model. Raises InputError if a model or weights that were given
    cannot be loaded.
    """
    if "none" in (name, pretrained):
        return None, "left out as asked for"
    try:
        return load_clip(name or DEFAULT_MODEL, pretrained, device)
    except InputError as error:
        if name or pretrained:
            raise
        return None, str(error)


def _load_named(
    name: str, pretrained: str, weights: Path, device: torch.device
) -> tuple[Clip, str]:
    """An open_clip model by name, and a remark on what was assumed about its weights.

    The tag openai always means QuickGELU, whatever the model's name. Weights without a tag are
    checked for the activation that they need.
    """
    import open_clip

    tag = None if Path(pretrained) == weights else pretrained
    weights = followed(weights)
    state, from_openai = read_clip_weights(weights)
    quick_gelu, given = (None, {}) if from_openai else _stated(weights)
    agreed = True
    if not given and not from_openai:  # OpenAI's is open_clip's default
        given, agreed = preprocessing(name, tag)
    entry = tag_entry(name, tag) if tag else {}
    with hub_files(name):
        network = _quietly(
            open_clip.create_model,
            name,
            force_quick_gelu=tag == "openai" or bool(entry.get("quick_gelu")),
            force_preprocess_cfg=given,
            pretrained_text=False,
        )
        tokenize = open_clip.get_tokenizer(name)
    load_strict(network, fitted(network, state), weights)
    source = tag or shown(Path(pretrained))
    clip = _ready(network, tokenize, name, source, device)
    assumed: list[str] = []
    if not tag:
        if from_openai:
            require_activation(network, True, name, f"{source} holds weights of OpenAI's")
        elif quick_gelu is not None:
            require_activation(network, quick_gelu, name, f"{source} holds weights")
        elif not check_activation(clip):
            assumed.append("QuickGELU" if uses_quick_gelu(network) else "GELU")
    if not agreed:
        assumed.append("OpenAI's preprocessing")
    what = " and ".join(assumed)
    return clip, f", assumed to need {what} (the file does not say)" if what else ""


def load_folder(folder: Path, device: torch.device) -> Clip:
    """The CLIP in a folder of open_clip or of transformers.

    open_clip's has `open_clip_config.json`, transformers' the `config.json` of a CLIPModel. Raises
    InputError if the folder holds no CLIP, if its weights do not match the fingerprint in it, or,
    if it has none, if the weights are known to need another activation.
    """
    if not folder.is_dir():
        raise InputError(f"the model folder {folder} does not exist")
    if not (folder / "open_clip_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} holds neither open_clip_config.json nor transformers' config.json"
            )
        network, tokenize = _from_transformers_folder(folder)
        clip = _ready(network, tokenize, shown(folder), "in the folder", device, folder)
        check_activation(clip)
        return clip
    import open_clip

    path = folder / "open_clip_config.json"
    content = read_entries(path, {"model_cfg": dict, "preprocess_cfg": dict})
    if "model_cfg" not in content:
        raise InputError(f"{path} has no model_cfg")
    check_model_cfg(content["model_cfg"], path)
    check_entries(content.get("preprocess_cfg", {}), IMAGES, path)
    with describing(path, "a model of open_clip"):
        network = _quietly(open_clip.create_model, f"local-dir:{folder}", load_weights=False)
        tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    weights = weights_file(folder, FOLDER_NAMES)
    load_strict(network, fitted(network, read_state(weights)), weights)
    clip = _ready(network, tokenize, shown(folder), "in the folder", device, folder)
    if (folder / "fingerprint.json").is_file():
        check_own_fingerprint(clip, folder / "fingerprint.json")
    else:
        check_activation(clip)
    return clip


def _from_transformers_folder(folder: Path) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    import open_clip
    from open_clip.model import set_model_preprocess_cfg

    path = folder / "config.json"
    config = _transformers_json(folder)
    for tower in ("text_config", "vision_config"):
        check_entries(config.get(tower) or {}, TRANSFORMERS_TOWER, path)
    weights = weights_file(folder, FOLDER_NAMES)
    network = build_network(
        lambda: open_clip.CLIP(**open_clip_config(config)), path, "a CLIPModel", weights
    ).eval()
    load_strict(network, read_state(folder), folder)
    preprocess = dataclasses.asdict(
        open_clip.transform.PreprocessCfg(size=network.visual.image_size)
    )
    set_model_preprocess_cfg(network, preprocess | _given_preprocessing(folder))
    return network, open_clip.SimpleTokenizer(context_length=network.context_length)


def _transformers_json(folder: Path) -> dict[str, Any]:
    config = read_entries(folder / "config.json", {"text_config": dict, "vision_config": dict})
    if config.get("model_type") != "clip":
        raise InputError(f"{folder}/config.json does not describe a CLIPModel")
    return config


def _stated(weights: Path) -> tuple[bool | None, dict[str, Any]]:
    """What the configuration of a folder, or beside a file of weights, states about the weights.

    That is whether they need QuickGELU, and the mean and std of images; None and nothing if there
    is no configuration of a CLIP.
    """
    folder = weights if weights.is_dir() else weights.parent
    path = folder / "open_clip_config.json"
    if path.is_file():
        content = read_entries(path, {"model_cfg": dict, "preprocess_cfg": dict})
        images = content.get("preprocess_cfg") or {}
        check_entries(images, IMAGES, path)
        given = {key: tuple(images[key]) for key in ("mean", "std") if key in images}
        return bool((content.get("model_cfg") or {}).get("quick_gelu")), given
    path = folder / "config.json"
    if not path.is_file() or read_entries(path, {}).get("model_type") != "clip":
        return None, _given_preprocessing(folder) if weights.is_dir() else {}
    return open_clip_config(_transformers_json(folder))["quick_gelu"], _given_preprocessing(folder)


def _given_preprocessing(folder: Path) -> dict[str, Any]:
    """The mean and std that a transformers folder states for images; empty if it states none."""
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    given: dict[str, Any] = {}
    if path.is_file():
        given = read_entries(path, TRANSFORMERS_IMAGES)
    elif whole.is_file():  # newer versions of transformers no longer write the other
        given = read_entries(whole, {"image_processor": dict}).get("image_processor") or {}
        check_entries(given, TRANSFORMERS_IMAGES, whole)
    return {key: tuple(given[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in given}


def _ready(
    network: nn.Module,
    tokenize: Any,
    name: str,
    pretrained: str,
    device: torch.device,
    folder: Path | None = None,
) -> Clip:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = image_transform_v2(PreprocessCfg(**network.visual.preprocess_cfg), is_train=False)
    return Clip(network.eval().to(device), tokenize, preprocess, name, pretrained, folder)


def _quietly(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """Calls `build` without log output.

    open_clip warns that a model without weights is random; here the weights are loaded next.
    """
    with _silent_log():
        return build(*args, **options)


@contextlib.contextmanager
def _silent_log() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def save_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    model_cfg: Mapping[str, Any],
    templates: str | None = None,
) -> None:
    """Writes a CLIP to a model folder in float16.

    The files are open_clip_config.json, model.safetensors, fingerprint.json, and templates.txt if
    `templates` is given; a README.md in the folder is kept. open_clip loads the folder by the name
    `local-dir:FOLDER`.
    """
    import open_clip

    folder = make_folder(folder)
    half = {name: value.detach().to("cpu", torch.float16) for name, value in state.items()}
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    save_tensors(folder / "model.safetensors", half)
    write_json(
        folder / "open_clip_config.json",
        {"model_cfg": dict(model_cfg), "preprocess_cfg": preprocess},
    )
    network = open_clip.CLIP(**json.loads(json.dumps(model_cfg))).eval()
    load_strict(network, half, folder)
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")([FINGERPRINT_TEXT])
    with torch.no_grad():
        embedding = F.normalize(encode_tokens(network, ids), dim=-1)[0]
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    write_json(folder / "fingerprint.json", fingerprint(folder.name, embedding, quick_gelu))
    if templates is not None:
        atomic_write(folder / "templates.txt", templates.encode())
