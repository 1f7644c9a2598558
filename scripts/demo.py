"""Serves the web demo of all problems on this computer: http://127.0.0.1:7860.

    bash scripts/demo.sh                                # the shipped weights
    bash scripts/demo.sh --unet UNet.pt                 # the homework's faces, 256x256
    bash scripts/demo.sh --base sd-v1-4.ckpt --controlnet FOLDER --clip ViT-B-32 openai
    bash scripts/demo.sh --auth USER:PASSWORD

docs/demo.md describes the page, its endpoints, and how to reach it on another computer. gradio
comes with the extra `demo` of pyproject.toml, which scripts/demo.sh installs.
"""

import dataclasses
import importlib.util
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli
from common.clip.loading import SHIPPED as SHIPPED_CLIP
from common.clip.loading import load_clip
from common.config import Side
from common.devices import DeviceName, pick_device
from common.errors import InputError, Terminated
from common.files import ROOT
from common.latent.load import load_base
from common.memory import share_heaps
from p1_diffusion.model import ContextUNet
from p2_ddim.model import FACES, load_network
from p3_clip.personalisation import inference as personalisation
from p3_clip.personalisation.base_kind import SMALL, BaseKind
from p3_controlnet.loading import SHIPPED_BASE, ModelConfig, load_model

if TYPE_CHECKING:
    import gradio as gr

TITLE = "Diffusion homework"
INTRODUCTION = """
# Diffusion, seen and touched
Digits, faces, circles and learned words from small diffusion models that were trained on a CPU.
Each tab calls the code of one problem; all jobs wait in one queue.
"""
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important }
#introduction h1 { margin-bottom: 4px }
@media (max-width: 480px) {
  .gradio-container { max-width: 100vw !important; overflow-x: hidden }
  .gradio-container main { padding-left: 10px !important; padding-right: 10px !important }
  .tab-container button { padding: 0 6px !important }
  .grid-container { grid-template-columns: 1fr 1fr !important }
}
"""
MOST_WAITING = 100  # jobs in the queue
MOST_SESSIONS = 100  # sessions whose state is kept
LARGEST_UPLOAD = "16mb"
OLD_FILES = (600, 3600)  # every how many seconds files are deleted, and from what age in seconds


@dataclasses.dataclass(frozen=True)
class Config:
    """Serves the web demo on 127.0.0.1."""

    port: int = 7860
    """Port of the page."""
    auth: str | None = None
    """USER:PASSWORD that the page asks for."""
    open_browser: bool = False
    """Open the page in a browser."""
    digits: Path = ROOT / "checkpoints" / "p1_digits"
    """Model folder of the digits."""
    unet: Path = FACES
    """Network of the faces: the homework's UNet.pt, a model folder, or a diffusers folder."""
    noise_side: Side | None = None
    """Height and width of numbered noises, in pixels. Default: 64 for a folder, 256 for a file such
    as UNet.pt."""
    base: Path = SHIPPED_BASE
    """Base model of ControlNet and Concepts: a Stable Diffusion v1.4 file or folder, or the folder
    of a small model."""
    controlnet: Path | None = None
    """ControlNet for the base model. Default: the shipped one."""
    concepts: tuple[Path, ...] = ()
    """Folders or files of learned concepts. Default: the shipped ones, if they fit the base."""
    clip: tuple[str, str] | None = None
    """Name of an open_clip model and tag or file of its weights. Default: the shipped small CLIP.
    """
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""


def main(config: Config) -> None:
    """Loads the models, serves the page until Ctrl-C, and deletes the page's files."""
    auth = parse_auth(config.auth)
    if not 1 <= config.port < 65536:
        raise InputError(f"--port must be between 1 and 65535, not {config.port}")
    if importlib.util.find_spec("gradio") is None:
        raise InputError(
            "gradio is missing: start the demo with bash scripts/demo.sh, which installs it"
        )
    share_heaps()
    with tempfile.TemporaryDirectory(prefix="demo_") as folder:
        # gradio keeps uploads and pictures here, and serves no other file.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        page = build(config, Path(folder))
        serve(page, config, auth)
        signal.signal(signal.SIGTERM, terminate)
        threading.Event().wait()


def terminate(*_: object) -> None:
    """Handler of SIGTERM, so that the page's files are deleted as after Ctrl-C."""
    raise Terminated


def parse_auth(auth: str | None) -> tuple[str, str] | None:
    """USER and PASSWORD of "USER:PASSWORD"; raises InputError if one of them is missing."""
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise InputError("--auth must have the form USER:PASSWORD")
    return user, password


def build(config: Config, folder: Path) -> "gr.Blocks":
    """Loads the models and makes the page; `folder` is for the files of examples.

    Raises InputError if a model cannot be loaded.
    """
    device = pick_device(config.device)
    print("Loading the models ...", flush=True)
    digits = ContextUNet.load(config.digits).to(device)
    faces = load_network(config.unet).to(device)
    controlled = load_model(ModelConfig(checkpoint=config.base, control=config.controlnet))
    kind = personalisation.checked_kind(config.base)
    base = load_base(config.base).to(device).eval()
    clip, note = load_clip(*(config.clip or (str(SHIPPED_CLIP), None)), config.device)

    import gradio as gr

    import p1_diffusion.demo
    import p2_ddim.demo
    import p3_clip.demo
    import p3_clip.personalisation.demo
    import p3_controlnet.demo
    from common.demo import Page

    page = Page(title=TITLE, analytics_enabled=False, delete_cache=OLD_FILES)
    with page:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        with gr.Tab("Digits"):
            p1_diffusion.demo.tab(digits)
        with gr.Tab("Faces"):
            side = config.noise_side or (64 if config.unet.is_dir() else 256)
            p2_ddim.demo.tab(faces, side, device)
        with gr.Tab("ControlNet"):
            p3_controlnet.demo.tab(controlled.to(device).eval(), folder / "control_images")
        with gr.Tab("CLIP"):
            p3_clip.demo.tab(clip, note, folder / "pictures")
        with gr.Tab("Concepts"):
            p3_clip.personalisation.demo.tab(base, kind, concepts_for(config, kind))
    return page


def concepts_for(config: Config, kind: BaseKind) -> Sequence[Path]:
    """The learned concepts of the configuration, or the shipped ones for its base model."""
    if config.concepts:
        return config.concepts
    if kind is SMALL:
        own = config.base.resolve() == SHIPPED_BASE
        return [personalisation.SHIPPED_CONCEPTS] if own else []
    return [personalisation.SD_CONCEPTS] if personalisation.SD_CONCEPTS.is_dir() else []


def serve(page: "gr.Blocks", config: Config, auth: tuple[str, str] | None) -> None:
    """Starts the server in threads of its own; prints the address.

    Raises OSError if the port is in use.
    """
    import gradio as gr

    theme = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
    page.launch(
        server_name="127.0.0.1",
        server_port=config.port,
        auth=auth,
        inbrowser=config.open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=False,
        max_file_size=LARGEST_UPLOAD,
        state_session_capacity=MOST_SESSIONS,
        ssr_mode=False,
        footer_links=["api"],
        theme=theme,
        css=CSS,
    )
    print(f"The demo is at http://127.0.0.1:{config.port} (Ctrl-C ends it).", flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
