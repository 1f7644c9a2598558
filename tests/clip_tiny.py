"""A tiny CLIP in the form of the shipped one, with fixed random weights, and pictures in the
course's layout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from PIL import Image

from common.checkpoint import load_strict
from common.clip.formats import to_transformers, transformers_config
from common.clip.loading import save_folder
from common.data.shapes import KINDS
from p3_clip.model import DATA

if TYPE_CHECKING:
    from transformers import CLIPModel

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
TEXTS = [
    "pale golden rod circle with old lace background",
    "a photo of a <new1> !",
    f"{KINDS[0]} next to {KINDS[3]}",
]
CLASSES = {"0": "red_square", "1": "lime_star", "2": "blue_triangle"}
COLOURS = {"0": (255, 0, 0), "1": (0, 255, 0), "2": (0, 0, 255)}


def tiny_clip(seed: int = 0, **more: Any) -> open_clip.CLIP:
    """The network, random but the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(**{**json.loads(json.dumps(TINY)), **more}).eval()


def tiny_folder(folder: Path, seed: int = 0) -> Path:
    """The network as a model folder of the shipped form."""
    save_folder(
        folder, tiny_clip(seed).state_dict(), TINY, (DATA / "templates" / "shapes.txt").read_text()
    )
    return folder


def transformers_model(network: open_clip.CLIP) -> "CLIPModel":
    """The same CLIP as transformers' CLIPModel."""
    from transformers import CLIPModel

    model = CLIPModel(transformers_config(network)).eval()
    load_strict(model, to_transformers(network.state_dict()), "the open_clip model")
    return model


def pictures(folder: Path, count: int = 4, size: int = 40) -> tuple[Path, Path]:
    """`val/{class}_{image}.png`, plain colours, and id2label.json; returns both paths."""
    (folder / "val").mkdir(parents=True)
    for class_id, colour in COLOURS.items():
        for n in range(count):
            shade = tuple(max(0, value - 9 * n) for value in colour)
            Image.new("RGB", (size, size), shade).save(folder / "val" / f"{class_id}_{n}.png")
    (folder / "id2label.json").write_text(json.dumps(CLASSES))
    return folder / "val", folder / "id2label.json"
