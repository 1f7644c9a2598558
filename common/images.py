"""Images between files, uint8 and the range that models see: the one reader and the one resizer of
all programs."""

import contextlib
import io
from collections.abc import Iterator
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

SUFFIXES = (".png", ".jpg", ".jpeg")
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]; exact under `to_uint8`."""
    return torch.div(images, 127.5).sub_(1.0)  # one new tensor, not three


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8 by rounding to the nearest."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_hint(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1], the range of control images. Raises ValueError on
    another dtype.

    Floats are refused because those at hand are in [-1, 1], a mistake that no later step would
    notice.
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
    """Images [C, H, W] or [N, C, H, W] at another size: a side, or (height, width). The same tensor
    if it has that size.

    uint8 comes back as uint8, by rounding; floats stay floats, unrounded and not clamped. Modes:

    - "bicubic" draws photos and a model's pictures at another size, as PIL does.
    - "bilinear" never overshoots: for what is measured by colour. Without `antialias` it takes the
      four nearest pixels alone.
    - "area" averages whole pixels when shrinking, which keeps the place of thin lines.
    - "nearest" repeats pixels, so no new colour appears.

    `antialias` concerns the first two.
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


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder (by SUFFIXES), in the order of names; none if there is no such
    folder."""
    return sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)


# ----------------------------------------------------------------------------
# Reading and writing.


@contextlib.contextmanager
def open_image(path: Path, *, label: str = "", listed: bool = True) -> Iterator[Image.Image]:
    """PIL's image of a file, decoded where it is first used. Raises InputError if the file cannot
    be read or decoded.

    `label` stands before the path in the sentence. `listed` says that the path was found in a
    folder, so that it is there: the sentence then says "not an image" where PIL repeats the path.
    Without it a missing file gets a sentence of its own, and the reason is always PIL's.
    """
    try:
        with Image.open(path) as image:
            yield image
    except _UNREADABLE as error:
        if isinstance(error, FileNotFoundError) and not listed:
            raise InputError(f"the image {path} does not exist") from None
        unidentified = listed and isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unidentified else error
        raise InputError(f"{label}{path} is not a readable image ({reason})") from None


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as uint8 [3, H, W]. Raises InputError if it is missing, unreadable or not of
    `size` (width, height)."""
    with open_image(path, listed=False) as image:
        if size is not None and image.size != size:
            raise InputError(
                f"{path} has {image.size[0]}x{image.size[1]} pixels, but {size[0]}x{size[1]} are"
                " expected"
            )
        return _from_pil(image)


def read_photo(path: Path) -> Tensor:
    """A camera's photo as uint8 [3, H, W], turned upright as its EXIF entry says. Raises InputError
    if it is unreadable.

    `read_rgb` leaves pixels where they are: a data set's pictures are not turned.
    """
    with open_image(path, label="the photo ") as image:
        return _from_pil(ImageOps.exif_transpose(image))


def _from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] as PIL's image, which is what a CLIP's preprocessing takes."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def write_png(
    path: Path, image: Tensor, staging: Path | None = None, note: tuple[str, str] | None = None
) -> None:
    """Writes uint8 [3, H, W] as an RGB PNG, atomically (see `atomic_write` for `staging`), with a
    text entry if given."""
    buffer, info = io.BytesIO(), PngInfo()
    if note:
        info.add_text(*note)
    to_pil(image).save(buffer, "PNG", pnginfo=info if note else None)
    atomic_write(path, buffer.getvalue(), staging)


def read_note(path: Path, name: str) -> str | None:
    """The text entry of that name in a PNG; None if there is none, or no such picture that is
    whole."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(name)
    except (OSError, SyntaxError, ValueError):
        return None
