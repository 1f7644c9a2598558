"""The web demo with other models by flag: the homework's files, here of a toy's size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from clip_tiny import TINY as TINY_CLIP
from clip_tiny import tiny_clip
from demo_server import serving
from sd_tiny import random_networks, save_published, tiny_configs
from tiny_faces import CONFIG, noise, tiny_faces
from tiny_latent import awake, seeded

from common.data.layouts import make_layouts, write_layouts
from common.images import read_rgb
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.formats import save_concepts
from p3_controlnet.model import ControlNet

if TYPE_CHECKING:
    from gradio_client import Client

pytest.importorskip("gradio", reason="gradio is missing: pip install -e '.[demo]'")

PROGRAM = """
# The demo, but for sizes of a toy where the homework's files have a fixed size.
import json, sys
from pathlib import Path
import open_clip
import p2_ddim.model
from common import cli
from common.latent.stable_diffusion.load import load_stable_diffusion
from scripts import demo
world = Path(sys.argv.pop(1))
load_stable_diffusion.__kwdefaults__["configs"] = world / "configs"
sizes = json.loads((world / "sizes.json").read_text())
faces = p2_ddim.model.FaceUNetConfig(**sizes["faces"])
p2_ddim.model.FaceUNetConfig = lambda: faces
open_clip.factory._MODEL_CONFIGS["ViT-tiny-test"] = sizes["clip"]
cli.run(demo.main, demo.Config)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UNet.pt, sd.ckpt with its configurations, control/, clip.pt and concept.pt."""
    root = tmp_path_factory.mktemp("world")
    torch.save(tiny_faces().state_dict(), root / "UNet.pt")
    networks = random_networks(tiny_configs(root / "configs"))
    save_published(root / "sd.ckpt", networks)
    awake(seeded(ControlNet.from_unet, networks[0], (4, 8, 8)), 0.3).save(root / "control")
    torch.save(tiny_clip(3).state_dict(), root / "clip.pt")
    save_concepts(root / "concept.pt", [Concept("<dog>", torch.full((1, 12), 0.1))], "diffusers")
    faces = {name: getattr(CONFIG, name) for name in ("channels", "blocks", "attention")}
    sizes = {"faces": {**faces, "embedding": CONFIG.embedding}, "clip": TINY_CLIP}
    (root / "sizes.json").write_text(json.dumps(sizes))
    write_layouts(root, [make_layouts("two", 1)[0]])
    (root / "demo").mkdir()
    return root


@pytest.fixture(scope="module")
def client(world: Path) -> "Iterator[Client]":
    from gradio_client import Client

    flags = [
        *("--unet", world / "UNet.pt", "--base", world / "sd.ckpt"),
        *("--controlnet", world / "control", "--concepts", world / "concept.pt"),
        *("--clip", "ViT-tiny-test", world / "clip.pt"),
    ]
    with serving(world / "demo", *flags, program=("-c", PROGRAM, str(world))) as address:
        yield Client(address, download_files=world / "answers", verbose=False)


def test_the_homeworks_unet_draws_faces_of_256_pixels(client: "Client", world: Path) -> None:
    from gradio_client import handle_file

    torch.save(noise(0, 256)[None], world / "00.pt")
    upload = handle_file(world / "00.pt")
    face = read_rgb(Path(client.predict(5, upload, 0.0, 2, 7, api_name="/face")))
    assert min(face.shape[1:]) > 256
    assert face.float().std() > 1
    between = client.predict(0, None, 1, None, 0.3, 0.0, 2, 7, api_name="/interpolate")
    assert read_rgb(Path(between)).shape[2] > 4 * 256


def test_stable_diffusion_and_its_controlnet(client: "Client", world: Path) -> None:
    from gradio_client import handle_file

    source = handle_file(world / "source" / "0.png")
    drawing = {"background": source, "layers": [], "composite": source}
    prompt = "red circle with light blue background"
    pictures = [
        read_rgb(
            Path(client.predict(drawing, prompt, scale, 0, 1, 2, 2, 5, api_name="/controlnet")[0])
        )
        for scale in (1.0, 0.0)
    ]
    assert pictures[0].shape == (3, 512, 512)
    assert not torch.equal(*pictures)  # the ControlNet has its say


def test_a_concept_of_stable_diffusion(client: "Client") -> None:
    answers = client.predict("a photo of <dog>", None, 2.0, 2, 5, api_name="/concepts")
    pictures = [read_rgb(Path(answer)) for answer in answers]
    assert len(pictures) == 3 and not torch.equal(pictures[0], pictures[2])


def test_another_clip(client: "Client", world: Path) -> None:
    from gradio_client import handle_file

    picture = handle_file(world / "target" / "0.png")
    answer = client.predict(picture, "red circle\nblue star", "a {}", api_name="/clip")
    assert sum(entry["confidence"] for entry in answer["confidences"]) == pytest.approx(1, abs=1e-5)
    assert "ViT-tiny-test" in str(client.config)  # the page says which CLIP it is
