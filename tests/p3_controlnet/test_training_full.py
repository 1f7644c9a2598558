"""Training at the full size of Stable Diffusion v1.4, with random weights: `pytest -m full`. Takes
minutes, 16 GB of memory and 13 GB of disk: 2 for the base, 4 for the state of a run and as much
while it is replaced, and the trained files."""

import gc
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sd_tiny import compvis_state, lightning_installed, published_form, random_networks
from tiny import environment, run_process
from tiny_latent import text_condition
from tiny_pairs import write_pairs

from common.checkpoint import open_tensors
from common.latent.stable_diffusion.load import load_stable_diffusion
from common.latent.stable_diffusion.sd14 import SD14
from p3_controlnet.formats import load_controlnet

FLAGS = (
    *("--preset", "sd14", "--size", 256, "--steps", 2, "--batch-size", 2, "--warmup", 1),
    *("--mixed-precision", "no", "--validate-every", 0, "--preview-every", 0, "--log-every", 1),
    *("--device", "cpu"),
)


@pytest.fixture(scope="module")
def sd14(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """sd-v1-4.ckpt with random weights in half precision."""
    path = tmp_path_factory.mktemp("sd14") / "sd-v1-4.ckpt"
    try:
        with lightning_installed():
            networks = random_networks(SD14, dtype=torch.float16)
            torch.save(published_form(compvis_state(*networks)), path)
        del networks
        gc.collect()
        yield path
    finally:
        path.unlink(missing_ok=True)  # pytest would keep it for three runs


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def steps_done(state: Path) -> int:
    """The step of a state on disk, 0 if there is none; the tensors are not read."""
    if not state.is_file():
        return 0
    with open_tensors(state) as (_, _, progress):
        return progress["step"]


@pytest.mark.full
def test_controlnet_is_killed_resumes_to_the_bit_and_works_in_diffusers(
    sd14: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import (
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetPipeline,
    )

    write_pairs(tmp_path / "fill50k" / "training", 4)
    command = [sys.executable, "-m", "p3_controlnet.train", "--base", sd14, *FLAGS]
    command += ["--fill50k", tmp_path / "fill50k"]
    try:
        started = time.monotonic()
        whole = run_process([*command, "--run-dir", tmp_path / "whole"], timeout=900)
        assert whole.returncode == 0, whole.stderr
        state = tmp_path / "whole" / "state.safetensors"
        expected, size = digest(state), state.stat().st_size
        state.unlink()

        # Killed while it computes the second step, after the state of the first is on disk.
        again = [*command, "--run-dir", tmp_path / "halves", "--checkpoint-every", "1"]
        state = tmp_path / "halves" / "state.safetensors"
        with subprocess.Popen(
            [str(part) for part in again], env=environment(), stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and steps_done(state) == 0:
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and steps_done(state) == 1
        rest = run_process(again, timeout=900)
        assert rest.returncode == 0 and "from step 1" in rest.stdout, rest.stderr
        assert digest(state) == expected
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        with capsys.disabled():
            print(
                f"\nControlNet at v1.4's size: peak memory {peak / 1e9:.1f} GB, state on disk"
                f" {size / 1e9:.1f} GB, {time.monotonic() - started:.0f} s"
            )
        assert peak < 16e9 and size < 6e9

        model = load_stable_diffusion(sd14)
        last = tmp_path / "halves" / "last"
        model.controlnet = load_controlnet(last, model.unet)
        pipeline = StableDiffusionControlNetPipeline(
            vae=model.autoencoder,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            controlnet=ControlNetModel.from_pretrained(last),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        generator = torch.Generator().manual_seed(0)
        x_t, t = torch.randn(1, 4, 32, 32, generator=generator), torch.tensor([981])
        hint = torch.rand(1, 3, 256, 256, generator=generator)
        condition = text_condition(model, ["red circle with blue background"], hint)
        with torch.no_grad():
            ours = model.apply_model(x_t, t, condition)
            skips, middle = pipeline.controlnet(
                x_t, t, condition.context, controlnet_cond=hint, return_dict=False
            )
            theirs = pipeline.unet(
                x_t,
                t,
                condition.context,
                down_block_additional_residuals=skips,
                mid_block_additional_residual=middle,
            ).sample
        assert float(middle.abs().max()) > 0.0
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    finally:
        for path in tmp_path.rglob("*.safetensors"):
            os.unlink(path)
