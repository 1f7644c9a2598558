"""Measures training and sampling of all problems on one GPU, beside diffusers on the same card.

    python3 -m scripts.benchmark_gpu
    # some rows, for at most two minutes
    python3 -m scripts.benchmark_gpu --rows "p1 *" "sd14 train *bf16*" --seconds 120
    # every row with tiny networks, also on a CPU
    python3 -m scripts.benchmark_gpu --rehearse

All weights are random, and so are the inputs. What the rows are:

- `p1 train`: a training step of the digits network, with Muon as in its trainer; `p1 draw`: 500
  guided digits.
- `p2 step`: one DDIM step of the homework's face network at 256x256, this project's and diffusers'.
- `sd14 draw`: pictures of 512x512 from Stable Diffusion v1.4's size with a ControlNet, guided, 20
  steps of DPM-Solver++(2M); diffusers' is StableDiffusionControlNetPipeline.
- `sd14 train`: one training step of the ControlNet; both are those of scripts.benchmark_controlnet.
  In bf16 the frozen networks are bf16 and the trained one computes under autocast, in both.

fp32 is without TF32. A row is the median over steps after a warm-up, each with the device
synchronised. Where the memory does not suffice, the row says so. The result file is written after
each row; rows of the same name and card are replaced, others kept. No other program should use the
GPU.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from common import cli
from common.data.digits import DATASETS, NUM_DIGITS, SIZE, BalancedDraw, Digits
from common.devices import pick_device
from common.diffusion.loss import LossWeighting, diffusion_loss
from common.diffusion.schedule import make_schedule
from common.ema import EMA
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from common.images import to_model_range
from common.latent.generate import ControlledGenerationConfig, Request, generate
from common.latent.model import LatentDiffusion
from common.latent.text_encoder import clip_tokenizer
from common.optimizers import make_optimizers
from common.seeds import BatchDraws, batch_seed, noise_seed
from common.training import prepare_network
from p1_diffusion.model import ContextUNet, ContextUNetConfig
from p1_diffusion.sampling import SamplingConfig, sample_digits
from p1_diffusion.train import TRAINING as DIGITS_TRAINING
from p1_diffusion.train import batch_of
from p3_controlnet.model import ControlNet
from scripts import benchmark_controlnet, benchmark_p2
from scripts.benchmark_controlnet import Networks, Recipe, peak_memory, reset_peak
from scripts.benchmark_training import now

RESULT = ROOT / "results" / "gpu.json"
Precision = Literal["fp32", "tf32", "bf16"]
OWN, THEIRS = "this project", "diffusers"
DIGITS_IMAGES = 20_000  # random digits in memory
DRAWN_DIGITS = 500
PROMPT, SAMPLING_STEPS = "red circle with teal background", 20
Step = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures training and sampling on one GPU, beside diffusers."""

    rows: tuple[str, ...] = ("*",)
    """Names of the rows to measure; * stands for any text. They are measured in the program's
    order."""
    seconds: float = 600.0
    """No row begins after so many seconds; those left out are named."""
    row_seconds: float = 3.0
    """Seconds of timed steps in a row; at least three steps are timed."""
    rehearse: bool = False
    """Tiny networks and few steps, also on a CPU; the numbers mean nothing, and nothing is written
    but for --result."""
    result: Path | None = None
    """JSON file to write. Default: results/gpu.json; none with --rehearse."""


class Row(NamedTuple):
    """A measurement."""

    name: str
    images: int
    """Images in a step."""
    precision: Precision
    build: Callable[[torch.device, bool], Step]
    """(device, rehearse) to the step to time; what it holds is freed after the row."""


def main(config: Config) -> None:
    """Measures the rows one after the other, printing and writing each."""
    began = time.monotonic()
    if config.seconds <= 0.0 or config.row_seconds <= 0.0:
        raise InputError("--seconds and --row-seconds must be above 0")
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.name, name) for name in config.rows)]
    if not rows:
        raise InputError(f"--rows fits none of: {'; '.join(row.name for row in ROWS)}")
    if not (torch.cuda.is_available() or config.rehearse):
        raise InputError("no CUDA device is present; --rehearse runs tiny networks on a CPU")
    device = pick_device("auto" if config.rehearse else "cuda")
    path = config.result or (None if config.rehearse else RESULT)
    about = {
        "command": "python3 -m scripts.benchmark_gpu",
        "card": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        "rehearsal": config.rehearse,
    }
    print(f"{about['card']}, CUDA {about['cuda']}")
    for number, row in enumerate(rows):
        if time.monotonic() - began > config.seconds:
            print(f"no time was left for: {'; '.join(left.name for left in rows[number:])}")
            break
        found = measure(row, device, config)
        print(sentence(found), flush=True)
        if path:
            write_row(path, about, found)


def measure(row: Row, device: torch.device, config: Config) -> dict[str, Any]:
    """Seconds of a step, images per second and peak memory; or "error", if the memory is full."""
    found: dict[str, Any] = {"name": row.name, "images": row.images}
    seconds: list[float] = []
    with contextlib.suppress(torch.OutOfMemoryError):
        seconds, peak = time_steps(row, device, config)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not seconds:
        return found | {"error": "out of memory"}
    median = statistics.median(seconds)
    return found | {
        "seconds": median,
        "images_per_second": row.images / median,
        "steps": len(seconds),
        "peak_gib": peak / 2**30,
    }


def time_steps(row: Row, device: torch.device, config: Config) -> tuple[list[float], int]:
    """Seconds of each timed step, and peak memory in bytes, the networks included."""
    with precision(row.precision):
        step = row.build(device, config.rehearse)
        for _ in range(1 if config.rehearse else 2):
            step()
        started = now(device)
        reset_peak(device)
        seconds: list[float] = []
        fewest = 1 if config.rehearse else 3
        while len(seconds) < fewest or (not config.rehearse and sum(seconds) < config.row_seconds):
            step()
            ended = now(device)
            seconds.append(ended - started)
            started = ended
    return seconds, peak_memory(device)


@contextlib.contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Sets TF32 for "tf32" and full float32 otherwise; both are restored after the block."""
    modules = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.allow_tf32 = value


def sentence(found: dict[str, Any]) -> str:
    """The row as a line."""
    if "error" in found:
        return f"{found['name']:<52} {found['error']}"
    return (
        f"{found['name']:<52} {1e3 * found['seconds']:9.1f} ms a step,"
        f" {found['images_per_second']:9.2f} images/s, peak {found['peak_gib']:6.2f} GiB"
    )


def write_row(path: Path, about: dict[str, Any], found: dict[str, Any]) -> None:
    """Puts the row into the file; rows of another card or CUDA are dropped."""
    before = read_json(path) if path.exists() else {}
    same = all(before.get(key) == value for key, value in about.items())
    rows = [row for row in before["rows"] if row["name"] != found["name"]] if same else []
    write_json(path, {**about, "rows": [*rows, found]})


# ----------------------------------------------------------------------------
# Problem 1.


def digits_network(rehearse: bool) -> ContextUNet:
    """The trainer's network with random weights."""
    torch.manual_seed(0)
    if rehearse:
        return ContextUNet(
            ContextUNetConfig(
                channels=(16, 32), blocks=(1, 1), attention=(1,), heads=2, embedding=32
            )
        )
    return ContextUNet(ContextUNetConfig())


def train_digits(device: torch.device, rehearse: bool, batch: int, autocast: bool) -> Step:
    """A step as in `common.training.fit`, on random digits that are kept on the device."""
    model = digits_network(rehearse)
    network = prepare_network(model, dataclasses.replace(DIGITS_TRAINING, device=device.type))
    weighting = LossWeighting("learned", model.config.parameterization, "logit_normal").to(device)
    params = dict(model.named_parameters()) | dict(weighting.named_parameters())
    options = {name: getattr(DIGITS_TRAINING, name) for name in ("lr", "beta2", "weight_decay")}
    optimizers = make_optimizers(params, DIGITS_TRAINING.optimizer, **options)
    ema = EMA(params, DIGITS_TRAINING.ema_decay)
    schedule, data = make_schedule(model.config.schedule), random_digits(device, rehearse)
    balanced, steps = BalancedDraw(data), itertools.count()

    def step() -> None:
        number = next(steps)
        generator = torch.Generator(device).manual_seed(batch_seed(0, number))
        images = batch_of(data, balanced(batch, generator))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = diffusion_loss(
                network,
                schedule,
                to_model_range(images["image"]),
                torch.stack([images["digit"], images["dataset"]], dim=1),
                BatchDraws(noise_seed(0, number), batch, device).part(slice(batch)),
                parameterization=model.config.parameterization,
                **weighting.options,
            )
        loss.backward()
        nn.utils.clip_grad_norm_(params.values(), DIGITS_TRAINING.max_grad_norm)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(params)

    return step


def random_digits(device: torch.device, rehearse: bool) -> Digits:
    """Random images of all classes."""
    count = 200 if rehearse else DIGITS_IMAGES
    generator = torch.Generator().manual_seed(0)
    return Digits(
        torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        torch.arange(count) % NUM_DIGITS,
        torch.arange(count) // NUM_DIGITS % len(DATASETS),
        [str(k) for k in range(count)],
    ).to(device)


def draw_digits(device: torch.device, rehearse: bool) -> Step:
    """The trainer's network draws DRAWN_DIGITS digits in one chunk, with the program's defaults."""
    model = digits_network(rehearse).eval().to(device, memory_format=torch.channels_last)
    count = 2 if rehearse else DRAWN_DIGITS
    keys = [(DATASETS[k % 2], k % NUM_DIGITS, 1 + k // NUM_DIGITS) for k in range(count)]
    config = SamplingConfig(steps=2 if rehearse else SamplingConfig.steps, chunk_size=count)
    return lambda: list(sample_digits(model, keys, config, show_progress=False))


# ----------------------------------------------------------------------------
# Problem 2.


def face_step(device: torch.device, rehearse: bool, code: str, autocast: bool) -> Step:
    """A DDIM step of one face by scripts.benchmark_p2."""
    side = 32 if rehearse else 256
    x_t = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    make = benchmark_p2.own_step if code == OWN else benchmark_p2.diffusers_step
    take = make(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            take(x_t)

    return step


# ----------------------------------------------------------------------------
# Stable Diffusion v1.4's size.


def networks_of(device: torch.device, rehearse: bool) -> Networks:
    """The frozen networks with random weights, on the device."""
    torch.manual_seed(0)
    if not rehearse:
        return benchmark_controlnet.build("sd14", device)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return Networks(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16),
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        ).to(device),
        AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ).to(device),
        CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, **text)).to(device),
        (4, 4, 8, 8),
    )


def draw_pictures(
    device: torch.device, rehearse: bool, code: str, batch: int, dtype: torch.dtype
) -> Step:
    """Draws `batch` pictures with a ControlNet, in `dtype`."""
    networks = networks_of(device, rehearse)
    steps = 2 if rehearse else SAMPLING_STEPS
    make = own_drawing if code == OWN else diffusers_drawing
    return make(networks, batch, steps, dtype)


def own_drawing(networks: Networks, batch: int, steps: int, dtype: torch.dtype) -> Step:
    """`common.latent.generate` in one chunk; the autoencoder stays in float32, as in programs."""
    unet, autoencoder, text_encoder, channels = networks
    model = LatentDiffusion(
        autoencoder,
        text_encoder,
        clip_tokenizer(77),
        unet,
        make_schedule("scaled_linear"),
        controlnet=ControlNet.from_unet(unet, channels).eval().requires_grad_(False),
    )
    model.to(unet.device).cast(dtype)
    hint = torch.zeros(3, model.side, model.side, dtype=torch.uint8)
    requests = [Request(PROMPT, seed, hint) for seed in range(batch)]
    config = ControlledGenerationConfig(steps=steps, chunk_size=batch)
    return lambda: list(generate(model, requests, config, show_progress=False))


def diffusers_drawing(networks: Networks, batch: int, steps: int, dtype: torch.dtype) -> Step:
    """StableDiffusionControlNetPipeline with the same solver."""
    from diffusers import (
        ControlNetModel,
        DPMSolverMultistepScheduler,
        StableDiffusionControlNetPipeline,
    )

    unet, autoencoder, text_encoder, channels = networks
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    pipeline = StableDiffusionControlNetPipeline(
        autoencoder,
        text_encoder,
        clip_tokenizer(77),
        unet,
        control,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(unet.device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    side = unet.config.sample_size * pipeline.vae_scale_factor
    hints = torch.zeros(batch, 3, side, side)
    return lambda: pipeline(
        [PROMPT] * batch, hints, num_inference_steps=steps, guidance_scale=7.5, output_type="pt"
    )


def train_controlnet(
    device: torch.device,
    rehearse: bool,
    code: str,
    batch: int,
    autocast: bool,
    gradient_checkpointing: bool,
) -> Step:
    """A training step of scripts.benchmark_controlnet."""
    networks = networks_of(device, rehearse)
    inputs = benchmark_controlnet.draw_inputs(networks, batch, 64 if rehearse else 512)
    theirs = code == THEIRS
    recipe = Recipe(
        diffusers=theirs,
        cached_latents=not theirs,
        cached_text=not theirs,
        gradient_checkpointing=gradient_checkpointing,
        bf16=autocast,
    )
    make = benchmark_controlnet.diffusers_step if theirs else benchmark_controlnet.own_step
    return make(networks, inputs, recipe, device)


# ----------------------------------------------------------------------------
# All rows, the most important first in each part.


def all_rows() -> Iterator[Row]:
    """The rows in the order of measurement."""
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    for name in precisions:
        for batch in (128, 1024):
            build = functools.partial(train_digits, batch=batch, autocast=name == "bf16")
            yield Row(f"p1 train, {name}, batch {batch}", batch, name, build)
    for name in ("tf32", "fp32"):
        yield Row(f"p1 draw, {name}", DRAWN_DIGITS, name, draw_digits)
    for name in ("bf16", "tf32", "fp32"):
        for code in (OWN, THEIRS):
            build = functools.partial(face_step, code=code, autocast=name == "bf16")
            yield Row(f"p2 step, {name}, {code}", 1, name, build)
    for name in precisions:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        for batch in (1, 4):
            for code in (OWN, THEIRS):
                build = functools.partial(draw_pictures, code=code, batch=batch, dtype=dtype)
                yield Row(f"sd14 draw, {name}, batch {batch}, {code}", batch, name, build)
    for name in precisions:
        for batch in (4, 16, 1, 8):
            for checkpointing in (False, True):
                for code in (OWN, THEIRS):
                    build = functools.partial(
                        train_controlnet,
                        code=code,
                        batch=batch,
                        autocast=name == "bf16",
                        gradient_checkpointing=checkpointing,
                    )
                    how = ", checkpointing" if checkpointing else ""
                    yield Row(f"sd14 train, {name}, batch {batch}{how}, {code}", batch, name, build)


ROWS = tuple(all_rows())


if __name__ == "__main__":
    cli.run(main, Config)
