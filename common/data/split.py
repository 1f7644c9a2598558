"""Which images are held out: a tenth that no model of this project trains on."""

import zlib
from typing import Literal

Split = Literal["train", "held_out", "all"]


def is_held_out(dataset: str, name: str) -> bool:
    """Whether the image is one of the tenth that no model of this project trains on, by a hash of
    its name (CRC-32)."""
    return zlib.crc32(f"{dataset}/{name}".encode()) % 10 == 0
