"""The grader's command with Stable Diffusion v1.4 and its ControlNet at full size, with random
weights: `pytest -m full`. Takes minutes, 14 GB of memory and 3 GB of disk."""

import gc
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sd_tiny import (
    compvis_state,
    lightning_installed,
    published_form,
    random_networks,
    random_state,
    to_compvis,
)
from tiny import environment, run_process
from tiny_pairs import write_pairs

from common.files import ROOT
from common.latent.stable_diffusion.naming import CONTROL, unet_names
from common.latent.stable_diffusion.sd14 import SD14
from p3_controlnet.model import ControlNet


@pytest.mark.full
def test_the_graders_command_draws_with_v14_and_a_control_of_the_original_repository(
    tmp_path: Path,
) -> None:
    """One picture of 256 in two steps; the ControlNet is control_model.* in a .pth file."""
    base, control = tmp_path / "sd-v1-4.ckpt", tmp_path / "control.pth"
    write_pairs(tmp_path / "data", 1)
    prompts, sources = tmp_path / "data" / "prompt.json", tmp_path / "data" / "source"
    try:
        networks = random_networks(SD14, dtype=torch.float16)
        with torch.device("meta"):
            network = ControlNet(networks[0].config)
        state = random_state(network, torch.Generator().manual_seed(1), torch.float16)
        torch.save({"state_dict": to_compvis(state, unet_names(state, CONTROL))}, control)
        with lightning_installed():
            torch.save(published_form(compvis_state(*networks)), base)
        del networks, network, state
        gc.collect()
        done = run_process(
            [
                *("bash", ROOT / "hw2_3.sh", prompts, sources, tmp_path / "out", base),
                *("--steps", 2, "--size", 256, "--guidance-scale", 1, "--chunk-size", 1),
                *("--device", "cpu"),
            ],
            env=environment(CONTROLNET=str(control)),
            timeout=900,
        )
    finally:
        base.unlink(missing_ok=True)  # pytest would keep them for three runs
        control.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert "small model" not in done.stdout
    target = json.loads(prompts.read_text().splitlines()[0])["target"]
    with Image.open(tmp_path / "out" / target) as image:
        assert image.size == (256, 256) and image.mode == "RGB"
        assert len(image.getcolors(256 * 256)) > 100
