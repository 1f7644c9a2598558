"""Reading and writing weights and other tensors: safe, strict and atomic.

A model folder holds `config.json` (the kind of model and its configuration) and
`model.safetensors`. Nothing is unpickled without restrictions: foreign `.pt` and `.pth` files go
through PyTorch's restricted unpickler, which refuses code, and of TorchScript archives only the
tensors are read.
"""

import contextlib
import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.config import describing, from_json
from common.errors import InputError
from common.files import make_folder, read_json, replacing, write_json

LARGE = 50_000_000  # weights; less than this many take little memory, whatever a file claims
Model = TypeVar("Model", bound=nn.Module)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes named tensors, and JSON metadata if given, to one safetensors file, atomically.

    Tensors that are contiguous and on the CPU are not copied. Raises InputError if the file cannot
    be written, for example on a full disk.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {"json": json.dumps(metadata)} if metadata is not None else None
    try:
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, text)
            temporary.chmod(mode)  # the library's own is for the owner alone
    except SafetensorError as error:
        raise InputError(f"{path} could not be written ({error})") from None


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Callable[[str], Tensor], list[str], Any]]:
    """A function that reads one tensor of a file of `save_tensors`, their names, and the metadata.

    Raises InputError as `load_tensors` does.
    """
    if not Path(path).is_file():
        raise InputError(f"the file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("json")
            yield file.get_tensor, list(file.keys()), json.loads(metadata) if metadata else None
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata of a file written by `save_tensors`; the metadata is None if absent.

    Raises InputError if the file is missing, truncated or not safetensors.
    """
    with open_tensors(path) as (read, names, metadata):
        return {name: read(name) for name in names}, metadata


def cached_tensors(
    path: Path, made_from: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors in the file `path`, which is made and saved with `make` if it does not exist.

    `made_from` describes their source. Raises InputError if the file was made from another source.
    """
    if path.is_file():
        tensors, before = load_tensors(path)
        if before != made_from:
            raise InputError(
                f"{path} was made from other data or by another model: choose another run folder,"
                " or delete the file"
            )
        return tensors
    make_folder(path.parent)
    tensors = dict(make())
    save_tensors(path, tensors, made_from)
    return tensors


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file; the values are not read.

    Raises InputError as `load_tensors` does.
    """
    if not Path(path).is_file():
        raise InputError(f"the weight file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from None


def load_pickle(path: Path, stubs: Sequence[tuple[type, str]] = (), *, lazy: bool = False) -> Any:
    """The content of a `.pt`, `.pth` or `.ckpt` file, on the CPU.

    It is read by PyTorch's restricted unpickler. `stubs` are (class, full name) pairs that stand in
    for classes that a known file names; any other global is refused and never runs. With `lazy`,
    values stay in the file until they are used, if its format allows that; the file must exist as
    long as they do. Raises InputError if the file is missing, damaged or would run code.
    """
    if not Path(path).is_file():
        raise InputError(f"the file {path} does not exist")
    try:
        with torch.serialization.safe_globals(list(stubs)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=lazy and zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "GLOBAL" in reason or "Unsupported" in reason:
            raise InputError(
                f"{path} was refused: it holds something other than plain tensors, which could run"
                " code"
            ) from None
        raise InputError(f"{path} is not a readable PyTorch file") from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
    ):
        raise InputError(
            f"{path} is not a readable PyTorch file: it is damaged or of another format"
        ) from None


def load_strict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: Path | str,
    names: Mapping[str, str] | None = None,
    *,
    assign: bool = False,
) -> None:
    """Loads a state dict whose keys and shapes must fit exactly.

    `names` maps the model's keys to those in `state`, if they differ. With `assign` the tensors of
    `state` become the model's, dtype included, so a model on the meta device is filled without a
    copy. Raises InputError that names the keys that do not fit.
    """
    theirs = names or {name: name for name in model.state_dict()}
    own = {theirs[name]: value for name, value in model.state_dict().items()}
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            k for k in own.keys() & state.keys() if own[k].shape != state[k].shape
        ),
    }
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise InputError(f"the weights in {source} do not fit the model: {'; '.join(found)}")
    model.load_state_dict({name: state[theirs[name]] for name in theirs}, assign=assign)


def state_hash(module: nn.Module) -> str:
    """A hash of a network's weights: names, dtypes, shapes and values, on any device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensors_hash(*tensors: Tensor) -> str:
    """A hash of tensors: dtypes, shapes and values, on any device; identifies training data."""
    digest = hashlib.blake2b(digest_size=16)
    for value in tensors:
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_model(
    folder: Path,
    model: nn.Module,
    kind: str,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model folder with parameters as `dtype`; buffers keep their dtype.

    `config` is JSON, and what `load_config` returns. A README.md in the folder is kept.
    """
    make_folder(folder)
    stored = {name: param.detach().to(dtype) for name, param in model.named_parameters()}
    save_tensors(Path(folder) / "model.safetensors", {**model.state_dict(), **stored})
    write_json(Path(folder) / "config.json", {"kind": kind, **config})


def load_config(folder: Path, kind: str) -> dict[str, Any]:
    """The configuration in a model folder, without the kind.

    Raises InputError if it is missing or belongs to another kind of model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.is_file():
            raise InputError(
                f"{folder} is a file, but a model folder with config.json and model.safetensors is"
                " expected"
            )
        raise InputError(f"the checkpoint folder {folder} does not exist")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("kind") != kind:
        found = config.get("kind") if isinstance(config, dict) else None
        raise InputError(f"{folder} holds a model of kind {found!r}, but {kind!r} is expected")
    return {key: value for key, value in config.items() if key != "kind"}


def load_model(
    folder: Path, kind: str, model_class: Callable[[Any], Model], config_class: type
) -> Model:
    """The model of a folder, `model_class(config_class(**config))`, in evaluation mode.

    Its memory format is channels_last. `config_class` is a dataclass, which states the types and
    bounds of the values. Its class variable ADDED, if there is one, holds the values of fields that
    folders of earlier versions lack. Raises InputError if the folder holds no such model.
    """
    path = Path(folder) / "config.json"
    added: Mapping[str, Any] = getattr(config_class, "ADDED", {})
    config = from_json(config_class, {**added, **load_config(folder, kind)}, path)
    model = build_network(
        lambda: model_class(config),
        path,
        "a network of this project",
        Path(folder) / "model.safetensors",
    )
    load_weights(folder, model)
    return model.eval().to(memory_format=torch.channels_last)


def build_network(make: Callable[[], Model], config: Path, what: str, weights: Path) -> Model:
    """The network that `make` builds from the configuration in the file `config`.

    It is first built without memory, so that sizes far beyond the file `weights` are refused before
    memory is taken. `what` names the network in the message. Raises InputError if that file is
    missing, or if no network can be built.
    """
    with describing(config, what):
        with torch.device("meta"):
            count = sum(value.numel() for value in make().state_dict().values())
        # A weight takes at least one byte. Small networks are built anyway, for a better message.
        if weights.is_file() and count > max(weights.stat().st_size, LARGE):
            raise InputError(
                f"{config} describes {what} of {count:,} weights, but {weights} has fewer"
            )
        return make()


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads `model.safetensors` of a model folder; all keys and shapes must fit."""
    path = Path(folder) / "model.safetensors"
    load_strict(model, load_tensors(path)[0], path)
