"""Reading files of weights in every form in which training code leaves them.

    state = read_weights(Path("epoch_5.pt"))  # {name: tensor}

Safetensors, PyTorch's files and TorchScript archives are told apart by their content. Weights are
taken out of whole training checkpoints, and the words that wrappers such as DataParallel put in
front of names are taken off; one line on stderr says so. Averaged weights are preferred where a
file holds both. Which names a network needs is for `common.checkpoint.load_strict` to check.
"""

import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import load_pickle, load_tensors, tensor_names
from common.clip.torchscript import is_torchscript, load_torchscript
from common.devices import this_process
from common.errors import InputError
from common.files import read_json

State = dict[str, Tensor]

AVERAGED = re.compile(r"(^|_)(ema|swa|average|averaged|avg)(_|$)")
"""In the name of an entry of a training checkpoint that holds averaged weights: "model_ema"."""
CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("params", "weights", "controlnet_state_dict", "control_model", "unet", "generator"),
)
"""Entries of a training checkpoint that hold the weights of the last step."""
WRAPPER = re.compile(
    r"(module|_orig_mod|_forward_module|_fsdp_wrapped_module|ema_model|online_model"
    r"|model(?!\.diffusion_model\.))\."
)
"""A word that a wrapper puts in front of names; `model.diffusion_model.` is Stable Diffusion's."""
FILE_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
_OLD_ATTENTION = (
    (".to_q.", ".query."),
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
)
"""Parts of names in an autoencoder's or a pixel U-Net's attention: today, and in 2022."""
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


def read_weights(path: Path) -> State:
    """The weights in a file, or in all shards that an index file (`*.index.json`) names.

    Raises InputError if the file is missing, damaged, would run code or holds no named weights.
    """
    path = Path(path)
    if path.name.endswith(".json"):
        return _read_shards(path)
    if (found := SHARD.search(path.name)) and int(found[1]) > 1:
        raise InputError(
            f"{path} is one of {int(found[1])} shards of a model: name the folder, or its"
            " .index.json"
        )
    state, taken_off = unwrapped(_content(path))
    if not state:
        raise InputError(f"{path} does not hold a dict of named weights")
    if taken_off:
        say(f"the weights in {path} were inside {', '.join(taken_off)}, which was taken off")
    return state


def weight_names(path: Path) -> list[str]:
    """The names that `read_weights` gives; the values are not read if the format allows that."""
    path = Path(path)
    if path.name.endswith(".json"):
        return list(unwrapped(dict.fromkeys(_weight_map(path)))[0])
    if is_safetensors(path):
        return list(unwrapped(dict.fromkeys(tensor_names(path)))[0])
    return list(unwrapped(_content(path, lazy=True))[0])


def _content(path: Path, *, lazy: bool = False) -> Any:
    if is_safetensors(path):
        return load_tensors(path)[0]
    if is_torchscript(path):
        return load_torchscript(path)
    return load_pickle(path, lazy=lazy)


def is_safetensors(path: Path) -> bool:
    """Whether the file is safetensors, by its suffix or its content: 8 bytes of length, then JSON.

    Raises InputError if there is no such file.
    """
    if path.exists() and not path.is_file():  # a device never ends
        raise InputError(f"the weight file {path} is not a regular file")
    try:
        with open(path, "rb") as file:
            return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except OSError:
        raise InputError(f"the weight file {path} does not exist or cannot be read") from None


# ----------------------------------------------------------------------------
# Taking off wrappers.


def unwrapped(content: Any) -> tuple[dict[str, Any], list[str]]:
    """The named weights inside a checkpoint, and the names of what was taken off.

    The weights are empty if there are none. Values may be None where only names are of interest.
    """
    taken_off: list[str] = []
    while (name := _inner(content)) is not None:
        taken_off.append(f"{name!r}")
        content = content[name]
    state = _named(content)
    names = _without_wrappers(state)
    words = sorted({old.removesuffix(new) for old, new in names.items()} - {""})
    return {new: state[old] for old, new in names.items()}, [*taken_off, *words]


def _named(content: Any) -> dict[str, Any]:
    """The named tensors of a mapping; numbers and settings beside them are no weights."""
    return {
        name: value
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(name, str) and (value is None or isinstance(value, Tensor))
    }


def _inner(content: Any) -> str | None:
    """The name of the entry of a training checkpoint that holds the weights; None if none does.

    It may have an unknown name if it is the only one besides the optimiser's.
    """
    if not isinstance(content, Mapping):
        return None
    holding = [
        name
        for name, value in content.items()
        if isinstance(name, str) and "optim" not in name and "sched" not in name
        if isinstance(value, Mapping) and unwrapped(value)[0]
    ]
    averaged = [name for name in content if isinstance(name, str) and AVERAGED.search(name)]
    known = [name for name in averaged if name in holding]
    known += [name for name in CONTAINERS if name in holding]
    if holding and (unnamed := [name for name in averaged if _is_unnamed(content[name])]):
        say(f"the averaged weights in {unnamed[0]!r} have no names, so they are not used")
    if not known and len(holding) == 1 and not _named(content):
        known = holding
    return known[0] if known else None


def _is_unnamed(value: Any) -> bool:
    """Whether an entry holds a list of tensors, as averages of some libraries do."""
    lists = value.values() if isinstance(value, Mapping) else [value]
    return not unwrapped(value)[0] and any(
        isinstance(part, list | tuple) and any(isinstance(each, Tensor) for each in part)
        for part in lists
    )


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """{name in the file: name without wrappers} of the weights to use.

    Wrapped names are of one network each; the averaged one is preferred. Where wrapped and other
    names are mixed, all are kept as they are, unless the wrapped ones are averages of the others.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        start = 0
        while found := WRAPPER.match(name, start):
            start = found.end()
        groups.setdefault(name[:start], {})[name] = name[start:]
    averaged = [words for words in groups if "ema_model." in words]
    if averaged:
        return groups[averaged[0]]
    counters = {"initted", "step", "n_averaged", "num_updates", "decay"}  # of averaged models
    kept = {
        words: {old: new for old, new in group.items() if new not in counters}
        for words, group in groups.items()
    }
    kept = {words: group for words, group in kept.items() if group}
    if len(kept) == 1:
        return next(iter(kept.values()))
    return {name: name for name in names}


@functools.cache
def say(sentence: str) -> None:
    """Prints a remark on stderr, once, from the first process."""
    if this_process().rank == 0:
        print(f"note: {sentence}", file=sys.stderr)


# ----------------------------------------------------------------------------
# Folders and shards.


def weights_file(folder: Path, names: Iterable[str] = FILE_NAMES) -> Path:
    """The file of the weights in a folder, safetensors first, or the index file of its shards.

    Raises InputError if the folder holds none.
    """
    for candidate in _candidates(folder, tuple(names)):
        if candidate.is_file():
            return candidate
    listed = ", ".join(names)
    raise InputError(
        f"the folder {folder} holds no weights: one of {listed}, with the ending .safetensors or"
        " .bin, or its shards are expected"
    )


def _candidates(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    for suffix in ("safetensors", "bin"):
        for variant in (".", ".fp16."):
            for name in names:
                yield folder / f"{name}{variant}{suffix}"
        for variant in ("", ".fp16"):
            for name in names:
                yield folder / f"{name}.{suffix}.index{variant}.json"


def read_folder(folder: Path, names: Iterable[str] = FILE_NAMES) -> tuple[State, Path]:
    """The weights in a model's folder, such as unet/ of diffusers, and their file."""
    path = weights_file(folder, names)
    return read_weights(path), path


def _weight_map(index: Path) -> dict[str, str]:
    """{name of a weight: file name of its shard}."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise InputError(f"{index} is not the index of a model in shards: it has no weight_map")
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{index}: the shard of {name} must be the name of a file beside it, not {file!r}"
            )
    return names


def _read_shards(index: Path) -> State:
    names = _weight_map(index)
    state: State = {}
    for file in sorted(set(names.values())):
        shard = index.parent / file
        if not shard.is_file():
            raise InputError(f"{shard}, which {index.name} names, does not exist")
        content = _content(shard)
        if missing := [name for name in names if names[name] == file and name not in content]:
            raise InputError(f"{shard} lacks {missing[0]}, which {index.name} says it holds")
        state |= {name: content[name] for name in content if names.get(name) == file}
    state, taken_off = unwrapped(state)
    if taken_off:
        say(f"the weights in {index} were inside {', '.join(taken_off)}, which was taken off")
    return state


def followed(path: Path) -> Path:
    """`path`, or the snapshot inside it if it is a repository's folder in the hub's cache.

    Such a folder, `models--OWNER--NAME`, holds refs/ and snapshots/HASH/. Raises InputError if it
    holds several snapshots of which none is the main one.
    """
    path = Path(path)
    if not (path / "snapshots").is_dir() or (path / "config.json").is_file():
        return path
    snapshots = sorted(folder for folder in (path / "snapshots").iterdir() if folder.is_dir())
    main = path / "refs" / "main"
    if main.is_file():
        wanted = path / "snapshots" / main.read_bytes().decode(errors="replace").strip()
        snapshots = [folder for folder in snapshots if folder == wanted] or snapshots
    if len(snapshots) != 1:
        raise InputError(
            f"{path} is a folder of the hub's cache with {len(snapshots)} snapshots, and refs/main"
            " names none of them: give the folder in snapshots/ that is meant"
        )
    say(f"{path} is a folder of the hub's cache: its snapshot {snapshots[0].name} is used")
    return snapshots[0]


def has_old_attention(names: Iterable[str]) -> bool:
    """Whether attention weights have the names that diffusers used in 2022."""
    return any(".query." in name for name in names)


def old_attention_names(names: Iterable[str]) -> dict[str, str]:
    """{name in the network: name in a file of 2022} for weights of attention."""
    table = {}
    for name in names:
        old = name
        for ours, theirs in _OLD_ATTENTION:
            old = old.replace(ours, theirs)
        table[name] = old
    return table
