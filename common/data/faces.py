"""Face photos in the homework's layout, `face/photos/*.jpg` (or .png): square, all of one size."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.data.split import Split, is_held_out
from common.errors import InputError
from common.images import image_files, read_rgb

DATASET = "face"


@dataclass(frozen=True)
class Faces:
    """All photos in memory."""

    images: Tensor
    """uint8 [N, 3, S, S]."""
    names: list[str]
    """File names, N of them."""

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> "Faces":
        """The same photos on `device`."""
        return Faces(self.images.to(device), self.names)


def load_faces(root: Path, split: Split = "train") -> Faces:
    """Reads the photos of a split from `root`/photos in the order of file names.

    A tenth is held out, by a hash of the name. Raises InputError that names the folder or file if
    the folder is missing, or if a photo is unreadable, not square or of another size than the
    first.
    """
    folder = Path(root) / "photos"
    if not folder.is_dir():
        raise InputError(
            f"the face photos are not there: {folder} does not exist; put aligned, square photos"
            " (.jpg or .png) of one size there; `bash scripts/get_dataset.sh` downloads the rest"
            " of the face folder, but no photos"
        )
    names = [path.name for path in image_files(folder, report=split == "train")]
    if split != "all":
        names = [name for name in names if is_held_out(DATASET, name) == (split == "held_out")]
    if not names:
        raise InputError(f"{folder} has no photo of the split {split!r}")
    side = read_rgb(folder / names[0]).shape[-1]
    return Faces(torch.stack([read_rgb(folder / name, (side, side)) for name in names]), names)
