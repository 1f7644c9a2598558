"""Measures time and peak memory of ControlNet training steps, this project's against diffusers'.

    # the small model; takes minutes
    python3 -m scripts.benchmark_controlnet
    # Stable Diffusion v1.4 with random weights; needs 20 GB and half an hour
    python3 -m scripts.benchmark_controlnet --size sd14

diffusers' step is that of its `train_controlnet.py`: the autoencoder and the text encoder run in
every step, with ControlNetModel, AdamW with its defaults, and gradients set to zero instead of
None. This project's step reads latents and text features from the cache. Each further recipe
changes one setting of this project's step.

Every measurement runs in a process of its own, so that peaks of memory are independent. The recipes
take turns, and the medians over all rounds are reported. Other programs disturb the timings, so
none should run at the same time.
"""

import dataclasses
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import cli
from common.devices import DeviceName, pick_device
from common.diffusion.schedule import make_schedule
from common.ema import EMA
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from common.latent.model import LatentDiffusion, downscale_of
from common.latent.small import AutoencoderConfig, UNetConfig, build_autoencoder, build_unet
from common.latent.stable_diffusion.sd14 import empty_networks
from common.seeds import StackedRandomGenerator, derive_seeds
from p3_controlnet.loss import latent_loss
from p3_controlnet.model import SD_HINT_CHANNELS, ControlNet
from p3_controlnet.train import HINT_CHANNELS

Size = Literal["sd14", "small", "tiny"]
BATCH = {"sd14": 1, "small": 32, "tiny": 2}  # default of --batch-size
IMAGE = {"sd14": 256, "small": 128, "tiny": 64}  # default of --image
CLIP_SHAPES = ROOT / "p3_clip" / "data" / "clip_shapes.json"
LEARNING = {"lr": 1e-5, "weight_decay": 1e-2}  # arguments of AdamW
CLIP_NORM = 1.0  # largest gradient norm


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a training step; the defaults are this project's step."""

    diffusers: bool = False
    """Use diffusers' ControlNetModel and training step."""
    cached_latents: bool = True
    """Read latents from the cache; otherwise the autoencoder runs in each step."""
    cached_text: bool = True
    """Read text features from the cache; otherwise the text encoder runs in each step."""
    encoders_loaded: bool = False
    """Keep the autoencoder and the text encoder in memory although no step uses them, as a trainer
    does that samples previews."""
    frozen_base: bool = True
    """Disable gradients of the base model's parameters, so that none is computed for its
    encoder."""
    channels_last: bool = False
    """Use the memory format channels_last for networks and latents."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    averaged: bool = False
    """Update an exponential moving average of the parameters."""
    bf16: bool = False
    """Frozen networks in bf16, and the trained one under autocast."""


RECIPES = {
    "diffusers": Recipe(diffusers=True, cached_latents=False, cached_text=False),
    "this project": Recipe(),
    "latents not cached": Recipe(cached_latents=False),
    "text not cached": Recipe(cached_text=False),
    "encoders kept in memory": Recipe(encoders_loaded=True),
    "base not frozen": Recipe(frozen_base=False),
    "channels last": Recipe(channels_last=True),
    "gradient checkpointing": Recipe(gradient_checkpointing=True),
    "with moving average": Recipe(averaged=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures training steps of a ControlNet, this project's against diffusers'."""

    size: Size = "small"
    """Networks, with random weights: sd14 is Stable Diffusion v1.4's size, small the small model's,
    tiny is for tests of this program."""
    batch_size: int | None = None
    """Images in a step. If it is not given, 32 (small), 1 (sd14) or 2 (tiny)."""
    image: int | None = None
    """Height and width of the images in pixels. If it is not given, 128 (small), 64 (tiny) or 256
    (sd14)."""
    rounds: int = 3
    """Number of measurements of each recipe."""
    steps: int = 5
    """Timed steps in a measurement, after one untimed step."""
    recipe: str | None = None
    """Measure only this recipe, in this process, and print the result as a line of JSON. If it is
    not given, all recipes are measured."""
    device: DeviceName = "cpu"
    """Device of the computation."""
    result: Path | None = ROOT / "results" / "p3_controlnet_speed.json"
    """JSON file to write; its entry for --size is replaced, the others are kept."""


def main(config: Config) -> None:
    """Measures all recipes, prints and writes the table; or prints the JSON of one recipe."""
    if config.rounds < 1 or config.steps < 1:
        raise InputError("--rounds and --steps must be at least 1")
    if config.recipe is None:
        rows = measure_all(config)
        print_rows(rows)
        if config.result:
            parts = read_json(config.result) if config.result.exists() else {}
            command = f"python3 -m scripts.benchmark_controlnet --size {config.size}"
            write_json(
                config.result,
                parts | {config.size: {"command": command, **settings(config), "rows": rows}},
            )
        return
    if config.recipe not in RECIPES:
        raise InputError(f"--recipe must be one of {', '.join(RECIPES)}, not {config.recipe!r}")
    print(json.dumps(measure(config, RECIPES[config.recipe])))


def settings(config: Config) -> dict[str, Any]:
    """The settings that the measurements depend on, with the defaults of the size filled in."""
    return {
        "batch_size": config.batch_size or BATCH[config.size],
        "image": config.image or IMAGE[config.size],
        "rounds": config.rounds,
        "steps": config.steps,
        "threads": torch.get_num_threads(),
        "device": config.device,
    }


# ----------------------------------------------------------------------------
# Measuring all recipes.


def measure_all(config: Config) -> list[dict[str, Any]]:
    """Medians over all rounds for each recipe, and their ratios to diffusers'.

    `seconds` is the time of a step; `speed` is diffusers' time over the recipe's, `memory` the
    recipe's peak over diffusers'.
    """
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in RECIPES}
    for _ in range(config.rounds):
        for name in RECIPES:
            turns[name].append(in_own_process(config, name))
    rows = []
    batch = settings(config)["batch_size"]
    for name, found in turns.items():
        seconds = statistics.median(second for turn in found for second in turn["seconds"])
        peak = statistics.median(turn["peak_gib"] for turn in found)
        rows.append(
            {
                "recipe": name,
                "seconds": seconds,
                "images_per_second": batch / seconds,
                "peak_gib": peak,
            }
        )
    reference = next(row for row in rows if row["recipe"] == "diffusers")
    for row in rows:
        row["speed"] = reference["seconds"] / row["seconds"]
        row["memory"] = row["peak_gib"] / reference["peak_gib"]
    return rows


def in_own_process(config: Config, recipe: str) -> dict[str, Any]:
    """The result of `measure` from a new process.

    Raises InputError if the process fails, for example because memory is exhausted.
    """
    given = {**settings(config), "size": config.size, "recipe": recipe}
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "threads"
    ]
    command = [sys.executable, "-m", "scripts.benchmark_controlnet", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"the recipe {recipe!r} could not be measured: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each recipe."""
    for row in rows:
        print(
            f"{row['recipe']:<24}{row['images_per_second']:9.3f} images/s ({row['speed']:5.2f}"
            f" times diffusers'), peak {row['peak_gib']:6.2f} GiB ({row['memory']:5.2f} times)"
        )


# ----------------------------------------------------------------------------
# Measuring one recipe.


class Networks(NamedTuple):
    """The frozen networks of a model, and the channels of the ControlNet's hint encoder."""

    unet: nn.Module
    autoencoder: nn.Module
    text_encoder: nn.Module
    hint_channels: tuple[int, ...]


class Inputs(NamedTuple):
    """A batch of N images, both raw and encoded as in the cache."""

    images: Tensor
    """float32 [N, 3, H, W] in [-1, 1]."""
    hints: Tensor
    """uint8 [N, 1, H, W]."""
    tokens: Tensor
    """long [N, L]."""
    latents: Tensor
    """float16 [N, C, h, w]."""
    contexts: Tensor
    """float16 [N, L, D]."""


def measure(config: Config, recipe: Recipe) -> dict[str, Any]:
    """Seconds of each timed step, and peak memory during the steps in GiB."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    networks = build(config.size)
    inputs = draw_inputs(networks, settings(config)["batch_size"], settings(config)["image"])
    step = (diffusers_step if recipe.diffusers else own_step)(networks, inputs, recipe, device)
    del networks  # frees the networks that the step does not use
    reset_peak(device)
    seconds = []
    for number in range(config.steps + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 0:
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "peak_gib": peak_memory(device) / 2**30}


def build(size: Size, device: torch.device | str = "cpu") -> Networks:
    """Builds the networks of a size with random weights; those of sd14 on `device`."""
    if size == "sd14":
        networks = empty_networks()
        for network in networks:
            state = {
                name: torch.empty_like(value, device=device)
                for name, value in network.state_dict().items()
            }
            network.load_state_dict(
                {name: value.uniform_(-0.02, 0.02) for name, value in state.items()}, assign=True
            )
        return Networks(*(network.to(device) for network in networks), SD_HINT_CHANNELS)
    from transformers import CLIPTextConfig, CLIPTextModel

    text = read_json(CLIP_SHAPES)["text_cfg"]
    autoencoder, unet = AutoencoderConfig(), UNetConfig()
    if size == "tiny":
        text = text | {"width": 16, "heads": 2, "layers": 1, "vocab_size": 100}
        autoencoder = AutoencoderConfig((8, 16), (1, 1), (2, 1), latent_channels=4)
        unet = UNetConfig(channels=(16, 32), heads=2, groups=4)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            bos_token_id=text["vocab_size"] - 2,
            eos_token_id=text["vocab_size"] - 1,
            pad_token_id=text["vocab_size"] - 1,
        )
    )
    network = build_autoencoder(autoencoder)
    hint_channels = HINT_CHANNELS[: downscale_of(network).bit_length()]
    return Networks(build_unet(unet, network, text["width"]), network, encoder, hint_channels)


def draw_inputs(networks: Networks, batch: int, image: int) -> Inputs:
    """Random inputs; the time of a step does not depend on their content."""
    side = image // downscale_of(networks.autoencoder)
    config = networks.text_encoder.config
    length = config.max_position_embeddings
    return Inputs(
        torch.rand(batch, 3, image, image) * 2.0 - 1.0,
        torch.randint(256, (batch, 1, image, image), dtype=torch.uint8),
        torch.randint(config.vocab_size, (batch, length)),
        torch.randn(batch, networks.unet.config.in_channels, side, side).half(),
        torch.randn(batch, length, config.hidden_size).half(),
    )


def own_step(
    networks: Networks, inputs: Inputs, recipe: Recipe, device: torch.device
) -> Callable[[], None]:
    """Returns this project's training step, that of `common.training.fit` and its latent loss."""
    needs_latents, needs_text = (
        not cached or recipe.encoders_loaded
        for cached in (recipe.cached_latents, recipe.cached_text)
    )
    model = LatentDiffusion(
        networks.autoencoder if needs_latents else nn.Identity(),
        networks.text_encoder if needs_text else nn.Identity(),
        None,
        networks.unet,
        make_schedule("scaled_linear"),
        controlnet=ControlNet.from_unet(networks.unet, networks.hint_channels),
    ).to(device)
    control = model.controlnet.train()
    model.unet.requires_grad_(not recipe.frozen_base)
    if recipe.bf16:
        model.cast(torch.bfloat16)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = dict(control.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), **LEARNING, fused=True)
    ema = EMA(parameters, 0.999) if recipe.averaged else None
    count = len(inputs.images)

    def step() -> None:
        generators = StackedRandomGenerator(derive_seeds(0, count=count), device)
        batch = {"latent": inputs.latents, "context": inputs.contexts, "hint": inputs.hints}
        batch = {name: value.to(device) for name, value in batch.items()}
        if not recipe.cached_latents:
            batch["latent"] = model.encode(inputs.images.to(device), generators)
        if not recipe.cached_text:
            with torch.no_grad():
                batch["context"] = model.text_encoder(inputs.tokens.to(device)).last_hidden_state
        if recipe.channels_last:
            batch["latent"] = batch["latent"].contiguous(memory_format=torch.channels_last)
        null = torch.zeros_like(batch["context"][0])
        with _autocast(device, recipe):
            loss = latent_loss(model, batch, null, generators, cond_drop_prob=0.3)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.unet.zero_grad(set_to_none=True)
        if ema:
            ema.update(parameters)

    return step


def diffusers_step(
    networks: Networks, inputs: Inputs, recipe: Recipe, device: torch.device
) -> Callable[[], None]:
    """Returns diffusers' training step, that of examples/controlnet/train_controlnet.py."""
    from diffusers import ControlNetModel, DDPMScheduler

    unet, autoencoder, text_encoder = (
        network.requires_grad_(False).to(device) for network in networks[:3]
    )
    control = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=networks.hint_channels
    )
    control = control.to(device).train()
    if recipe.gradient_checkpointing:
        control.enable_gradient_checkpointing()
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    for network in (unet, autoencoder, text_encoder):
        network.to(dtype)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(control.parameters(), **LEARNING)
    scaling = autoencoder.config.scaling_factor

    def step() -> None:
        encoded = autoencoder.encode(inputs.images.to(device, dtype))
        latents = (
            encoded.latent_dist.sample() if "latent_dist" in encoded else encoded.latent
        ) * scaling
        noise = torch.randn_like(latents)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, t)
        context = text_encoder(inputs.tokens.to(device), return_dict=False)[0]
        hint = inputs.hints.to(device).expand(-1, 3, -1, -1).float() / 255.0
        with _autocast(device, recipe):
            skips, middle = control(
                noisy, t, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False
            )
        predicted = unet(
            noisy,
            t,
            encoder_hidden_states=context,
            down_block_additional_residuals=[skip.to(dtype) for skip in skips],
            mid_block_additional_residual=middle.to(dtype),
            return_dict=False,
        )[0]
        F.mse_loss(predicted.float(), noise.float(), reduction="mean").backward()
        nn.utils.clip_grad_norm_(control.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def _autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """Context manager for the trained network."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16)


# ----------------------------------------------------------------------------
# Measuring memory.


def reset_peak(device: torch.device) -> None:
    """Resets the peak of memory after the networks were built, on CUDA and Linux.

    On other systems a warning is printed.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak memory includes the construction of the networks", file=sys.stderr)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on CUDA that of the device, else the resident memory of this process.

    The latter is `VmHWM` on Linux and `ru_maxrss` on other systems.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


if __name__ == "__main__":
    cli.run(main, Config)
