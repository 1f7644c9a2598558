"""The digits: layout, splits, pairing, balanced draws, clear errors, and the two scripts that bring
the data."""

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common import cli
from common.data.digits import (
    DATASETS,
    NUM_DIGITS,
    SIZE,
    BalancedDraw,
    Digits,
    load_digits,
    pairing,
)
from common.data.split import is_held_out
from common.errors import InputError
from common.files import ROOT
from scripts import make_sample_data

# ----------------------------------------------------------------------------
# Layout and splits.


def test_all_digits_are_read_in_the_order_of_names(digits_root: Path) -> None:
    data = load_digits(digits_root, "all")
    assert data.images.shape == (120, 3, SIZE, SIZE) and data.images.dtype == torch.uint8
    assert data.digits.dtype == data.datasets.dtype == torch.int64
    assert data.datasets.tolist() == [0] * 60 + [1] * 60
    assert data.names == [f"{i:05d}.png" for i in range(60)] * 2


def test_images_and_labels_belong_to_their_names(digits_root: Path) -> None:
    data = load_digits(digits_root, "all", ["svhn"])
    table = pd.read_csv(digits_root / "svhn" / "train.csv")
    assert table["image_name"].tolist() != data.names  # so the order of rows is no help
    label_of = dict(zip(table["image_name"], table["label"], strict=True))
    assert data.digits.tolist() == [label_of[name] for name in data.names]
    for name, image in zip(data.names, data.images, strict=True):
        assert np.array_equal(
            np.asarray(Image.open(digits_root / "svhn" / "data" / name)), image.permute(1, 2, 0)
        )


def test_grey_and_palette_images_are_read_as_rgb(digits_copy: Path) -> None:
    path = digits_copy / "mnistm" / "data" / "00000.png"
    for mode in ("L", "P"):
        Image.new("RGB", (SIZE, SIZE), (90, 90, 90)).convert(
            mode, palette=Image.Palette.ADAPTIVE
        ).save(path)
        assert (load_digits(digits_copy, "all").images[0] == 90).all()


def test_train_and_held_out_are_disjoint_and_complete(digits_root: Path) -> None:
    parts = {split: load_digits(digits_root, split) for split in ("train", "held_out", "all")}
    keys = {
        split: set(zip(part.datasets.tolist(), part.names, strict=True))
        for split, part in parts.items()
    }
    assert not keys["train"] & keys["held_out"]
    assert keys["train"] | keys["held_out"] == keys["all"] and len(keys["all"]) == 120


def test_a_tenth_is_held_out_and_the_choice_never_changes() -> None:
    """The three names are those of the first 60 with a CRC-32 divisible by ten (gzip writes it
    behind its output)."""
    names = [f"{i:05d}.png" for i in range(20000)]
    for dataset in DATASETS:
        share = sum(is_held_out(dataset, name) for name in names) / len(names)
        assert share == pytest.approx(0.1, abs=0.006)  # three standard errors of 20,000 draws
    assert [name for name in names[:60] if is_held_out("mnistm", name)] == [
        "00019.png",
        "00028.png",
        "00032.png",
    ]


def test_pairing_of_both_editions() -> None:
    even, odd = [("mnistm", d) for d in (0, 2, 4, 6, 8)], [("svhn", d) for d in (1, 3, 5, 7, 9)]
    assert pairing("2025") == even + odd
    assert sorted(pairing("2024")) == sorted(
        (dataset, d) for dataset in DATASETS for d in range(10)
    )


# ----------------------------------------------------------------------------
# Balanced draws.


def _unbalanced() -> Digits:
    """1 to 210 members a class; digit 9 of svhn is absent."""
    counts = torch.arange(1, 20).square() // 2 + 1
    classes = torch.repeat_interleave(torch.arange(19), counts)
    n = len(classes)
    return Digits(
        torch.zeros(n, 3, 1, 1, dtype=torch.uint8),
        classes % 10,
        classes // 10,
        [str(i) for i in range(n)],
    )


def test_every_class_comes_equally_often() -> None:
    data = _unbalanced()
    indices = BalancedDraw(data)(19 * 1000, torch.Generator().manual_seed(0))
    drawn = torch.bincount(data.datasets[indices] * NUM_DIGITS + data.digits[indices], minlength=20)
    assert drawn[19] == 0
    assert (
        drawn[:19] - 1000
    ).abs().max() < 4 * 1000**0.5  # binomial, standard deviation about sqrt(1000)


def test_every_member_of_a_class_comes_equally_often() -> None:
    data = _unbalanced()
    indices = BalancedDraw(data)(19 * 2000, torch.Generator().manual_seed(1))
    members = torch.nonzero(data.datasets * NUM_DIGITS + data.digits == 9).flatten()
    assert len(members) == 51
    times = torch.bincount(indices, minlength=len(data))[members].double()
    assert times.min() > 0 and times.mean() == pytest.approx(2000 / 51, rel=0.1)
    assert times.std() < 1.5 * times.mean() ** 0.5


def test_draws_depend_on_the_generator_alone() -> None:
    draw = BalancedDraw(_unbalanced())
    torch.manual_seed(1)
    first = draw(50, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    assert first.dtype == torch.int64
    assert torch.equal(first, draw(50, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, draw(50, torch.Generator().manual_seed(4)))


# ----------------------------------------------------------------------------
# Clear errors: which file, which row.


@pytest.fixture
def digits_copy(digits_root: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(digits_root, tmp_path / "digits"))


def _replace_row(path: Path, row: int, text: str) -> str:
    """Replaces row `row` (1 is the header) and returns the image name that it held."""
    lines = path.read_text().splitlines()
    old, lines[row - 1] = lines[row - 1], text
    path.write_text("\n".join(lines) + "\n")
    return old.split(",")[0]


def test_a_missing_folder_names_the_commands_that_bring_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_digits(tmp_path / "nowhere")
    message = str(error.value)
    assert str(tmp_path / "nowhere" / "mnistm" / "train.csv") in message
    for command, file in (
        ("bash scripts/get_dataset.sh", "scripts/get_dataset.sh"),
        ("python3 -m scripts.make_sample_data", "scripts/make_sample_data.py"),
    ):
        assert command in message and (ROOT / file).is_file()


def test_an_image_with_two_labels_is_refused(digits_copy: Path) -> None:
    table = digits_copy / "svhn" / "train.csv"
    name, label = table.read_text().splitlines()[1].split(",")
    table.write_text(table.read_text() + f"{name},{label}\n")
    load_digits(digits_copy)
    table.write_text(table.read_text() + f"{name},{(int(label) + 1) % 10}\n")
    with pytest.raises(InputError, match=rf"{table}, row \d+: {name} has another label"):
        load_digits(digits_copy)


def test_a_missing_image_names_the_row_of_the_table(digits_copy: Path) -> None:
    table = digits_copy / "svhn" / "train.csv"
    _replace_row(table, 8, "99999.png,3")
    with pytest.raises(InputError) as error:
        load_digits(digits_copy, "all")
    assert (
        str(error.value)
        == f"{table}, row 8: the image {digits_copy / 'svhn' / 'data' / '99999.png'} does not exist"
    )


@pytest.mark.parametrize("label", ["10", "-1", "3.0", "seven", ""])
def test_a_label_outside_0_to_9_is_refused(digits_copy: Path, label: str) -> None:
    table = digits_copy / "mnistm" / "train.csv"
    _replace_row(table, 5, f"00000.png,{label}")
    with pytest.raises(InputError) as error:
        load_digits(digits_copy)
    assert str(error.value) == f"{table}, row 5: the label must be one of 0..9, not {label!r}"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _write_text(path: Path) -> None:
    path.write_text("this is not an image")


@pytest.mark.parametrize("spoil", [_truncate, _empty, _write_text])
def test_an_unreadable_image_names_file_and_row(
    digits_copy: Path, spoil: Callable[[Path], None]
) -> None:
    table = digits_copy / "mnistm" / "train.csv"
    path = digits_copy / "mnistm" / "data" / table.read_text().splitlines()[10].split(",")[0]
    spoil(path)
    with pytest.raises(InputError) as error:
        load_digits(digits_copy, "all")
    assert str(error.value).startswith(f"{table}, row 11: {path} is not a readable image")


def test_an_image_of_the_wrong_size_names_file_and_row(digits_copy: Path) -> None:
    table = digits_copy / "svhn" / "train.csv"
    path = digits_copy / "svhn" / "data" / table.read_text().splitlines()[1].split(",")[0]
    Image.new("RGB", (32, 30)).save(path)
    with pytest.raises(InputError) as error:
        load_digits(digits_copy, "all")
    assert str(error.value) == f"{table}, row 2: {path} has 32x30 pixels, but 28x28 are expected"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a readable CSV file"),
        (b'image_name,label\n"00000.png,1\n', "is not a readable CSV file"),
        (b"\xff\xfe\x00bad", "is text in UTF-16: save it as UTF-8"),
        (b"name,digit\n00000.png,1\n", "must have the header image_name,label, not name,digit"),
        (b"image_name\n00000.png\n", "must have the header image_name,label, not image_name"),
        (b"image_name,label\n00000.png\n", "row 2: the label must be one of 0..9"),
    ],
)
def test_a_malformed_table_is_named(digits_copy: Path, content: bytes, complaint: str) -> None:
    table = digits_copy / "mnistm" / "train.csv"
    table.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_digits(digits_copy, "all")
    assert str(table) in str(error.value) and complaint in str(error.value)


def test_a_split_without_images_is_refused(digits_copy: Path) -> None:
    (digits_copy / "mnistm" / "train.csv").write_text("image_name,label\n")
    with pytest.raises(InputError, match="lists no image of the split 'train'"):
        load_digits(digits_copy)


# ----------------------------------------------------------------------------
# scripts/make_sample_data.py


@pytest.fixture(scope="module")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the script made 40 images of each half."""
    folder = tmp_path_factory.mktemp("sample") / "new" / "hw2_data"
    cli.run(
        make_sample_data.main,
        make_sample_data.Config,
        ["--output-dir", str(folder), "--count", "40"],
    )
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_sample_data_has_the_layout_of_the_homework(sample_data: Path) -> None:
    assert [path.name for path in sample_data.iterdir()] == ["digits"]
    assert sorted(path.name for path in (sample_data / "digits").iterdir()) == [
        "README.txt",
        "mnistm",
        "svhn",
    ]
    data = load_digits(sample_data / "digits", "all")
    assert data.names == [f"{i:05d}.png" for i in range(40)] * 2
    for index in range(len(DATASETS)):
        assert torch.bincount(data.digits[data.datasets == index]).tolist() == [4] * NUM_DIGITS
    for path in sample_data.rglob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "RGB" and image.format == "PNG"


def test_sample_data_says_which_half_is_synthetic(sample_data: Path) -> None:
    assert "svhn: synthetic" in (sample_data / "digits" / "README.txt").read_text()


def test_sample_mnistm_is_the_difference_of_photo_and_digit() -> None:
    """Against the blend done in integers on the same draws; patches that were passed over hid the
    digit."""
    for label in range(NUM_DIGITS):
        image = np.asarray(
            make_sample_data.mnistm_digit(label, np.random.default_rng(label))
        ).astype(int)
        rng = np.random.default_rng(label)
        digits = make_sample_data.mnist_digits()[label]
        assert digits.shape == (500, SIZE, SIZE) and digits.max() == 255
        stroke = digits[rng.integers(len(digits))] > 0
        for patch in make_sample_data.photo_patches(rng):
            difference = np.abs(patch.astype(int) - 255 * stroke[..., None])
            if np.array_equal(difference, image):
                break
            assert np.abs(difference - patch)[stroke].mean() <= 70, (
                "a legible patch was passed over"
            )


def test_sample_svhn_centres_its_digit() -> None:
    """Over many draws the ink lies about the middle, and every draw has some there."""
    rng = np.random.default_rng(0)
    masks = np.stack([np.asarray(make_sample_data.number_mask(8, rng)) / 255 for _ in range(60)])
    assert masks.shape == (60, 4 * SIZE, 4 * SIZE) and masks.max() == 1
    rows, columns = masks.mean((0, 2)), masks.mean((0, 1))
    at = np.arange(4 * SIZE) + 0.5
    for weights in (rows, columns):
        assert (weights * at).sum() / weights.sum() == pytest.approx(2 * SIZE, abs=2.5)
    assert masks[:, SIZE : 3 * SIZE, SIZE : 3 * SIZE].mean((1, 2)).min() > 0.08


def test_sample_data_depends_on_the_seed_alone(sample_data: Path, tmp_path: Path) -> None:
    config = make_sample_data.Config(tmp_path / "same", count=40)
    make_sample_data.main(config)
    assert _contents(tmp_path / "same") == _contents(sample_data)
    make_sample_data.main(dataclasses.replace(config, output_dir=tmp_path / "other", seed=1))
    assert _contents(tmp_path / "other") != _contents(sample_data)


def test_sample_data_replaces_no_digits(sample_data: Path) -> None:
    before = _contents(sample_data)
    with pytest.raises(InputError, match="already there"):
        make_sample_data.main(make_sample_data.Config(sample_data, count=10))
    assert _contents(sample_data) == before


def test_sample_data_leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(label: int, rng: np.random.Generator) -> Image.Image:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_sample_data, "house_number", fail)
    with pytest.raises(OSError, match="No space left"):
        make_sample_data.main(make_sample_data.Config(tmp_path, count=10))
    assert list(tmp_path.iterdir()) == []


def test_sample_data_runs_as_a_module_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    """As a program: without an installed checkout, bad input is a sentence on stderr and exit code
    2."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [
        sys.executable,
        "-m",
        "scripts.make_sample_data",
        "--output-dir",
        tmp_path,
        "--count",
        "0",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == "error: --count must be between 1 and 10000000, not 0\n"
    )
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------
# scripts/get_dataset.sh, with a stub in place of gdown.

GDOWN_STUB = """
import os, shutil, sys
identity, flag, target = sys.argv[1:]
assert flag == "-O"
with open(os.environ["STUB_LOG"], "w") as file:
    file.write(identity)
if "STUB_ARCHIVE" not in os.environ:
    with open(target, "wb") as file:
        file.write(b"half of it")
    sys.exit("no connection")
shutil.copy(os.environ["STUB_ARCHIVE"], target)
"""


@pytest.fixture
def get_dataset(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the script with a gdown that copies `archive`, or fails half-way without one."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "gdown.py").write_text(GDOWN_STUB)

    def run(*args: str | Path, archive: Path | None = None) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "stub")}
        env["STUB_LOG"] = str(tmp_path / "id")
        if archive is not None:
            env["STUB_ARCHIVE"] = str(archive)
        command = ["bash", str(ROOT / "scripts" / "get_dataset.sh"), *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def _zip(path: Path, digits: Path, prefix: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix}__MACOSX/junk", "junk")
        for file in sorted(digits.rglob("*")):
            archive.write(file, f"{prefix}digits/{file.relative_to(digits)}")
    return path


@pytest.mark.parametrize("prefix", ["", "hw2_data/"])
@pytest.mark.parametrize(
    ("edition", "identity"),
    [("2024", "1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi"), ("2025", "116zRmpJeDiHhWLtGPSI5gS4cp9yvJ1uc")],
)
def test_the_archive_is_unpacked(
    get_dataset: Callable[..., subprocess.CompletedProcess],
    digits_root: Path,
    tmp_path: Path,
    edition: str,
    identity: str,
    prefix: str,
) -> None:
    archive = _zip(tmp_path / "archive.zip", digits_root, prefix)
    dest = tmp_path / "a new" / "place"
    done = get_dataset(edition, dest, archive=archive)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "id").read_text() == identity
    assert [path.name for path in dest.iterdir()] == ["digits"]
    assert _contents(dest / "digits") == _contents(digits_root)


def test_what_was_there_before_is_kept(
    get_dataset: Callable[..., subprocess.CompletedProcess], digits_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "dest" / "digits").mkdir(parents=True)
    (tmp_path / "dest" / "digits" / "mine").write_text("mine")
    done = get_dataset(
        "2025", tmp_path / "dest", archive=_zip(tmp_path / "archive.zip", digits_root, "")
    )
    assert done.returncode == 0 and "kept" in done.stdout
    assert _contents(tmp_path / "dest") == {"digits/mine": b"mine"}


def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    get_dataset: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    done = get_dataset("2024", tmp_path / "dest")
    assert done.returncode == 2 and not (tmp_path / "dest").exists()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the download failed; place the course's archive by hand")
    assert ".venv/bin/python -m scripts.make_sample_data" in last


@pytest.mark.parametrize("content", [b"<html>quota exceeded</html>", b"truncated", b"no entries"])
def test_a_bad_archive_leaves_nothing(
    get_dataset: Callable[..., subprocess.CompletedProcess],
    digits_root: Path,
    tmp_path: Path,
    content: bytes,
) -> None:
    archive = tmp_path / "archive.zip"
    archive.write_bytes(content)
    if content == b"truncated":
        _zip(archive, digits_root, "")
        archive.write_bytes(archive.read_bytes()[:-2000])
    if content == b"no entries":
        zipfile.ZipFile(archive, "w").close()
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "README.md").write_text("mine")
    done = get_dataset("2025", tmp_path / "dest", archive=archive)
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: ")
    )
    assert _contents(tmp_path / "dest") == {"README.md": b"mine"}


def test_bad_arguments_are_refused_in_one_sentence(
    get_dataset: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for args in (["2023"], ["hw2_data"], ["2025", "a", "b"], ["2025", tmp_path / "file" / "dest"]):
        done = get_dataset(*args)
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and done.stderr.startswith("error: ")
        )
    assert not (tmp_path / "id").exists()
