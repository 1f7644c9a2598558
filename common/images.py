"""Images between files, uint8 and the range that models see."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from common.errors import InputError
from common.files import atomic_write

SUFFIXES = (".png", ".jpg", ".jpeg")


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]; exact under `to_uint8`."""
    return torch.div(images, 127.5).sub_(1.0)  # one new tensor, not three


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8 by rounding to the nearest."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_hint(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1], the range of control images. Raises ValueError on another dtype.

    Floats are refused because those at hand are in [-1, 1], a mistake that no later step would notice.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"a hint is made from uint8, not from {images.dtype}")
    return images.float() / 255.0


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder (by SUFFIXES), in the order of names; none if there is no such folder."""
    return sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as uint8 [3, H, W]. Raises InputError if it is missing, unreadable or not of `size` (width, height)."""
    try:
        with Image.open(path) as image:
            if size is not None and image.size != size:
                raise InputError(
                    f"{path} has {image.size[0]}x{image.size[1]} pixels, but {size[0]}x{size[1]} are expected"
                )
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except FileNotFoundError:
        raise InputError(f"the image {path} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not a readable image ({error})") from None


def write_png(path: Path, image: Tensor, staging: Path | None = None, note: tuple[str, str] | None = None) -> None:
    """Writes uint8 [3, H, W] as an RGB PNG, atomically (see `atomic_write` for `staging`), with a text entry if given."""
    buffer, info = io.BytesIO(), PngInfo()
    if note:
        info.add_text(*note)
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info if note else None)
    atomic_write(path, buffer.getvalue(), staging)


def read_note(path: Path, name: str) -> str | None:
    """The text entry of that name in a PNG; None if there is none, or no such picture that is whole."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(name)
    except (OSError, SyntaxError, ValueError):
        return None
