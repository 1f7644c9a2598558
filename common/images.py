"""Reading, writing and resizing images, and conversion between uint8 and the models' ranges."""

import contextlib
import functools
import io
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from common.errors import InputError
from common.files import atomic_write
from common.text_files import POINTER, POINTER_ADVICE

# Formats that Pillow does not decode by itself, but by a program beside it or not at all.
FOREIGN_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
HIDDEN = ("thumbs.db", "desktop.ini")  # besides names that begin with a full stop
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
Ground = Literal["white", "black"]
NOTE = "made with"
"""Name of the PNG text entry that tells how a picture was drawn."""
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    EOFError,
    IndexError,
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
)
# Pillow warns of damaged metadata and of pictures of more than 90 million pixels; both are read.
warnings.filterwarnings("ignore", module=r"PIL\.")


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]; `to_uint8` is its exact inverse."""
    return torch.div(images, 127.5).sub_(1.0)  # in place: one new tensor, not three


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1], clamped, to uint8 in 0..255, rounded to the nearest."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_hint(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1], the range of control images.

    Raises ValueError for any other dtype: floats in this project are in [-1, 1], and no later step
    would notice the wrong range.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"a hint is made from uint8, not from {images.dtype}")
    return images.float() / 255.0


def resize(
    images: Tensor,
    size: int | tuple[int, int],
    mode: Literal["bicubic", "bilinear", "area", "nearest"] = "bicubic",
    *,
    antialias: bool = True,
) -> Tensor:
    """Images [C, H, W] or [N, C, H, W] resized to `size`, a side or (height, width).

    Returns the same tensor if it has that size. uint8 gives uint8, by rounding; floats give floats,
    neither rounded nor clamped. Modes:

    - "bicubic": for photos and generated pictures; agrees with PIL.
    - "bilinear": never overshoots, so it suits colour measurements. Without `antialias` it uses
      only the four nearest pixels.
    - "area": averages whole pixels when shrinking, which preserves the position of thin lines.
    - "nearest": repeats pixels, so no new colour appears.

    `antialias` applies to bicubic and bilinear only.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(images.shape[-2:]) == size:
        return images
    smooth = mode in ("bicubic", "bilinear")
    options = {"align_corners": False, "antialias": antialias} if smooth else {}
    batch = images if images.ndim == 4 else images[None]
    scaled = F.interpolate(batch.float(), size, mode=mode, **options)
    if images.dtype == torch.uint8:
        scaled = scaled.round().clamp(0, 255).to(torch.uint8)
    return scaled if images.ndim == 4 else scaled[0]


def image_files(folder: Path, *, report: bool = False) -> list[Path]:
    """Image files of a folder by their suffixes, sorted by name; empty if there is no folder.

    Every raster format that Pillow decodes by itself counts, in either case of its suffix. Hidden
    files, such as macOS's `._NAME`, and folders do not. With `report`, other files are counted in a
    warning on stderr.
    """
    _, suffixes = _formats()
    files = [path for path in sorted(Path(folder).glob("*")) if not is_hidden(path)]
    images = [
        path
        for path in files
        if path.suffix.lower() in suffixes and not (path.is_fifo() or path.is_dir())
    ]
    for path in images:
        name_text(path)
    if report:
        warn_left_out(folder, [path for path in files if path not in set(images)], "images")
    return images


def name_text(path: Path) -> str:
    """The name of a file as text, in any locale. Raises InputError if it is none in UTF-8."""
    try:
        return os.fsencode(path.name).decode()
    except UnicodeDecodeError:
        raise InputError(
            f"the name of the file {os.fsencode(path.name)!r} in {path.parent} is no text in UTF-8:"
            " rename it"
        ) from None


def warn_left_out(folder: Path, left_out: Sequence[Path], what: str) -> None:
    """Counts the files (not the folders) in `left_out` in a warning on stderr.

    `what` says what they are not: "images".
    """
    names = [path.name for path in left_out if not path.is_dir()]
    if names:
        print(
            f"warning: {len(names)} of the files in {folder} are left out, since they are no"
            f" {what} by their names, such as {names[0]}",
            file=sys.stderr,
        )


def is_hidden(path: Path) -> bool:
    """Whether a file browser hides the file: `.DS_Store`, `._NAME`, `Thumbs.db` and the like."""
    return path.name.startswith(".") or path.name.lower() in HIDDEN


@functools.cache
def _formats() -> tuple[list[str], frozenset[str]]:
    """Pillow's names of the formats that are read, and their suffixes in lower case."""
    Image.init()
    formats = [name for name in Image.OPEN if name not in FOREIGN_FORMATS]
    known = Image.registered_extensions().items()
    return formats, frozenset(suffix.lower() for suffix, name in known if name in formats)


# ----------------------------------------------------------------------------
# Reading and writing.


@contextlib.contextmanager
def open_image(path: Path, *, label: str = "", listed: bool = True) -> Iterator[Image.Image]:
    """PIL's image of a file, decoded on first use; yields it inside a `with` block.

    `label` precedes the path in the error sentence. `listed` states that the path comes from a
    folder listing, so the file exists: the sentence then says "not an image" where PIL would repeat
    the path. With `listed` off, a missing file has its own sentence, and the reason is always
    PIL's. Raises InputError if the file cannot be read or decoded.
    """
    try:
        if Path(path).is_fifo():  # to open one waits for a writer
            raise OSError("a named pipe")
        with Image.open(path, formats=_formats()[0]) as image:
            yield image
    except _UNREADABLE as error:
        if isinstance(error, FileNotFoundError) and not listed:
            raise InputError(f"the image {path} does not exist") from None
        if isinstance(error, UnidentifiedImageError) and _is_pointer(path):
            raise InputError(f"{label}{path} is {POINTER_ADVICE}") from None
        unidentified = listed and isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unidentified else error
        raise InputError(f"{label}{path} is not a readable image ({reason})") from None


def _is_pointer(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER.encode()
    return False


def viewed(image: Image.Image, ground: Ground = "white") -> Image.Image:
    """What an image viewer shows, in mode RGB with 8 bits a channel.

    The image is upright by its EXIF orientation, values of more than 8 bits are scaled to 8
    (Pillow's own conversion cuts them off at 255), and transparent pixels show `ground`. Raises
    ValueError if a value is not finite.
    """
    file_format = image.format
    with contextlib.suppress(SyntaxError):  # damaged EXIF data
        image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")  # of a PNG, the colour that is transparent
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        white = _white(values, image.mode, file_format)
        image = Image.fromarray((values / white * 255.0).round().clip(0, 255).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    elif isinstance(key, tuple) and max(key) > 255:  # 16 bits, of which Pillow reads 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, GROUNDS[ground]), image)
    return image.convert("RGB")


def _white(values: np.ndarray, mode: str, file_format: str | None) -> float:
    """The value that is shown as white.

    16-bit images, as of PNG and PGM, state it. Of TIFF's floats and integers of 32 bits it is
    guessed: 1 (floats a little above it overshoot), 255 or 65535, or the largest value.
    """
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    if mode.startswith("I;16") or file_format in ("PNG", "PPM") and mode == "I":
        return 65535.0
    largest = values.max(initial=0.0)
    usual = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if largest < min(white + 1.0, 2.0 * white)), largest)


def read_rgb(
    path: Path, size: tuple[int, int] | None = None, *, ground: Ground = "white"
) -> Tensor:
    """An image file as uint8 [3, H, W], as an image viewer shows it (`viewed`).

    Raises InputError if the file is missing, unreadable or not of `size` (width, height).
    """
    with open_image(path, listed=False) as image:
        # A large picture is refused before it is decoded; only its orientation is left to find out.
        if size is None or sorted(image.size) == sorted(size):
            image = viewed(image, ground)
        if size is not None and image.size != size:
            raise InputError(
                f"{path} has {image.size[0]}x{image.size[1]} pixels, but {size[0]}x{size[1]} are"
                " expected"
            )
        return _from_pil(image)


def read_photo(path: Path) -> Tensor:
    """A photo of a listed file as uint8 [3, H, W], as an image viewer shows it, on white.

    Raises InputError, with the word photo, if the file is unreadable.
    """
    with open_image(path, label="the photo ") as image:
        return _from_pil(viewed(image))


def _from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] as a PIL image, the input of CLIP's preprocessing."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def write_png(
    path: Path, image: Tensor, staging: Path | None = None, note: tuple[str, str] | None = None
) -> None:
    """Writes uint8 [3, H, W] as an RGB PNG, atomically (`staging`: see `atomic_write`).

    `note` is an optional (name, text) entry of the PNG.
    """
    buffer, info = io.BytesIO(), PngInfo()
    if note:
        info.add_text(*note)
    to_pil(image).save(buffer, "PNG", pnginfo=info if note else None)
    atomic_write(path, buffer.getvalue(), staging)


def check_replaceable(path: Path) -> None:
    """Raises InputError if the file is a whole picture that no program of this project has drawn.

    Drawn pictures have the entry `NOTE`.
    """
    if not os.path.isfile(path) or read_note(path, NOTE) is not None:
        return
    with contextlib.suppress(*_UNREADABLE):
        with Image.open(path) as image:
            image.load()
        raise InputError(
            f"{path} is there already and was not drawn by this program, which would replace it:"
            " choose another output folder, or move it away"
        )


def read_note(path: Path, name: str) -> str | None:
    """The text entry of that name in a PNG, or None.

    None means that the file has no such entry, is missing, or is not a complete image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(name)
    except (OSError, SyntaxError, ValueError):
        return None
