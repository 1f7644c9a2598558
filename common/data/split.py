"""The held-out split: a tenth of the images, on which no model of this project is trained."""

import zlib
from typing import Literal

Split = Literal["train", "held_out", "all"]


def is_held_out(dataset: str, name: str) -> bool:
    """Whether the image belongs to the held-out tenth, by a hash (CRC-32) of its name."""
    return zlib.crc32(f"{dataset}/{name}".encode()) % 10 == 0
