"""Files that are never half-written, images that survive the way to disk, and grids that put each
image in its place."""

import errno
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import environment, run_process
from torch import Tensor

from common.errors import InputError
from common.files import (
    ROOT,
    atomic_write,
    check_files,
    check_targets,
    make_folder,
    read_json,
    write_json,
)
from common.grid import GAP, MARGIN, TEXT_SIZE, labelled_grid, side_by_side
from common.images import (
    NOTE,
    check_replaceable,
    image_files,
    open_image,
    read_note,
    read_photo,
    read_rgb,
    resize,
    to_model_range,
    to_uint8,
    write_png,
)

# ----------------------------------------------------------------------------
# Files.


def test_root_is_the_checkout() -> None:
    assert (ROOT / "common" / "files.py").is_file() and (ROOT / "hw2_1.sh").is_file()


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    staging, out = make_folder(tmp_path / "staging"), make_folder(tmp_path / "out")
    for data in (b"first", b"second"):
        atomic_write(out / "a", data)
        assert (out / "a").read_bytes() == data
    atomic_write(out / "b", b"staged", staging)
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
    assert not list(staging.iterdir())


def test_a_failing_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_lies_in_the_staging_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_folder(tmp_path / "out")
    seen = []
    monkeypatch.setattr(
        "os.fsync", lambda _: seen.append((len(list(out.iterdir())), len(list(tmp_path.iterdir()))))
    )
    atomic_write(out / "a", b"x", staging=tmp_path)
    assert seen == [(0, 2)]


def leave_half_written(path: Path) -> Path:
    """Has a process killed while it writes `path`; returns the temporary file that it left."""
    code = (
        "import os, signal, sys; from pathlib import Path; from common.files import atomic_write\n"
    )
    code += (
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\natomic_write(Path(sys.argv[1]),"
        " b'half')"
    )
    before = set(path.parent.iterdir())
    assert run_process([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    (left,) = set(path.parent.iterdir()) - before
    return left


def test_what_a_killed_process_left_is_swept_by_the_next_writer_of_that_file(
    tmp_path: Path,
) -> None:
    left = leave_half_written(tmp_path / "a")
    other = leave_half_written(tmp_path / "a.b")
    assert (left / "a").read_bytes() == b"half"
    for name in ("b", "a.b.c"):
        atomic_write(tmp_path / name, b"x")
    assert left.exists() and other.exists()
    atomic_write(tmp_path / "a", b"whole")
    assert not left.exists() and other.exists()
    atomic_write(tmp_path / "a.b", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.b", "a.b.c", "b"]


def test_files_of_living_processes_and_of_other_machines_are_not_swept(tmp_path: Path) -> None:
    dead = leave_half_written(tmp_path / "a")
    pid = dead.name.split(".")[-2]
    living = dead.with_name(dead.name.replace(f".{pid}.", f".{os.getppid()}."))
    elsewhere = dead.with_name(f".a.elsewhere.{pid}.partial")
    for path in (living, elsewhere):
        path.touch()
    atomic_write(tmp_path / "a", b"x")
    assert {*tmp_path.iterdir()} == {living, elsewhere, tmp_path / "a"}


def test_writers_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Files of the same name in two folders, staged in one: as when two processes share the work of
    sampling."""
    code = "import os, sys; from pathlib import Path; from common.files import atomic_write\n"
    code += "os.fsync, out = lambda _: None, Path(sys.argv[1])\n"
    code += "for i in range(100): atomic_write(out / f'{i % 4}.png', b'x' * i, out.parent)"
    folders = [make_folder(tmp_path / name) for name in ("mnistm", "svhn", "third")]
    command = [sys.executable, "-c", code]
    writers = [
        subprocess.Popen([*command, folder], env=environment(), stderr=subprocess.PIPE)
        for folder in folders
    ]
    assert [(writer.communicate(timeout=120)[1], writer.returncode) for writer in writers] == [
        (b"", 0)
    ] * 3
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    assert all((folder / "3.png").read_bytes() == b"x" * 99 for folder in folders)


def test_a_folder_below_a_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(InputError, match=r"file is a regular file$"):
            make_folder(folder)
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(tmp_path / "a" / "b").is_dir()


def test_json_comes_back_and_bad_json_is_named(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "new" / "x.json", value)
    assert read_json(tmp_path / "new" / "x.json") == value
    assert (tmp_path / "new" / "x.json").read_text().endswith("}\n")
    with pytest.raises(InputError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    for content in (b"{", b"", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(
            InputError, match=r"bad\.json(, line 1 is not valid JSON| is text in U)"
        ):
            read_json(tmp_path / "bad.json")


def test_numbers_that_json_lacks_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------
# Images.


def test_all_256_values_survive_the_model_range() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(values)
    assert scaled.dtype == torch.float32
    assert scaled[0] == -1.0 and scaled[255] == 1.0
    assert torch.equal(to_uint8(scaled), values)


def test_to_uint8_rounds_and_clamps() -> None:
    """One grey level is 2/255 wide; values up to half of it away belong to it."""
    step = 2.0 / 255.0
    centre = -1.0 + 100 * step
    assert to_uint8(
        torch.tensor([centre - 0.49 * step, centre + 0.49 * step, centre + 0.51 * step])
    ).tolist() == [
        100,
        100,
        101,
    ]
    assert to_uint8(torch.tensor([-7.0, 7.0, float("inf")])).tolist() == [0, 255, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_a_png_comes_back_exactly(tmp_path: Path) -> None:
    image = torch.randint(256, (3, 20, 28), dtype=torch.uint8)
    write_png(tmp_path / "a.png", image)
    assert torch.equal(read_rgb(tmp_path / "a.png"), image)
    assert torch.equal(read_rgb(tmp_path / "a.png", (28, 20)), image)  # (width, height)
    with Image.open(tmp_path / "a.png") as file:
        assert file.format == "PNG" and file.mode == "RGB" and file.size == (28, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_note_in_a_png_changes_no_pixel_and_is_lost_with_the_picture(tmp_path: Path) -> None:
    image, path = torch.randint(256, (3, 20, 28), dtype=torch.uint8), tmp_path / "a.png"
    write_png(path, image, note=("made with", "seed 3"))
    assert torch.equal(read_rgb(path), image)
    assert read_note(path, "made with") == "seed 3" and read_note(path, "made by") is None
    path.write_bytes(path.read_bytes()[:-200])
    assert read_note(path, "made with") is None
    write_png(path, image)
    assert (
        read_note(path, "made with") is None
        and read_note(tmp_path / "none.png", "made with") is None
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (4, 5), "white").convert(mode).save(tmp_path / "a.png")
    assert torch.equal(read_rgb(tmp_path / "a.png"), torch.full((3, 5, 4), 255, dtype=torch.uint8))


def test_unreadable_and_wrong_size_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match=r"the image .*a\.png does not exist"):
        read_rgb(path)
    write_png(path, torch.randint(256, (3, 28, 28), dtype=torch.uint8))
    with pytest.raises(InputError, match=r"a\.png has 28x28 pixels, but 32x28 are expected"):
        read_rgb(path, (32, 28))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.png is not a readable image"):
            read_rgb(path)
    with pytest.raises(InputError, match="is not a readable image"):
        read_rgb(tmp_path)


def test_a_picture_of_another_size_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was decoded")

    write_png(tmp_path / "a.png", torch.zeros(3, 6, 8, dtype=torch.uint8))
    monkeypatch.setattr("common.images.viewed", refuse)
    with pytest.raises(InputError, match=r"a\.png has 8x6 pixels, but 4x4 are expected"):
        read_rgb(tmp_path / "a.png", (4, 4))


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.float32([0, 0.5, 1]), 1),
        (np.float32([0, 0.5, 1.001]), 1),  # a resampling overshoots a little
        (np.float32([-3, 100, 255.5]), 255),
        (np.float32([0, 30_000, 65_535]), 65_535),
        (np.float32([0, 5e5, 1e6]), 1e6),
        (np.int32([0, 100, 255]), 255),
        (np.int32([0, 2**30, 2**31 - 1]), 2**31 - 1),
    ],
)
def test_deep_tiffs_are_scaled_to_their_white(
    values: np.ndarray, white: float, tmp_path: Path
) -> None:
    Image.fromarray(values[None]).save(tmp_path / "a.tif")
    expected = np.clip(values.astype(float) / white * 255, 0, 255).round()
    assert read_rgb(tmp_path / "a.tif")[0, 0].tolist() == expected.tolist()


def test_a_dark_image_of_16_bits_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 200, 0, 0]))
    assert read_rgb(tmp_path / "a.pgm")[0, 0].tolist() == [1, 0]  # 200 of 65535


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_with_numbers_that_are_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    Image.fromarray(np.float32([[0, value]])).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="holds values that are not finite"):
        read_rgb(tmp_path / "a.tif")


def test_names_that_are_no_text_and_pipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="a named pipe"):
        read_rgb(tmp_path / "a.png")
    (tmp_path / "crops.png").mkdir()
    assert image_files(tmp_path, report=True) == []
    assert "of the files" in capsys.readouterr().err
    (tmp_path / os.fsdecode(b"0_\xff.png")).write_bytes(b"")
    with pytest.raises(InputError, match="is no text in UTF-8: rename it"):
        image_files(tmp_path)


def test_a_result_never_replaces_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "result.json")
    for refuses in (check_files, lambda path: write_json(path, {})):
        with pytest.raises(InputError, match="result.json: it is a device or a pipe"):
            refuses(tmp_path / "result.json")
    assert (tmp_path / "result.json").is_fifo()


@pytest.mark.parametrize("listed", [True, False])
def test_what_a_bad_file_is_called(tmp_path: Path, listed: bool) -> None:
    (tmp_path / "a.png").write_text("text")
    pil = f"cannot identify image file {str(tmp_path / 'a.png')!r}"
    expected = (
        f"the photo {tmp_path / 'a.png'} is not a readable image"
        f" ({'not an image' if listed else pil})"
    )
    with (
        pytest.raises(InputError) as error,
        open_image(tmp_path / "a.png", label="the photo ", listed=listed),
    ):
        pass
    assert str(error.value) == expected


# ----------------------------------------------------------------------------
# Sizes.


def test_shrinking_by_areas_averages_whole_pixels() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :2, :2] = 100
    image[0, 0, 0] = 0
    small = resize(image, 2, "area")
    assert small[:, 0, 0].tolist() == [75, 100, 100] and int(small[:, 1, 1].sum()) == 0


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "area", "nearest"])
def test_resizing_keeps_type_dimensions_and_flat_colours(mode: str) -> None:
    images = torch.tensor([10, 120, 255], dtype=torch.uint8)[:, None, None].expand(3, 6, 6)
    for size, shape in ((4, (4, 4)), ((9, 12), (9, 12))):
        resized = resize(images, size, mode)
        assert resized.dtype == torch.uint8 and resized.shape == (3, *shape)
        assert bool((resized == images[:, :1, :1]).all())
        batch = resize(images[None].float(), size, mode)
        assert batch.dtype == torch.float32 and batch.shape == (1, 3, *shape)
        assert torch.equal(batch[0].round().to(torch.uint8), resized)
    assert resize(images, 6, mode) is images


def test_floats_are_neither_rounded_nor_clamped() -> None:
    step = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 4, 4)
    large = resize(step, 16)
    assert float(large.min()) < 0.0 and float(large.max()) > 1.0
    assert len(large.unique()) > 3


# ----------------------------------------------------------------------------
# Grids.


def colours(count: int, height: int = 4, width: int = 6) -> Tensor:
    """Distinct flat images, none of them white or black."""
    values = torch.tensor(
        [[20 + 10 * i, 250 - 10 * i, 100] for i in range(count)], dtype=torch.uint8
    )
    return values[:, :, None, None].expand(count, 3, height, width).contiguous()


def test_images_lie_row_by_row_on_white() -> None:
    images = colours(5)
    grid = labelled_grid(images, columns=3)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * MARGIN + 2 * 4 + GAP, 2 * MARGIN + 3 * 6 + 2 * GAP)
    seen = torch.zeros(grid.shape[1:], dtype=torch.bool)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        top, left = MARGIN + row * (4 + GAP), MARGIN + column * (6 + GAP)
        assert torch.equal(grid[:, top : top + 4, left : left + 6], image)
        seen[top : top + 4, left : left + 6] = True
    assert bool((grid[:, ~seen] == 255).all())


def test_figures_lie_beside_each_other_with_white_below_the_lower_one() -> None:
    high, low = colours(1, 9, 4)[0], colours(1, 3, 6)[0]
    figure = side_by_side([high, low])
    assert figure.dtype == torch.uint8 and figure.shape == (3, 9, 10)
    assert torch.equal(figure[..., :4], high) and torch.equal(figure[:, :3, 4:], low)
    assert bool((figure[:, 3:, 4:] == 255).all())


def test_scale_repeats_pixels() -> None:
    image = torch.randint(256, (1, 3, 4, 6), dtype=torch.uint8)
    grid = labelled_grid(image, columns=1, scale=3)[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert grid.shape == (3, 12, 18)
    for row in range(3):
        for column in range(3):
            assert torch.equal(grid[:, row::3, column::3], image[0])


def test_labels_and_title_are_drawn_beside_the_images() -> None:
    images = colours(4, 20, 20)
    plain = labelled_grid(images, columns=2)
    grid = labelled_grid(
        images, columns=2, row_labels=["0", "1"], column_labels=["a", "b"], title="Digits"
    )
    down, right = grid.shape[1] - plain.shape[1], grid.shape[2] - plain.shape[2]
    assert down == 2 * (TEXT_SIZE + 5) and right > 0
    inside = grid[:, down + MARGIN : -MARGIN, right + MARGIN : -MARGIN]
    assert torch.equal(inside, plain[:, MARGIN:-MARGIN, MARGIN:-MARGIN])
    for row in (0, 1):  # each label at the height of its row
        top = down + MARGIN + row * (20 + GAP)
        assert int(grid[:, top : top + 20, : right + MARGIN].min()) < 128
    for column in (0, 1):
        left = right + MARGIN + column * (20 + GAP)
        assert int(grid[:, TEXT_SIZE + 5 : down + MARGIN, left : left + 20].min()) < 128
    assert int(grid[:, : TEXT_SIZE + 5].min()) < 128


def test_a_title_wider_than_the_images_fits() -> None:
    grid = labelled_grid(colours(1), columns=1, title="A title that is wider than one small image")
    assert bool((grid[:, :, -MARGIN:] == 255).all())
    assert int(grid[:, : TEXT_SIZE + 5].min()) < 128


def test_a_label_of_two_lines_takes_the_width_of_the_longer() -> None:
    one, two = (
        labelled_grid(colours(1), columns=1, row_labels=[label])
        for label in ("longer", "short\nlonger")
    )
    assert one.shape == two.shape and not torch.equal(one, two)
    wide = labelled_grid(colours(1), columns=1, row_labels=["short longer"])
    assert wide.shape[2] > one.shape[2]


def test_labels_that_do_not_fit_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="3 row and 0 column labels for a grid of 2x2"):
        labelled_grid(colours(4), columns=2, row_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="0 row and 1 column labels"):
        labelled_grid(colours(4), columns=2, column_labels=["a"])


# ----------------------------------------------------------------------------
# Files as people have them.


def test_16_bit_images_are_scaled_to_8_bits(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "eight.png")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "integers.tif")
    Image.fromarray((grey / 255.0).astype(np.float32)).save(tmp_path / "floats.tif")
    eight = read_rgb(tmp_path / "eight.png")
    for name in ("sixteen.png", "integers.tif", "floats.tif"):
        assert torch.equal(read_rgb(tmp_path / name), eight)


def test_transparent_pixels_show_the_ground(tmp_path: Path) -> None:
    """Whatever colour is hidden below them, in every mode that has transparency."""
    image = Image.new("RGBA", (4, 4), (9, 99, 199, 0))
    image.putpixel((1, 1), (200, 10, 10, 255))
    image.save(tmp_path / "rgba.png")
    grey = Image.new("LA", (4, 4), (77, 0))
    grey.save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 50, 60, 70])
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("rgba.png", "la.png", "palette.png"):
        assert read_rgb(tmp_path / name)[:, 0, 0].tolist() == [255] * 3
        assert read_rgb(tmp_path / name, ground="black")[:, 0, 0].tolist() == [0] * 3
    assert read_rgb(tmp_path / "rgba.png")[:, 1, 1].tolist() == [200, 10, 10]


def png(header: bytes, rows: bytes, transparency: bytes) -> bytes:
    """A PNG whose transparent colour is given; Pillow writes none with 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    parts = ((b"IHDR", header), (b"tRNS", transparency), (b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (*parts, (b"IEND", b"")))


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2)])
def test_a_transparent_colour_of_16_bits_shows_the_ground(
    channels: int, colour_type: int, tmp_path: Path
) -> None:
    clear, other = (struct.pack(">H", value) * channels for value in (0x1234, 0xFFFF))
    header = struct.pack(">IIBBBBB", 2, 1, 16, colour_type, 0, 0, 0)
    key = struct.pack(">H", 0x1234) * channels
    (tmp_path / "a.png").write_bytes(png(header, b"\0" + clear + other, key))
    assert read_rgb(tmp_path / "a.png", ground="black")[:, 0].tolist() == [[0, 255]] * 3


def test_damaged_metadata_hides_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), (9, 9, 9)).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF file")
    assert read_rgb(tmp_path / "a.png").shape == (3, 2, 4)


def test_a_cut_qoi_picture_is_named(tmp_path: Path) -> None:
    header = b"qoif" + struct.pack(">II", 4, 4) + b"\3\0"
    (tmp_path / "a.qoi").write_bytes(header + b"\xfe\1\2")
    with pytest.raises(InputError, match=r"a\.qoi is not a readable image"):
        read_rgb(tmp_path / "a.qoi")


def test_a_pointer_of_git_lfs_is_called_by_its_name(tmp_path: Path) -> None:
    for name in ("a.png", "a.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for read in (lambda: read_rgb(tmp_path / "a.png"), lambda: read_json(tmp_path / "a.json")):
        with pytest.raises(InputError, match="is a Git LFS pointer, not the file itself"):
            read()


def test_only_drawn_pictures_are_replaced(tmp_path: Path) -> None:
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    write_png(tmp_path / "drawn.png", picture, note=(NOTE, "seed 3"))
    write_png(tmp_path / "mine.png", picture)
    (tmp_path / "cut.png").write_bytes((tmp_path / "mine.png").read_bytes()[:45])
    for name in ("none.png", "drawn.png", "cut.png"):
        check_replaceable(tmp_path / name)
    with pytest.raises(InputError, match=r"mine\.png is there already and was not drawn by this"):
        check_replaceable(tmp_path / "mine.png")


def test_every_image_is_upright(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (4, 2), (0, 0, 0)), Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees
    for name in ("a.png", "a.jpg"):
        image.save(tmp_path / name, exif=exif)
        assert read_rgb(tmp_path / name).shape == read_photo(tmp_path / name).shape == (3, 4, 2)
        assert read_rgb(tmp_path / name, (2, 4)).shape == (3, 4, 2)


def test_a_folder_gives_every_raster_format_and_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.new("RGB", (4, 4), (10, 200, 30))
    names = ["A.PNG", "b.JPG", "c.jfif", "d.webp", "e.Bmp", "f.tif", "g.gif"]
    formats = {".jfif": "JPEG", ".tif": "TIFF"}
    for name in names:
        suffix = Path(name).suffix.lower()
        image.save(tmp_path / name, format=formats.get(suffix))
        assert (read_rgb(tmp_path / name)[:, 0, 0] - torch.tensor([10, 200, 30])).abs().max() <= 4
    for name in ("._A.PNG", ".DS_Store", "Thumbs.db", "notes.txt", "drawing.eps", "page.pdf"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    (tmp_path / "folder").mkdir()
    assert [path.name for path in image_files(tmp_path)] == names
    assert capsys.readouterr().err == ""
    image_files(tmp_path, report=True)
    said = capsys.readouterr().err
    assert f"warning: 3 of the files in {tmp_path} are left out" in said and "drawing.eps" in said


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_postscript_is_never_run(name: str, tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    (tmp_path / name).write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    with pytest.raises(InputError, match="is not a readable image"):
        read_rgb(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a.png", "a.png/b.png"], "a.png cannot be both a file and the folder of"),
        (["x" * 250 + ".png"], "is too long: it has 254 bytes"),
        (["\u4e2d" * 83 + ".png"], "is too long: it has 253 bytes"),
        (["folder.png"], "folder.png is a folder"),
        (["file.png/b.png"], "file.png is a regular file"),
    ],
)
def test_targets_that_cannot_be_written_are_named(
    names: list[str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").write_text("")
    good = str(tmp_path / "good.png")
    check_targets([good, str(tmp_path / "sub" / ("x" * 200 + ".png"))])
    with pytest.raises(InputError, match=sentence):
        check_targets([good, *(str(tmp_path / name) for name in names)])


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        atomic_write(tmp_path / "a.png", b"")
    assert error.value.filename == str(tmp_path / "a.png") and list(tmp_path.iterdir()) == []
