"""Weights as training code leaves them: taken out of their wrappers, or refused by name."""

import argparse
import gzip
import pathlib
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.checkpoint import load_strict, load_tensors, save_tensors
from common.errors import InputError
from common.files import write_json
from common.weights import followed, read_folder, read_weights, weight_names

STATE = {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.tensor([1.0, 2.0])}
OTHER = {name: value + 1 for name, value in STATE.items()}


def prefixed(words: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {words + name: value for name, value in state.items()}


WRAPPED: dict[str, Callable[[], Any]] = {
    "plain": lambda: STATE,
    "DataParallel": lambda: prefixed("module."),
    "compile": lambda: prefixed("_orig_mod."),
    "both": lambda: prefixed("module._orig_mod."),
    "Lightning": lambda: {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.0"},
    "Lightning and compile": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "model_state_dict": lambda: {"model_state_dict": STATE, "epoch": 3, "loss": 0.1},
    "model": lambda: {"model": STATE, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "deep": lambda: {"state": {"model": {"state_dict": prefixed("module.")}}},
    "unknown name": lambda: {"my_net": STATE, "optimizer": {"state": {}, "m": torch.ones(1)}},
    "ema": lambda: {"model": OTHER, "ema": STATE},
    "ema alone": lambda: {"ema": STATE},
    "timm": lambda: {"state_dict": OTHER, "state_dict_ema": prefixed("module.")},
    "ema_pytorch": lambda: {
        "model": OTHER,
        "ema": prefixed("ema_model.")
        | prefixed("online_model.", OTHER)
        | {"initted": torch.tensor(True), "step": torch.tensor(5)},
    },
    **{
        name: lambda name=name: {"model": OTHER, name: STATE}
        for name in ("ema_weights", "averaged_model_state_dict", "ema_state", "swa_model")
    },
    "Fabric": lambda: prefixed("_forward_module."),
    "AveragedModel": lambda: prefixed("module.") | {"n_averaged": torch.tensor(7)},
    "averages without weights": lambda: {"model": STATE, "ema": {"decay": 0.99}},
    "with settings": lambda: {
        "model": STATE,
        "args": argparse.Namespace(lr=0.1),
        "loss": np.float64(0.5),
        "path": pathlib.PurePosixPath("a/b"),
    },
}


@pytest.mark.parametrize("form", WRAPPED)
def test_weights_are_taken_out_of_their_wrappers(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pt"
    torch.save(WRAPPED[form](), path)
    state = read_weights(path)
    assert state.keys() == STATE.keys() == set(weight_names(path))
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    said = capsys.readouterr().err
    assert (form == "plain") == (said == "") and said.count("\n") <= 1
    assert said == "" or "was taken off" in said
    load_strict(nn.Sequential(nn.Linear(3, 2)), state, path)


def test_averages_without_names_are_not_dropped_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": STATE, "ema": {"shadow_params": [torch.ones(1)]}}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").keys() == STATE.keys()
    assert "the averaged weights in 'ema' have no names" in capsys.readouterr().err


def test_a_name_of_stable_diffusion_is_no_wrapper(tmp_path: Path) -> None:
    state = {"model.diffusion_model.out.2.bias": torch.ones(1)}
    for name, content in (("a.ckpt", {"state_dict": state}), ("b.ckpt", state)):
        torch.save(content, tmp_path / name)
        assert read_weights(tmp_path / name).keys() == state.keys()


def test_safetensors_are_read_whatever_their_ending_and_metadata(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(prefixed("module."), tmp_path / "x.pt", metadata={"format": "pt", "json": "{"})
    with pytest.raises(InputError, match="the metadata of .*x.pt, line 1 is not valid JSON"):
        load_tensors(tmp_path / "x.pt")
    save_file(prefixed("module."), tmp_path / "x.pt", metadata={"format": "pt"})
    assert read_weights(tmp_path / "x.pt").keys() == STATE.keys()
    assert weight_names(tmp_path / "x.pt") == sorted(STATE)


def test_the_tensors_of_a_torchscript_archive_are_read(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, torch.ones(1, 3)), tmp_path / "x.pt")
    state = read_weights(tmp_path / "x.pt")
    assert state.keys() == STATE.keys() and torch.equal(state["0.bias"], network[0].bias)


# ----------------------------------------------------------------------------
# Shards and the hub's cache.


def test_shards_are_joined_and_what_is_missing_is_named(tmp_path: Path) -> None:
    files = {"0.weight": "model-00001-of-00002.bin", "0.bias": "model-00002-of-00002.bin"}
    for name, file in files.items():
        torch.save({name: STATE[name]}, tmp_path / file)
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": files})
    state, source = read_folder(tmp_path)
    assert source.name == "pytorch_model.bin.index.json"
    assert state.keys() == STATE.keys() == set(weight_names(source))
    with pytest.raises(InputError, match="is one of 2 shards"):
        read_weights(tmp_path / files["0.bias"])
    torch.save({"other": STATE["0.bias"]}, tmp_path / files["0.bias"])
    with pytest.raises(InputError, match=r"lacks 0\.bias, which .* says it holds"):
        read_folder(tmp_path)
    write_json(tmp_path / "outside.bin.index.json", {"weight_map": {"a": "../b"}})
    with pytest.raises(InputError, match="the shard of a must be the name of a file beside it"):
        read_weights(tmp_path / "outside.bin.index.json")
    for wrong in ({}, [], {"weight_map": 3}):
        write_json(source, wrong)
        with pytest.raises(InputError, match="is not the index of a model in shards"):
            read_folder(tmp_path)
    source.unlink()
    with pytest.raises(InputError, match="holds no weights"):
        read_folder(tmp_path)


def test_a_folder_of_the_hubs_cache_is_followed(tmp_path: Path) -> None:
    root = tmp_path / "models--X--Y"
    (root / "snapshots" / "abc").mkdir(parents=True)
    assert followed(root) == root / "snapshots" / "abc"
    assert followed(tmp_path) == tmp_path


# ----------------------------------------------------------------------------
# What is no weights, and weights that draw nonsense.


def no_file(path: Path) -> None:
    path.write_bytes(b"")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 454\n")


def page(path: Path) -> None:
    path.write_text("\n <!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("UNet.pt", b"weights")


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(b"weights"))


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "UNet.pt")


def array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def text(path: Path) -> None:
    path.write_text("Entry not found")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("write", "what"),
    [
        (no_file, "is empty: download"),
        (pointer, "is a Git LFS pointer, .*git lfs pull"),
        (page, "is a web page, .* download it again"),
        (zipped, "is a zip archive of other files"),
        (gzipped, "is a gzip archive: unpack"),
        (tarred, "is a tar archive: unpack"),
        (array, "is an array of numpy"),
        (text, "is a text file that begins with 'Entry not found'"),
    ],
)
def test_other_files_are_called_by_their_names(
    tmp_path: Path, write: Callable[[Path], None], what: str, suffix: str
) -> None:
    path = tmp_path / f"UNet{suffix}"
    write(path)
    for read in (read_weights, weight_names):
        with pytest.raises(InputError, match=rf"UNet\{suffix} {what}"):
            read(path)


def test_a_whole_pickled_network_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 2)), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"\(torch\.nn\S+\), which could run code; save the wei"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.tensor([1.0, float("nan")]), "0.bias in .* is not finite"),
        (torch.tensor([1.0, float("inf")]).half(), "0.bias in .* is not finite"),
        (torch.ones(2, dtype=torch.int8), "1 of another kind of number"),
        (torch.ones(2, dtype=torch.bool), "1 of another kind of number"),
        (torch.ones(2, dtype=torch.complex64), "1 of another kind of number"),
        (torch.ones(2).to_sparse(), "1 of another kind of number"),
        (torch.ones(1), "1 of another shape"),
        (torch.tensor(1.0), "1 of another shape"),
    ],
)
def test_weights_that_would_compute_nonsense_are_refused(value: Tensor, reason: str) -> None:
    for assign in (False, True):
        with pytest.raises(InputError, match=reason):
            network = nn.Sequential(nn.Linear(3, 2))
            load_strict(network, STATE | {"0.bias": value}, "the file", assign=assign)


def test_half_precision_becomes_the_networks_own_or_the_one_asked_for(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in STATE.items()}
    save_tensors(tmp_path / "x.safetensors", half)
    network = nn.Sequential(nn.Linear(3, 2))
    load_strict(network, read_weights(tmp_path / "x.safetensors"), "x")
    assert network[0].bias.dtype == torch.float32
    load_strict(network, half, "x", assign=True, dtype=torch.bfloat16)
    assert network[0].bias.dtype == torch.bfloat16
