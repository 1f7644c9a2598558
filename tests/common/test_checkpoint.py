"""Weight files: what is written comes back, what does not fit is named, and nothing in a file is
ever run."""

import json
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import Malice
from torch import nn

from common.checkpoint import (
    load_config,
    load_pickle,
    load_strict,
    load_tensors,
    load_weights,
    open_tensors,
    save_model,
    save_tensors,
    tensor_names,
)
from common.clip.torchscript import is_torchscript
from common.errors import InputError


def dump(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


# ----------------------------------------------------------------------------
# The project's own files.


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(2, 3).T,  # not contiguous
        "long": torch.arange(4),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(0.5, dtype=torch.float64),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "param": nn.Parameter(torch.ones(1)),
    }
    metadata = {"step": 3, "best": None, "names": ["a", "ü"]}
    save_tensors(tmp_path / "a.safetensors", tensors, metadata)
    loaded, found = load_tensors(tmp_path / "a.safetensors")
    assert found == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    save_tensors(tmp_path / "b.safetensors", {"a": torch.ones(1)})
    assert load_tensors(tmp_path / "b.safetensors")[1] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    save_tensors(tmp_path / "1", tensors, {"x": 1})
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), {"x": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
@pytest.mark.parametrize("read", [load_tensors, tensor_names])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int, read: Callable) -> None:
    path = tmp_path / "cut.safetensors"
    save_tensors(path, {"a": torch.ones(100)})
    assert tensor_names(path) == ["a"]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cut\.safetensors is (not a complete safetens|empty)"):
        read(path)


def test_an_archive_with_a_hole_is_damaged(tmp_path: Path) -> None:
    """Its last record is there, so that it looks like a zip archive from its end."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content.replace(b"PK\x01\x02", b"\0\0\0\0"))
    assert zipfile.is_zipfile(tmp_path / "a.pt") and not is_torchscript(tmp_path / "a.pt")
    with pytest.raises(InputError, match="it is damaged or of another format"):
        load_pickle(tmp_path / "a.pt")


def test_a_missing_file_and_another_format_are_refused(tmp_path: Path) -> None:
    for read in (load_tensors, tensor_names):
        with pytest.raises(InputError, match="none.safetensors does not exist"):
            read(tmp_path / "none.safetensors")
    torch.save({"a": torch.ones(3)}, tmp_path / "pickled.safetensors")
    with pytest.raises(InputError, match="a PyTorch file, not safetensors"):
        load_tensors(tmp_path / "pickled.safetensors")
    with pytest.raises(InputError, match="is not a regular file"):
        load_tensors(tmp_path)


def test_a_model_folder_comes_back(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    folder = tmp_path / "a" / "model"
    save_model(folder, model, "test.Linear", {"sizes": (3, 2)})
    (folder / "README.md").write_text("a model card")
    save_model(folder, model, "test.Linear", {"sizes": (3, 2)})
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((folder / "config.json").read_text()) == {
        "kind": "test.Linear",
        "sizes": [3, 2],
    }
    assert load_config(folder, "test.Linear") == {"sizes": [3, 2]}
    other = nn.Linear(3, 2)
    load_weights(folder, other)
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)


def test_a_folder_that_holds_no_such_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the checkpoint folder .*none does not exist"):
        load_config(tmp_path / "none", "test.Linear")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_config(tmp_path, "test.Linear")
    (tmp_path / "file.pth").write_bytes(b"")
    with pytest.raises(InputError, match="is a file, but a model folder"):
        load_config(tmp_path / "file.pth", "test.Linear")
    save_model(tmp_path / "model", nn.Linear(1, 1), "test.Linear", {})
    with pytest.raises(InputError, match=r"kind 'test\.Linear', but 'test\.Conv' is expected"):
        load_config(tmp_path / "model", "test.Conv")
    for text in ("{", "[]", "3"):
        (tmp_path / "model" / "config.json").write_text(text)
        with pytest.raises(InputError):
            load_config(tmp_path / "model", "test.Linear")


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 4),
        "0.bias": torch.ones(2),
        "2.weight": torch.ones(1),
        "1.bias": torch.ones(1),
    }
    with pytest.raises(InputError) as caught:
        load_strict(model, state, tmp_path / "w")
    assert str(caught.value) == (
        f"the weights in {tmp_path / 'w'} do not fit the model: "
        "1 missing (1.weight); 1 unexpected (2.weight); 1 of another shape (0.weight)"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_with_other_names_fill_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    state = {"w": torch.randn(2, 3), "b": torch.randn(2).double()}
    names = {"weight": "w", "bias": "b"}
    with pytest.raises(InputError, match=r"1 missing \(b\); 1 unexpected \(bias\)"):
        load_strict(model, {"w": state["w"], "bias": state["b"]}, "w", names, assign=True)
    load_strict(model, state, "w", names, assign=True)
    assert model.weight.data_ptr() == state["w"].data_ptr()
    assert model.bias.dtype == torch.float64 and torch.equal(model.bias, state["b"])
    copied = nn.Linear(3, 2)
    load_strict(copied, state, "w", names)
    assert torch.equal(copied.weight, model.weight) and copied.bias.dtype == torch.float32


def test_of_many_keys_three_are_named() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(3)])
    with pytest.raises(InputError, match=r"6 missing \(0\.bias, 0\.weight, 1\.bias, \.\.\.\)$"):
        load_strict(model, {}, "w")


def test_an_interrupted_write_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for operation in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"os.{operation}", interrupt)
            save_tensors(path, {"a": torch.zeros(3)})
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------
# Foreign pickles.


def test_a_plain_pickle_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.arange(3)}, "epoch": 4, "lr": 0.5}, tmp_path / "a.pth")
    content = load_pickle(tmp_path / "a.pth")
    assert content["epoch"] == 4 and torch.equal(content["state_dict"]["w"], torch.arange(3))
    torch.save(torch.ones(2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickle(tmp_path / "old.pt"), torch.ones(2))
    for name in ("a.pth", "old.pt"):
        assert repr(load_pickle(tmp_path / name, lazy=True)) == repr(load_pickle(tmp_path / name))


@pytest.mark.parametrize("write", [torch.save, dump], ids=["zip", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, write: Callable
) -> None:
    trace = tmp_path / "it_ran"
    write({"state_dict": {"w": Malice(trace)}}, tmp_path / "evil.pth")
    with pytest.raises(
        InputError, match=r"evil\.pth was refused: it holds something other than plain tensors"
    ):
        load_pickle(tmp_path / "evil.pth")
    assert not trace.exists()
    # The file does what it says where nothing holds it back.
    pickle.loads(pickle.dumps(Malice(trace))).close()
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02", b"PK\x03\x04" + bytes(50)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pth (is|was refused)"):
        load_pickle(tmp_path / "x.pth")


def test_a_truncated_and_a_missing_pickle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for new_format in (True, False):
        torch.save({"w": torch.ones(500)}, path, _use_new_zipfile_serialization=new_format)
        whole = path.read_bytes()
        for share in (0.1, 0.5, 0.95):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(InputError, match=r"x\.pth"):
                load_pickle(path)
    with pytest.raises(InputError, match="none.pth does not exist"):
        load_pickle(tmp_path / "none.pth")


def test_a_stub_stands_in_for_a_class_that_a_known_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Stable Diffusion's checkpoint, which names a callback class of Lightning."""
    name = "far.away.callbacks.Checkpoint"
    far_class = type("Checkpoint", (), {"__module__": "far.away.callbacks"})
    with monkeypatch.context() as patch:
        for module in ("far", "far.away", "far.away.callbacks"):
            patch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules["far.away.callbacks"].Checkpoint = far_class
        torch.save(
            {"state_dict": {"w": torch.ones(2)}, "callbacks": {far_class: {"best": 1}}},
            tmp_path / "sd.ckpt",
        )
    with pytest.raises(InputError, match="refused"):
        load_pickle(tmp_path / "sd.ckpt")

    class Stub:
        pass

    content = load_pickle(tmp_path / "sd.ckpt", stubs={name: Stub})
    assert content["callbacks"] == {Stub: {"best": 1}}
    assert torch.equal(content["state_dict"]["w"], torch.ones(2))
    with pytest.raises(InputError, match="refused"):  # the permission was for that call alone
        load_pickle(tmp_path / "sd.ckpt")


def test_written_tensors_are_the_librarys_bytes_and_readable_as_other_files_are(
    tmp_path: Path,
) -> None:
    tensors = {"b": torch.randn(3, 4).half(), "a": torch.zeros((), dtype=torch.long)}
    save_tensors(tmp_path / "a.safetensors", tensors, {"step": 1})
    expected = safetensors.torch.save(tensors, {"json": json.dumps({"step": 1})})
    assert (tmp_path / "a.safetensors").read_bytes() == expected
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    with open_tensors(tmp_path / "a.safetensors") as (read, names, metadata):
        assert sorted(names) == ["a", "b"] and metadata == {"step": 1}
        assert torch.equal(read("b"), tensors["b"])
