"""Bad input to Problem 2's programs: one sentence, exit code 2, nothing written, and no code from a
file is ever run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Malice, contents, refused
from tiny_faces import CONFIG, save_noises, save_photos, tiny_faces

from common.errors import InputError
from common.images import write_png
from p2_ddim import evaluate, inference, train
from p2_ddim import model as model_module
from p2_ddim.sampling import read_noises
from p2_ddim.study import calibrate, figures
from p2_ddim.study import sweeps as study


@pytest.fixture
def sampling(
    face_checkpoint: Path, noises: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs inference with flags that it must refuse before it writes anything; returns its
    sentence."""

    def refuse(*flags: Any) -> str:
        # Of a flag given twice the last one counts.
        own = (
            "--noises",
            noises,
            "--output-dir",
            tmp_path / "out",
            "--checkpoint",
            face_checkpoint,
            "--device",
            "cpu",
        )
        sentence = refused(capsys, inference.main, inference.Config, *own, *flags)
        assert not (tmp_path / "out").exists()
        return sentence

    return refuse


# ----------------------------------------------------------------------------
# Noise files.


def test_a_missing_or_empty_noise_folder(sampling: Callable[..., str], tmp_path: Path) -> None:
    assert f"the noise folder {tmp_path / 'none'} does not exist" in sampling(
        "--noises", tmp_path / "none"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "00.png").touch()
    assert "holds no noise file" in sampling("--noises", tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            torch.zeros(16, 16),
            "holds a tensor [16, 16] of torch.float32, but floats [1, 3, H, W] or [3, H, W]",
        ),
        (torch.zeros(2, 3, 16, 16), "holds a tensor [2, 3, 16, 16]"),
        (torch.zeros(1, 16, 16), "holds a tensor [1, 16, 16]"),
        (torch.zeros(1, 1, 16, 16), "holds a tensor [1, 1, 16, 16]"),
        (torch.zeros(3, 16, 16, dtype=torch.long), "of torch.int64"),
        (torch.full((3, 16, 16), torch.nan), "holds numbers that are not finite"),
        (torch.full((3, 16, 16), torch.inf), "holds numbers that are not finite"),
        (torch.zeros(3, 32, 32), "is 3x32x32, but 00.pt is 3x16x16: all noises must have one size"),
        (dict.fromkeys("ab", torch.zeros(3, 16, 16)), "holds 2 entries, such as weights"),
        ([1.0], "holds no tensor"),
        (np.zeros((1, 3, 16, 16)), "holds no tensor: save a noise with torch.save"),
    ],
)
def test_a_file_that_is_no_noise(
    content: Any, sentence: str, sampling: Callable[..., str], tmp_path: Path
) -> None:
    folder = save_noises(tmp_path / "noises", 2)
    torch.save(content, folder / "01.pt")
    said = sampling("--noises", folder)
    assert sentence in said and "01.pt" in said


@pytest.mark.parametrize("content", [b"", b"no tensor", b"PK\x03\x04 half a zip"])
def test_a_damaged_noise_file(content: bytes, sampling: Callable[..., str], tmp_path: Path) -> None:
    folder = save_noises(tmp_path / "noises", 2)
    (folder / "01.pt").write_bytes(content)
    said = sampling("--noises", folder)
    assert "01.pt is" in said or "01.pt was refused" in said


def test_a_noise_may_lie_in_a_list_or_dict_and_end_in_pth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = torch.randn(1, 3, 16, 16)
    for name, content in {"0.pt": [noise], "1.PT": {"noise": noise}, "2.pth": noise.half()}.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "3.npy").write_bytes(b"")
    found = dict(read_noises(tmp_path))
    assert "1 of the files" in (said := capsys.readouterr().err) and "3.npy" in said
    assert found.keys() == {"0", "1", "2"} and found["2"].dtype == torch.float32
    assert torch.equal(found["0"], noise[0]) and torch.equal(found["1"], noise[0])
    torch.save(noise, tmp_path / "0.pth")
    with pytest.raises(InputError, match="two noises of the name 0"):
        read_noises(tmp_path)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "inner").mkdir()
    torch.save(noise, tmp_path / "outer" / "inner" / "0.pt")
    with pytest.raises(InputError, match="expected; .*inner holds some"):
        read_noises(tmp_path / "outer")


def test_a_pickle_that_would_run_code_does_not(
    sampling: Callable[..., str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    folder = save_noises(tmp_path / "noises", 2)
    torch.save(Malice(trace), folder / "01.pt")
    assert "could run code" in sampling("--noises", folder)
    torch.save({"down1.weight": Malice(trace)}, tmp_path / "UNet.pt")
    assert "could run code" in sampling("--checkpoint", tmp_path / "UNet.pt")
    assert not trace.exists()


def test_sides_that_the_network_cannot_halve(sampling: Callable[..., str], tmp_path: Path) -> None:
    folder = save_noises(tmp_path / "noises", 2, side=17)
    assert "are 3x17x17, but this network needs sides that are multiples of 2" in sampling(
        "--noises", folder
    )


# ----------------------------------------------------------------------------
# Checkpoints.


def test_a_missing_checkpoint(sampling: Callable[..., str], tmp_path: Path) -> None:
    assert "UNet.pt does not exist" in sampling("--checkpoint", tmp_path / "UNet.pt")
    (tmp_path / "folder").mkdir()
    assert "config.json does not exist" in sampling("--checkpoint", tmp_path / "folder")


def test_missing_and_extra_keys_are_named(
    sampling: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "FaceUNetConfig", lambda: CONFIG)
    state = tiny_faces().state_dict()
    state["extra.weight"] = state.pop("mid1.attention.qkv.weight")
    torch.save(state, tmp_path / "UNet.pt")
    said = sampling("--checkpoint", tmp_path / "UNet.pt")
    assert "1 missing (mid1.attention.qkv.weight); 1 unexpected (extra.weight)" in said


def test_a_network_that_gives_nan_ends_in_a_sentence(
    noises: Path, tmp_path: Path, capsys: Any
) -> None:
    """Weights that are not finite are refused; finite ones may overflow."""
    network = tiny_faces()
    with torch.no_grad():
        network.down1.weight.fill_(1e38)
    network.save(tmp_path / "model")
    arguments = (
        "--noises",
        noises,
        "--output-dir",
        tmp_path / "out",
        "--checkpoint",
        tmp_path / "model",
        "--steps",
        2,
    )
    said = refused(capsys, inference.main, inference.Config, *arguments, "--device", "cpu")
    assert "the image of 00 is not finite" in said and contents(tmp_path / "out") == {}
    with torch.no_grad():
        network.down1.weight.fill_(torch.nan)
    network.save(tmp_path / "model")
    said = refused(capsys, inference.main, inference.Config, *arguments, "--device", "cpu")
    assert "down1.weight in" in said and "is not finite" in said


# ----------------------------------------------------------------------------
# Numbers.


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--steps 0", "--steps must be between 1 and 1000000, not 0"),
        ("--steps 1001", "--steps must be between 1 and 1000, not 1001"),
        ("--chunk-size 0", "--chunk-size must be between 1 and 4096, not 0"),
        ("--eta 1.5", "--eta must be between 0 and 1, not 1.5"),
        ("--seed -1", "--seed must be between 0 and 4294967295, not -1"),
        ("--eta nan", "--eta must be a finite number, not nan"),
        ("--table-length 1", "--table-length must be between 2 and 1000000, not 1"),
        ("--table-offset -2", "--table-offset -2 leads out of the table"),
        ("--table-offset 1000", "--table-offset 1000 leads out of the table"),
        ("--table-offset -1 --spacing leading", "--table-offset -1 leads out of the table"),
        ("--precision fp16", "--precision fp16 needs a CUDA device, not CPU"),
    ],
)
def test_numbers_that_make_no_sense(
    flags: str, sentence: str, sampling: Callable[..., str]
) -> None:
    assert sentence in sampling(*flags.split())


def test_an_output_path_in_which_a_file_stands(
    noises: Path, face_checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = (
        "--noises",
        noises,
        "--output-dir",
        tmp_path / "file" / "out",
        "--checkpoint",
        face_checkpoint,
    )
    said = refused(capsys, inference.main, inference.Config, *arguments, "--device", "cpu")
    assert "is a regular file" in said and contents(tmp_path) == {"file": b"mine"}


# ----------------------------------------------------------------------------
# The other programs.


def images(folder: Path, *names: str, side: int = 16) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        write_png(folder / f"{name}.png", torch.zeros(3, side, side, dtype=torch.uint8))
    return folder


def test_evaluate_refuses_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = images(tmp_path / "out", "00", "01")
    for references, sentence in (
        (images(tmp_path / "one", "00"), "2 images cannot be compared with 1 references"),
        (images(tmp_path / "names", "00", "02"), "have different names, such as 01"),
        (
            images(tmp_path / "sizes", "00", "01", side=8),
            "the image 00 has 16x16 pixels, its reference 8x8",
        ),
        (images(tmp_path / "none"), "holds no image"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        arguments = ("--images", out, "--references", references, "--result", tmp_path / "r.json")
        assert sentence in refused(capsys, evaluate.main, evaluate.Config, *arguments)
    assert "give --references, --photos or both" in refused(
        capsys, evaluate.main, evaluate.Config, "--images", out
    )
    shutil.copy(out / "00.png", out / "00.jpg")
    said = refused(capsys, evaluate.main, evaluate.Config, "--images", out, "--references", out)
    assert "several images of one name, 00.jpg and 00.png" in said
    (out / "00.jpg").unlink()
    (out / "01.png").write_bytes(b"no picture")
    assert "01.png is not a readable image" in refused(
        capsys, evaluate.main, evaluate.Config, "--images", out, "--references", out
    )
    assert not (tmp_path / "r.json").exists()


def test_evaluate_refuses_photos_of_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, photos = images(tmp_path / "out", "00", side=8), save_photos(tmp_path / "faces")
    said = refused(capsys, evaluate.main, evaluate.Config, "--images", out, "--photos", photos)
    assert "the image 00 is (3, 8, 8), the photos are (3, 16, 16)" in said


def test_calibrate_needs_a_noise_with_its_image(
    noises: Path, face_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = images(tmp_path / "references", "77")
    arguments = (
        "--noises",
        noises,
        "--references",
        references,
        "--checkpoint",
        face_checkpoint,
        "--device",
        "cpu",
    )
    assert "no noise in" in refused(capsys, calibrate.main, calibrate.Config, *arguments)


def test_calibrate_refuses_steps_that_one_of_its_conventions_cannot_take(
    noises: Path, face_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With every timestep there is none before the first for alpha-bar of t - 1."""
    references = images(tmp_path / "references", "00")
    arguments = (
        "--noises",
        noises,
        "--references",
        references,
        "--checkpoint",
        face_checkpoint,
        "--device",
        "cpu",
    )
    said = refused(capsys, calibrate.main, calibrate.Config, *arguments, "--steps", 1000)
    assert "--table-offset -1 leads out of the table" in said


def test_figures_need_two_noises(
    face_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_noises(tmp_path / "noises", 1)
    arguments = (
        "--noises",
        folder,
        "--checkpoint",
        face_checkpoint,
        "--output-dir",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert "holds one noise, but the interpolations need two" in refused(
        capsys, figures.main, figures.Config, *arguments
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("paths --side 16 --count 1", "--count must be at least 2"),
        ("steps --side 17", "needs sides that are multiples of 2"),
        ("steps --side 16 --count 0", "--count must be at least 1"),
    ],
)
def test_studies_refuse_numbers(
    flags: str,
    sentence: str,
    face_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (
        *flags.split(),
        "--checkpoint",
        face_checkpoint,
        "--results",
        tmp_path / "r",
        "--device",
        "cpu",
    )
    assert sentence in refused(capsys, study.main, study.Config, *arguments)
    assert not (tmp_path / "r").exists()


def test_training_refuses_photos_that_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        "--model.channels",
        "32",
        "64",
        "--model.attention",
        "1",
        "--model.embedding",
        "32",
        "--device",
        "cpu",
    ]

    def sentence(data: Path, *flags: str) -> str:
        arguments = ("--run-dir", tmp_path / "run", "--data", data, *small, *flags)
        return refused(capsys, train.main, train.Config, *arguments)

    said = sentence(tmp_path / "nowhere")
    assert "the face photos are not there" in said and "`bash scripts/get_dataset.sh`" in said
    faces = save_photos(tmp_path / "faces")
    assert "the photos are 16x16, but this network needs a multiple of 64" in sentence(
        faces, "--model.patch", "32"
    )
    write_png(faces / "photos" / "00007.png", torch.zeros(3, 16, 20, dtype=torch.uint8))
    assert "00007.png has 20x16 pixels, but 16x16 are expected" in sentence(faces)
    (tmp_path / "few" / "photos").mkdir(parents=True)
    assert "has no photo of the split 'train'" in sentence(tmp_path / "few")
    assert not (tmp_path / "run").exists()
