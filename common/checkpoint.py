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
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.config import describing, from_json
from common.errors import InputError
from common.files import make_folder, read_json, replacing, write_json
from common.memory import out_of_memory
from common.text_files import POINTER, POINTER_ADVICE, parse_json

LARGE = 50_000_000  # weights; less than this many take little memory, whatever a file claims
Model = TypeVar("Model", bound=nn.Module)

INERT = (
    *("argparse", "collections", "datetime", "enum", "lightning", "lightning_fabric", "numpy"),
    *("omegaconf", "pathlib", "pytorch_lightning", "torch.optim", "typing"),
)
"""Modules whose classes training checkpoints name beside the weights, such as their settings."""


class _Inert:
    """Stands in for a class that a training checkpoint names; takes its values and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


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
    check_is_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("json")
            metadata = parse_json(metadata, f"the metadata of {path}") if metadata else None
            yield file.get_tensor, list(file.keys()), metadata
    except SafetensorError as error:
        raise not_weights(path, f"is not a complete safetensors file ({error})") from None


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
    check_is_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise not_weights(path, f"is not a complete safetensors file ({error})") from None


def load_pickle(path: Path, stubs: Mapping[str, type] | None = None, *, lazy: bool = False) -> Any:
    """The content of a `.pt`, `.pth` or `.ckpt` file, on the CPU.

    It is read by PyTorch's restricted unpickler. Classes of the modules INERT are replaced by a
    class that does nothing, and those in `stubs`, by their full names, by the given ones; any other
    global is refused and never runs. With `lazy`, values stay in the file until they are used, if
    its format allows that; the file must exist as long as they do. Raises InputError if the file is
    missing, damaged, something other than a PyTorch file, would run code, or holds tensors without
    values (on the device meta) or of several sizes in one (nested).
    """
    check_is_file(path)
    known = dict(stubs or {})
    while True:
        try:
            content = _unpickled(path, known, lazy)
            _check_parts(content, path, set(), set())
            return content
        except InputError:
            raise
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+) ", str(error))
            name = found[1] if found else ""
            if name in known or not name.startswith(tuple(f"{module}." for module in INERT)):
                raise _refusal(path, str(error), name) from None
            known[name] = _Inert
        except Exception as error:  # whatever PyTorch's readers raise on bytes not theirs
            if out_of_memory(error):
                raise
            raise not_weights(
                path, "is not a readable PyTorch file: it is damaged or of another format"
            ) from None


def check_is_file(path: Path) -> None:
    """Raises InputError if there is no regular file of that name."""
    if not Path(path).is_file():
        what = "is not a regular file" if Path(path).exists() else "does not exist"
        raise InputError(f"the file {path} {what}")


def _check_parts(content: Any, path: Path, inside: set[int], done: set[int]) -> None:
    """Raises InputError if a tensor in the content has no plain values, or if it contains itself.

    `inside` are the ids of the containers around it, `done` those of all that were checked.
    """
    if isinstance(content, Tensor) and (content.is_meta or content.is_nested):
        kind = "without values (device meta)" if content.is_meta else "of several sizes (nested)"
        raise InputError(f"{path} holds a tensor {kind}: save plain tensors")
    if isinstance(content, nn.Module):
        content = vars(content)
    if isinstance(content, Mapping):
        parts = list(content.values())
    elif isinstance(content, list | tuple | set):
        parts = list(content)
    else:
        return
    if id(content) in inside:
        raise InputError(f"{path} holds a container that contains itself")
    if id(content) not in done:
        for part in parts:
            _check_parts(part, path, inside | {id(content)}, done)
        done.add(id(content))


def _unpickled(path: Path, stubs: Mapping[str, type], lazy: bool) -> Any:
    allowed = [(stub, name) for name, stub in stubs.items()]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=lazy and zipfile.is_zipfile(path)
        )


def _refusal(path: Path, reason: str, name: str) -> InputError:
    """The error for a file that the restricted unpickler refuses."""
    with open(path, "rb") as file:
        of_another_format = file.read(1) not in (b"P", b"\x80")  # of a zip archive, of a pickle
    if "GLOBAL" not in reason and (of_another_format or "Unsupported" not in reason):
        return not_weights(path, "is not a readable PyTorch file")
    what = f" ({name})" if name else ""
    return not_weights(
        path,
        f"was refused: it holds something other than plain tensors{what}, which could run code;"
        " save the weights alone, with torch.save(model.state_dict(), FILE)",
    )


# Beginnings of files that people have in place of weights, and what they are.
_BEGINNINGS = (
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive: unpack it first"),
    (b"\x93NUMPY", "an array of numpy, not a PyTorch file"),
    (b"\x89HDF", "an HDF5 file, as of Keras, not a PyTorch file"),
    (b"GGUF", "a GGUF file, not a PyTorch file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF document"),
)


def not_weights(path: Path, otherwise: str) -> InputError:
    """The error for a file that holds no weights: what it is and what to do, by its content.

    `otherwise` completes the sentence if the content is of no kind that is known here.
    """
    with open(path, "rb") as file:
        start = file.read(1024)
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    kinds = [what for beginning, what in _BEGINNINGS if start.startswith(beginning)]
    if not start:
        kinds = ["empty: download or copy it again"]
    elif start.startswith(POINTER.encode()):
        kinds = [POINTER_ADVICE]
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        kinds = [
            "a web page, not weights: the download failed, as for a file above its quota or behind"
            " a login; download it again in a browser"
        ]
    elif names := zip_names(path):
        if not any(name.endswith("data.pkl") for name in names):
            kinds = ["a zip archive of other files, not a PyTorch file: unpack it first"]
    elif start[257:262] == b"ustar":
        kinds = ["a tar archive: unpack it first"]
    elif not kinds and (beginning := _as_text(start)):
        kinds = [f"a text file that begins with {beginning!r}, not weights: download it again"]
    if not kinds and path.suffix == ".safetensors" and _is_pickle(start):
        kinds = ["a PyTorch file, not safetensors, in spite of its ending"]
    return InputError(f"{path} is {kinds[0]}" if kinds else f"{path} {otherwise}")


def zip_names(path: Path) -> list[str]:
    """The names in a zip archive; none if the file is another kind of file, or damaged."""
    if not zipfile.is_zipfile(path):  # which looks at the end of the file alone
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        return []


def _as_text(start: bytes) -> str | None:
    """The first words of a text in UTF-8, of which `start` may end inside a character, or None."""
    text = start.decode(errors="ignore")
    cut = len(start) - len(text.encode())
    if cut > 3 or not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return None
    return " ".join(text.split())[:60]


def _is_pickle(start: bytes) -> bool:
    return start.startswith((b"PK\3\4", b"\x80\2"))


def load_strict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: Path | str,
    names: Mapping[str, str] | None = None,
    *,
    assign: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Loads a state dict whose keys and shapes must fit exactly; all values must be finite.

    `names` maps the model's keys to those in `state`, if they differ. With `assign` the tensors of
    `state` become the model's, dtype included, so a model on the meta device is filled without a
    copy; `dtype`, if given, is that of all floats. Raises InputError that names the keys that do
    not fit. Nothing is converted silently: where the model has floats, integers, truth values and
    complex numbers are refused.
    """
    theirs = names or {name: name for name in model.state_dict()}
    own = {theirs[name]: value for name, value in model.state_dict().items()}
    both = sorted(own.keys() & state.keys())
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [k for k in both if own[k].shape != state[k].shape],
        "of another kind of number": [
            k for k in both if own[k].is_floating_point() != is_plain_float(state[k])
        ],
    }
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise InputError(f"the weights in {source} do not fit the model: {'; '.join(found)}")
    if dtype is not None:
        state = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in state.items()
        }
    for key in both:
        check_finite(state[key], f"the weight {key} in {source}")
    model.load_state_dict({name: state[theirs[name]] for name in theirs}, assign=assign)


def is_plain_float(value: Tensor) -> bool:
    """Whether a tensor holds floats of any precision, neither quantised nor sparse."""
    return value.is_floating_point() and value.layout == torch.strided


def check_finite(value: Tensor, what: str) -> None:
    """Raises InputError, which begins with `what`, if a value is infinite or not a number."""
    if value.is_floating_point() and not value.is_meta and not all_finite(value):
        raise InputError(f"{what} is not finite: the file is damaged, or its training diverged")


def all_finite(value: Tensor) -> bool:
    """Whether no value is infinite or not a number, in any dtype, those of 8 bits included."""
    if value.dtype.itemsize == 1:  # PyTorch looks at some of these only
        value = value.float()
    return bool(value.isfinite().all())


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
        is_index = weights.suffix == ".json"  # of shards
        if weights.is_file() and not is_index and count > max(weights.stat().st_size, LARGE):
            raise not_weights(
                weights, f"has fewer weights than {what} of {count:,}, which {config} describes"
            )
        return make()


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads `model.safetensors` of a model folder; all keys and shapes must fit."""
    from common.weights import read_weights  # which imports this file

    path = Path(folder) / "model.safetensors"
    load_strict(model, read_weights(path), path)
