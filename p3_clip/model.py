"""CLIP by open_clip: any model it knows and any weights, looked for in the local caches before any network.

Weights come as a tag of open_clip, a file (`.pt`, OpenAI's TorchScript archives included, `.bin`, `.safetensors`) or a
transformers folder; a model may also be a folder with `open_clip_config.json`, such as checkpoints/clip_shapes. Also here: the
converter between open_clip's and transformers' CLIP, and the zero-shot classifier.
"""

import contextlib
import dataclasses
import difflib
import functools
import gzip
import hashlib
import json
import logging
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_pickle, load_strict, load_tensors, save_tensors
from common.devices import DeviceName, pick_device
from common.errors import InputError
from common.files import ROOT, make_folder, read_json, write_json

if TYPE_CHECKING:
    from PIL import Image
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

DATA = Path(__file__).resolve().parent / "data"
SHIPPED = ROOT / "checkpoints" / "clip_shapes"
DEFAULT_MODEL, DEFAULT_TAG = "ViT-B-32-quickgelu", "openai"
FINGERPRINT_TEXT = "red circle next to lime star with blue background"
NETWORK_TIMEOUT = 5.0  # seconds to find out whether there is a network
State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A CLIP ready for use, on its device and in evaluation mode."""

    network: nn.Module
    """open_clip's network."""
    tokenize: Callable[[list[str]], Tensor]
    """Texts to token ids, long [N, context length]."""
    preprocess: Callable[["Image.Image"], Tensor]
    """A picture to the network's input, float32 [3, S, S]."""
    name: str
    """open_clip's name of the model, or its folder."""
    pretrained: str
    """The tag, file or folder of the weights."""
    folder: Path | None = None
    """The model folder, if it came from one."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before the softmax: the inverse of the learned temperature."""
        return self.network.logit_scale.exp().item()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors float32 [N, D] on the CPU, of preprocessed pictures [N, 3, S, S]."""
        return F.normalize(self.network.encode_image(pixels.to(self.device)).float(), dim=-1).cpu()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit vectors float32 [N, D] on the CPU, of texts."""
        ids = self.tokenize(list(texts)).to(self.device)
        return F.normalize(
            torch.cat([encode_tokens(self.network, part) for part in ids.split(batch_size)]).float(), dim=-1
        ).cpu()

    def identity(self) -> str:
        """A hash of the weights and of the preprocessing, under which image features may be kept."""
        digest = hashlib.blake2b(repr(self.preprocess).encode(), digest_size=16)
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        digest.update(str(uses_quick_gelu(self.network)).encode())
        return digest.hexdigest()


def load_clip(name: str | None = None, pretrained: str | None = None, device: DeviceName = "auto") -> tuple[Clip, str]:
    """The CLIP asked for, and a sentence that says what was loaded.

    `name` is a model of open_clip or a folder; `pretrained` is a tag, a file or a transformers folder (default: openai, for a
    folder the weights in it). With neither, OpenAI's ViT-B/32 if it is in a cache or can be fetched, else the shipped small
    model. Raises InputError on an unknown model or tag, on weights that do not fit and on weights that are not to be had.
    """
    target = pick_device(device)
    if name is None and pretrained is None:
        try:
            weights = find_weights(DEFAULT_MODEL, DEFAULT_TAG)
        except InputError as error:
            if not (SHIPPED / "model.safetensors").is_file():
                raise InputError(
                    f"{error}; the small model of the project is not there either: {SHIPPED}/model.safetensors is missing "
                    "(clone the repository again, or train it with scripts/train_clip.sh)"
                ) from None
            note = f"{DEFAULT_MODEL} with OpenAI's weights is not to be had here, so this is the small model of the project"
            return _load_folder(
                SHIPPED, target
            ), f"{note}, checkpoints/{SHIPPED.name}, which knows coloured shapes only."
        return _load_named(DEFAULT_MODEL, DEFAULT_TAG, weights, target), f"{DEFAULT_MODEL} with OpenAI's weights."
    name = name or DEFAULT_MODEL
    if Path(name).is_dir():
        if pretrained:
            raise InputError(f"{name} is a model folder with its own weights: leave --pretrained away")
        return _load_folder(Path(name), target), f"The model in {shown(Path(name))}."
    pretrained = pretrained or DEFAULT_TAG
    clip = _load_named(name, pretrained, find_weights(name, pretrained), target)
    return clip, f"{name} with {clip.pretrained}."


def shown(path: Path) -> str:
    """A path as results show it: below the checkout relative to it, elsewhere absolute."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# ----------------------------------------------------------------------------
# Finding weights.


def find_weights(name: str, pretrained: str) -> Path:
    """The file or folder with the weights: as given, or from a local cache, or fetched. Raises InputError that says what is
    missing and where to put it, at once where there is no network."""
    check_model_name(name)
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.pretrained import download_pretrained

    if Path(pretrained).exists():
        return Path(pretrained)
    entry = _tag_entry(name, pretrained)
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


def _tag_entry(name: str, tag: str) -> dict[str, Any]:
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
# Building and loading.


def _load_named(name: str, pretrained: str, weights: Path, device: torch.device) -> Clip:
    """A model of open_clip's list. The tag openai always means QuickGELU, whatever the name says."""
    import open_clip

    entry = _tag_entry(name, pretrained) if pretrained != str(weights) else {}
    network = _quietly(
        open_clip.create_model,
        name,
        force_quick_gelu=pretrained == "openai" or bool(entry.get("quick_gelu")),
        force_preprocess_cfg={
            key: entry[key] for key in ("mean", "std", "interpolation", "resize_mode") if entry.get(key)
        },
        pretrained_text=False,
    )
    load_strict(network, _fitting(network, read_state(weights)), weights)
    tokenize = open_clip.get_tokenizer(name)
    source = shown(Path(pretrained)) if pretrained == str(weights) else pretrained
    clip = _ready(network, tokenize, name, source, device)
    if not entry:
        check_activation(clip, read_json(DATA / "fingerprints.json"))
    return clip


def _load_folder(folder: Path, device: torch.device) -> Clip:
    """A folder of open_clip (`open_clip_config.json`) or of transformers (`config.json` of a CLIPModel)."""
    if not (folder / "open_clip_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds neither open_clip_config.json nor transformers' config.json")
        network, tokenize = _from_transformers_folder(folder)
        return _ready(network, tokenize, shown(folder), "in the folder", device, folder)
    import open_clip

    content = read_json(folder / "open_clip_config.json")
    if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
        raise InputError(f"{folder}/open_clip_config.json has no model_cfg")
    try:
        network = _quietly(open_clip.create_model, f"local-dir:{folder}", load_weights=False)
        tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (TypeError, KeyError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise InputError(f"{folder}/open_clip_config.json does not describe a model of open_clip ({error})") from None
    weights = next((path for path in _weight_files(folder) if path.is_file()), folder / "model.safetensors")
    load_strict(network, _fitting(network, read_state(weights)), weights)
    clip = _ready(network, tokenize, shown(folder), "in the folder", device, folder)
    if (folder / "fingerprint.json").is_file():
        _check_own_fingerprint(clip, folder / "fingerprint.json")
    return clip


def _weight_files(folder: Path) -> list[Path]:
    names = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
    return [folder / name for name in names]


def _ready(
    network: nn.Module, tokenize: Any, name: str, pretrained: str, device: torch.device, folder: Path | None = None
) -> Clip:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = image_transform_v2(PreprocessCfg(**network.visual.preprocess_cfg), is_train=False)
    return Clip(network.eval().to(device), tokenize, preprocess, name, pretrained, folder)


def _quietly(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """open_clip warns that a model without weights is random; here the weights come right after."""
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


def read_state(path: Path) -> State:
    """The tensors of a weight file or transformers folder, by open_clip's names where they had transformers'."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in _weight_files(path) if file.is_file()]
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


def _fitting(network: nn.Module, state: State) -> State:
    """The state in the form of the network: text tower apart or not, logit scale with or without a dimension."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(network, state)
    if "positional_embedding" in state and not hasattr(network, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state = state | {"logit_scale": state["logit_scale"].reshape(network.logit_scale.shape)}
    return state


# ----------------------------------------------------------------------------
# The text tower on short texts, and the activation.


def encode_tokens(network: nn.Module, ids: Tensor) -> Tensor:
    """Text features [N, D] of token ids [N, context length], not normalised.

    A causal tower pools at the end token, so what comes after the longest text of the batch changes nothing and is left out:
    the same numbers, several times sooner.
    """
    import open_clip

    if type(network) is not open_clip.CLIP or network.text_pool_type != "argmax" or network.attn_mask is None:
        return network.encode_text(ids)
    ends = ids.argmax(dim=1)
    length = int(ends.max()) + 1
    x = network.token_embedding(ids[:, :length]) + network.positional_embedding[:length]  # [N, L, W]
    x = network.ln_final(network.transformer(x, attn_mask=network.attn_mask[:length, :length]))
    pooled = x[torch.arange(len(x), device=x.device), ends]
    projection = network.text_projection
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def uses_quick_gelu(network: nn.Module) -> bool:
    """Whether the network's activations are x sigmoid(1.702 x), as in OpenAI's models."""
    from open_clip.transformer import QuickGELU

    return any(isinstance(module, QuickGELU) for module in network.modules())


def check_activation(clip: Clip, fingerprints: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError if a known set of weights was loaded into a model with the wrong activation.

    A file does not say which activation it was trained with, and with the wrong one everything runs a little worse. A
    fingerprint knows the first values of one text's embedding: if they come out only with the other activation, it is wrong.
    """
    for known in fingerprints:
        if _matches(clip, known):
            return
    other = not uses_quick_gelu(clip.network)
    for known in fingerprints:
        if known["quick_gelu"] == other and _matches(clip, known, flipped=True):
            activation = "QuickGELU" if other else "GELU"
            hint = f"{clip.name}-quickgelu" if other else clip.name.removesuffix("-quickgelu")
            raise InputError(f"{clip.pretrained} holds {known['weights']}, which need {activation}: use --model {hint}")


def _matches(clip: Clip, known: Mapping[str, Any], flipped: bool = False) -> bool:
    if clip.network.state_dict()[_projection_name(clip.network)].shape[-1] != known["width"]:
        return False
    with _other_activation(clip.network) if flipped else contextlib.nullcontext():
        values = clip.encode_texts([known["text"]])[0, : len(known["first_values"])]
    return bool((values - torch.tensor(known["first_values"])).abs().max() <= known["tolerance"])


def _projection_name(network: nn.Module) -> str:
    names = network.state_dict().keys()
    return next((name for name in ("text_projection", "text.text_projection") if name in names), "logit_scale")


@contextlib.contextmanager
def _other_activation(network: nn.Module) -> Iterator[None]:
    from open_clip.transformer import QuickGELU

    other = nn.GELU if uses_quick_gelu(network) else QuickGELU
    blocks = [module for module in network.modules() if isinstance(getattr(module, "gelu", None), (nn.GELU, QuickGELU))]
    before = [block.gelu for block in blocks]
    for block in blocks:
        block.gelu = other()
    try:
        yield
    finally:
        for block, activation in zip(blocks, before, strict=True):
            block.gelu = activation


def _check_own_fingerprint(clip: Clip, path: Path) -> None:
    known = read_json(path)
    try:
        fits = _matches(clip, known)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a fingerprint ({error})") from None
    if not fits:
        raise InputError(f"the weights in {path.parent} do not give the text embedding stored in {path.name}")


# ----------------------------------------------------------------------------
# The shipped form.


def save_folder(
    folder: Path, state: Mapping[str, Tensor], model_cfg: Mapping[str, Any], templates: str | None = None
) -> None:
    """Writes a model folder in float16 that `open_clip.create_model("local-dir:FOLDER")` loads: open_clip_config.json,
    model.safetensors, fingerprint.json, and templates.txt if there are any. A model card beside them stays."""
    import open_clip

    folder = make_folder(folder)
    half = {name: value.detach().to("cpu", torch.float16) for name, value in state.items()}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    save_tensors(folder / "model.safetensors", half)
    write_json(folder / "open_clip_config.json", {"model_cfg": dict(model_cfg), "preprocess_cfg": preprocess})
    network = open_clip.CLIP(**json.loads(json.dumps(model_cfg))).eval()
    load_strict(network, half, folder)
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")([FINGERPRINT_TEXT])
    with torch.no_grad():
        embedding = F.normalize(encode_tokens(network, ids), dim=-1)[0]
    write_json(
        folder / "fingerprint.json",
        {
            "weights": folder.name,
            "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
            "width": len(embedding),
            "text": FINGERPRINT_TEXT,
            "first_values": [round(value, 5) for value in embedding[:8].tolist()],
            "tolerance": 1e-3,
        },
    )
    if templates is not None:
        (folder / "templates.txt").write_text(templates)


# ----------------------------------------------------------------------------
# open_clip <-> transformers. Names of the one and the other; the projections are transposed, q, k and v are stacked.

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
    """The weights of an open_clip ViT by the names of transformers' CLIPModel."""
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
    """The weights of transformers' CLIPModel by the names of open_clip."""
    towers, blocks = [tuple((b, a) for a, b in table) for table in (_TOWERS, _BLOCKS)]
    result: State = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
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


def _renamed(name: str, towers: Sequence[tuple[str, str]], blocks: Sequence[tuple[str, str]]) -> str:
    for old, new in towers:
        if name == old or (old.endswith(".") and name.startswith(old)):
            name = new + name[len(old) :]
            break
    else:
        raise InputError(
            f"the weight {name} has no counterpart in the other library: only plain ViT CLIPs are converted"
        )
    for old, new in blocks:
        name = name.replace(old, new)
    return name


def transformers_config(network: nn.Module) -> "CLIPConfig":
    """transformers' configuration of an open_clip ViT. Raises InputError for other architectures."""
    import open_clip
    from transformers import CLIPConfig

    if type(network) is not open_clip.CLIP or not isinstance(network.visual, open_clip.transformer.VisionTransformer):
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

    text_width, image_width = network.token_embedding.embedding_dim, network.visual.conv1.out_channels
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
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=network.text_projection.shape[1])


def transformers_model(network: nn.Module) -> "CLIPModel":
    """The same CLIP as transformers' CLIPModel."""
    from transformers import CLIPModel

    model = CLIPModel(transformers_config(network)).eval()
    load_strict(model, to_transformers(network.state_dict()), "the open_clip model")
    return model


def text_tower(network: nn.Module) -> "CLIPTextModel":
    """The text tower of an open_clip ViT as transformers' CLIPTextModel; `last_hidden_state` conditions diffusion models."""
    from transformers import CLIPTextModel

    model = CLIPTextModel(transformers_config(network).text_config).eval()
    state = to_transformers(network.state_dict())
    prefix = "text_model."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if next(iter(model.state_dict())).startswith(prefix):  # transformers before 5
        own = {prefix + name: value for name, value in own.items()}
    load_strict(model, own, "the open_clip model")
    return model


def clip_tokenizer(context_length: int = 77) -> "CLIPTokenizer":
    """transformers' CLIPTokenizer from open_clip's BPE file: the same ids, padded with the end token as Stable Diffusion's."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _byte_pairs()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=context_length)


@functools.cache
def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def _from_transformers_folder(folder: Path) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    import open_clip
    from open_clip.model import set_model_preprocess_cfg

    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        raise InputError(f"{folder}/config.json does not describe a CLIPModel")
    network = open_clip.CLIP(**open_clip_config(config)).eval()
    load_strict(network, read_state(folder), folder)
    given = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    preprocess = dataclasses.asdict(open_clip.transform.PreprocessCfg(size=network.visual.image_size))
    preprocess |= {key: tuple(given[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in given}
    set_model_preprocess_cfg(network, preprocess)
    return network, open_clip.SimpleTokenizer(context_length=network.context_length)


def open_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg from the config.json of a CLIPModel, which leaves out what has its default value."""
    from transformers import CLIPConfig

    full = CLIPConfig.from_dict(dict(config))
    text, vision = full.text_config, full.vision_config
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


# ----------------------------------------------------------------------------
# The zero-shot classifier.


def zero_shot_classifier(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The classifier's matrix float32 [D, C]: for each class the mean of its unit prompt vectors, made a unit vector again
    (Section 3.1.4 of Radford et al. 2021, arXiv:2103.00020). Logits are `clip.scale * image_features @ matrix`."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = clip.encode_texts(prompts).view(len(names), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=-1).T.contiguous()
