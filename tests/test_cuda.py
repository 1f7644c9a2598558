"""Every problem on CUDA against the CPU: training steps, samplers, resuming and drawing.

    # on a machine with a CUDA device, under two minutes
    python3 -m pytest -m cuda

Trainers and drawing programs run as a user runs them. A training on CUDA draws other numbers than
one on the CPU, so both get the CPU's: its batches, timesteps, noise and dropped conditions. TF32 is
off. The reference is the CPU's result in float32.

A part of the tests also runs with the CPU in the place of CUDA: a rehearsal in the normal suite.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import CONFIG as DIGITS
from tiny import exit_code, stop_after, tiny_network
from tiny_base import SMALL_AUTOENCODER, SMALL_UNET, save_small_models, tiny_base
from tiny_concepts import make_world, quick
from tiny_concepts import photos as concept_photos
from tiny_faces import CONFIG as FACES
from tiny_faces import save_noises, tiny_faces
from tiny_latent import seeded, tiny_model
from tiny_pairs import write_pairs
from torch import Tensor, nn

import p1_diffusion.inference
import p1_diffusion.sampling
import p1_diffusion.train
import p2_ddim.inference
import p2_ddim.sampling
import p2_ddim.train
import p3_clip.personalisation.inference
import p3_clip.personalisation.train
import p3_controlnet.base.train_autoencoder
import p3_controlnet.base.train_text
import p3_controlnet.base.train_unet
import p3_controlnet.inference
import p3_controlnet.train
from common import training
from common.checkpoint import load_tensors
from common.diffusion.guidance import guided
from common.diffusion.process import denoiser
from common.diffusion.samplers import SAMPLERS, sample
from common.diffusion.schedule import make_schedule, trailing_pairs
from common.files import write_json
from common.images import read_rgb, to_model_range
from common.latent.generate import ControlledGenerationConfig, GenerationConfig
from common.latent.model import LatentDiffusion
from common.seeds import BatchDraws, StackedRandomGenerator
from p1_diffusion.augment import AUGMENTATION
from p1_diffusion.model import NULL_DIGIT
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult, projections
from p3_clip.personalisation.model import save_learned

STEPS = 3
FLAGS = ("--steps", STEPS, "--batch-size", 4, "--warmup", 1, "--log-every", 1)
FACES_SAMPLING = p2_ddim.sampling.SamplingConfig(steps=2, chunk_size=2)
LOOKS = ("--validate-every", STEPS, "--preview-every", STEPS)
NO_LOOKS = ("--validate-every", 0, "--preview-every", 0)


class Tolerance(NamedTuple):
    """How far a result may be from the CPU's in float32."""

    loss: float
    """Relative, of the first step's loss."""
    later: float
    """Relative, of the later steps' losses. It is larger, since Adam and Muon divide a gradient by
    its own size, and so take steps of full size along a gradient that is rounding alone."""
    gradient: float
    """Norm of the difference of the first step's gradients over the gradient's norm."""
    output: float
    """Of networks' and samplers' outputs, absolute, where values are about 1."""
    grey: float
    """Largest difference of pictures, in grey levels 0..255."""


TOLERANCES = {
    # float32 rounds to 6e-8; other kernels sum in another order, and the difference grows to about
    # 1e-6 through a network and back. TF32 rounds to 5e-4 and would be found.
    "fp32": Tolerance(1e-5, 1e-3, 1e-4, 1e-4, 1.0),
    # bfloat16 rounds to 4e-3, and CPU and CUDA round at different operations. On the CPU gradients
    # differ by up to 1.5e-2.
    "bf16": Tolerance(1e-2, 3e-2, 6e-2, 1e-1, 16.0),
}
CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
)


def on(device: str, *values: Any) -> Any:
    """Test parameters (device, *values)."""
    return pytest.param(device, *values, marks=CUDA if device == "cuda" else ())


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Full float32; accelerate forgets the device of the test before."""
    # cuBLAS reads it when it is first used; deterministic kernels need it.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [module.allow_tf32 for module in backends]
    for module in backends:
        module.allow_tf32 = False
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for module, value in zip(backends, before, strict=True):
        module.allow_tf32 = value


@pytest.fixture
def deterministic_kernels() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and coarse validations and previews."""
    quick(monkeypatch)
    control, autoencoder = p3_controlnet.train, p3_controlnet.base.train_autoencoder
    unet, text = p3_controlnet.base.train_unet, p3_controlnet.base.train_text
    for module, values in (
        (p1_diffusion.train, {"VALIDATION_IMAGES": 10}),
        (p1_diffusion.sampling, {"IMAGES_PER_CLASS": 4}),
        (p2_ddim.train, {"PREVIEW_IMAGES": 2, "PREVIEW_SAMPLING": FACES_SAMPLING}),
        (autoencoder, {"VALIDATION_IMAGES": 6, "PREVIEW_IMAGES": 4}),
        (text, {"VALIDATION_CAPTIONS": 20}),
        (unet, {"VALIDATION_EXAMPLES": 6, "MEASURED_EXAMPLES": 8, "PREVIEW_COLUMNS": 1}),
        (unet, {"PREVIEW_PROMPTS": unet.PREVIEW_PROMPTS[:2]}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    for module, config in (
        (p1_diffusion.train, p1_diffusion.sampling.SamplingConfig(steps=1)),
        (control, ControlledGenerationConfig(steps=2, chunk_size=2)),
        (unet, GenerationConfig(steps=1, chunk_size=2)),
    ):
        monkeypatch.setattr(module, type(config).__name__, lambda config=config: config)


# ----------------------------------------------------------------------------
# Training.


class World(NamedTuple):
    """Folders of data and models."""

    digits: Path
    faces: Path
    small: Path
    """Small networks in digits/, faces/, base/, control/, clip/ and matrices/ (learned concepts);
    photos of concepts in photos/, pairs in pairs/training/, noises/ of faces and input.json."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, digits_root: Path, photos: Path) -> World:
    root = save_small_models(make_world(tmp_path_factory.mktemp("cuda")))
    # Nothing in them is zero, as new networks' last layers are: they would hold the gradient back.
    tiny_network(dataclasses.replace(DIGITS, augmentation=AUGMENTATION)).save(root / "digits")
    tiny_faces(dataclasses.replace(FACES, patch=2, refine=8)).save(root / "faces")
    save_noises(root / "noises")
    write_pairs(root / "pairs" / "training", 2)
    concepts = [Concept("<new1>", seeded(nn.Linear, 16, 1).weight.detach())]
    weights = {name: 1.5 * w.detach() for name, w in projections(tiny_base().unet).items()}
    about = {"concepts": [{"token": "<new1>", "word": "red", "phrase": "{}"}]}
    tasks = {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["A <new1> on red."]}}
    tasks["0"] |= {"prompt_4_clip_eval": ["A dog on red."], "baseline": [[79, 34]]}
    write_json(root / "input.json", tasks)
    save_learned(root / "matrices", CustomDiffusionResult(weights, concepts), about)
    return World(digits_root, photos, root)


class Trainer(NamedTuple):
    """A trainer, and its flags for a small network."""

    module: ModuleType
    flags: Callable[[World], tuple[Any, ...]]


TRAINERS = {
    "digits": Trainer(
        p1_diffusion.train,
        lambda world: ("--data", world.digits, "--init-from", world.small / "digits"),
    ),
    "faces": Trainer(
        p2_ddim.train,
        lambda world: ("--data", world.faces, "--init-from", world.small / "faces"),
    ),
    "ControlNet": Trainer(
        p3_controlnet.train,
        lambda world: (
            *("--base", world.small / "base", "--init-from", world.small / "control"),
            *("--pictures", 8, "--fill50k", world.small / "pairs", "--validation-pictures", 2),
        ),
    ),
    "autoencoder": Trainer(
        p3_controlnet.base.train_autoencoder, lambda world: ("--pictures", 8, *SMALL_AUTOENCODER)
    ),
    "text encoder": Trainer(
        p3_controlnet.base.train_text,
        lambda world: ("--captions", 20, "--clip", world.small / "clip"),
    ),
    "small U-Net": Trainer(
        p3_controlnet.base.train_unet,
        lambda world: (
            *("--autoencoder", world.small / "base" / "vae", "--pictures", 8, *SMALL_UNET),
            *("--text-encoder", world.small / "base" / "text_encoder"),
            *("--init-from", world.small / "base" / "unet"),
        ),
    ),
    "textual-inversion": Trainer(
        p3_clip.personalisation.train, lambda world: concept_photos(world.small, "a")
    ),
    "custom-diffusion": Trainer(
        p3_clip.personalisation.train,
        lambda world: (*concept_photos(world.small, "a"), "--num-class-images", 2),
    ),
}


def train(name: str, world: World, run_dir: Path, *flags: Any) -> int:
    """Runs a trainer and returns its exit code."""
    module, own = TRAINERS[name]
    method = (name,) if module is p3_clip.personalisation.train else ()
    return exit_code(
        module.main, module.Config, *method, "--run-dir", run_dir, *own(world), *FLAGS, *flags
    )


class Trained(NamedTuple):
    """What a training computed."""

    losses: list[float]
    """Of each step."""
    gradient: Tensor
    """Of the first step, all parameters in one row."""
    batches: list[training.Batch]


class CpuDraws(BatchDraws):
    """The draws of a training on the CPU, moved to the device."""

    def __init__(self, seed: int, count: int, device: torch.device | str = "cpu") -> None:
        super().__init__(seed, count)
        self._to = device

    def draw(self, index: int, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        return super().draw(index, make).to(self._to)


def observed(
    name: str, world: World, run_dir: Path, *flags: Any, batches: list[training.Batch] | None = None
) -> Trained:
    """A training with the draws of the CPU, and with these batches if they are given."""
    module, losses, gradients = TRAINERS[name].module, [], []
    taken: list[training.Batch] = []
    fit, backward = module.fit, training._backward

    def fit_on_these(params: Any, loss_fn: Any, get_batch: Any, *rest: Any, **options: Any) -> None:
        def given(step: int, generator: torch.Generator) -> training.Batch:
            taken.append(batches[step] if batches else get_batch(step, generator))
            return taken[-1]

        fit(params, loss_fn, given, *rest, **options)

    def observed_backward(objective: nn.Module, *rest: Any) -> Tensor:
        loss = backward(objective, *rest)
        losses.append(loss.item())
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in objective.parameters())
        gradients.append(torch.cat([grad.flatten().float().cpu() for grad in grads]))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", fit_on_these)
        patch.setattr(training, "BatchDraws", CpuDraws)
        patch.setattr(training, "_backward", observed_backward)
        assert train(name, world, run_dir, *flags) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trained(losses, gradients[0], taken)


@pytest.fixture(scope="module")
def on_cpu(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """The training of that name on the CPU in float32, made once."""
    return functools.cache(
        lambda name: observed(
            name, world, tmp_path_factory.mktemp(name), "--device", "cpu", *NO_LOOKS
        )
    )


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    ("device", "precision"), [on("cpu", "bf16"), on("cuda", "fp32"), on("cuda", "bf16")]
)
def test_training_steps(
    name: str,
    device: str,
    precision: str,
    world: World,
    on_cpu: Callable[[str], Trained],
    tmp_path: Path,
) -> None:
    """Validation, preview and saving run on the device too."""
    expected, tolerance = on_cpu(name), TOLERANCES[precision]
    mixed = "no" if precision == "fp32" else precision
    flags = ("--device", device, "--mixed-precision", mixed, *LOOKS)
    found = observed(name, world, tmp_path / "run", *flags, batches=expected.batches)
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=tolerance.loss)
    assert found.losses[1:] == pytest.approx(expected.losses[1:], rel=tolerance.later)
    difference = (found.gradient - expected.gradient).norm() / expected.gradient.norm()
    assert difference < tolerance.gradient


@pytest.mark.parametrize(
    ("device", "name"), [on("cpu", "digits"), *(on("cuda", name) for name in TRAINERS)]
)
def test_a_resumed_training_equals_an_uninterrupted_one(
    name: str,
    device: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deterministic_kernels: None,
) -> None:
    """To the bit, stopped after two of three steps, with the device's own draws.

    On the CPU the tests of each trainer show it too.
    """
    module = TRAINERS[name].module
    flags = ("--device", device, *NO_LOOKS)
    assert train(name, world, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", stop_after(module.fit, 2))
        assert train(name, world, tmp_path / "run", *flags) == 130
    assert train(name, world, tmp_path / "run", *flags) == 0
    whole, again = (load_tensors(tmp_path / run / "state.safetensors") for run in ("whole", "run"))
    assert whole[1]["step"] == again[1]["step"] == STEPS
    assert whole[0].keys() == again[0].keys()
    assert all(torch.equal(value, again[0][key]) for key, value in whole[0].items())


# ----------------------------------------------------------------------------
# Sampling and drawing.


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("device", "precision"), [on("cpu", "bf16"), on("cuda", "fp32"), on("cuda", "bf16")]
)
def test_samplers(sampler: str, device: str, precision: str) -> None:
    """Guided in an interval, rescaled, clipped, with fresh noise, from the same noise."""

    def sampled(where: str, autocast: bool) -> Tensor:
        network, context = tiny_network().to(where), torch.tensor([[3, 0], [4, 1]], device=where)
        generators = StackedRandomGenerator([1, 2], where)
        null = torch.tensor([[NULL_DIGIT, 0], [NULL_DIGIT, 1]], device=where)
        predict = guided(network, context, null, 2.0, interval=(0, 700), rescale=0.7)
        schedule = make_schedule("cosine", zero_terminal=True)
        with torch.no_grad(), torch.autocast(where, torch.bfloat16, enabled=autocast):
            return sample(
                sampler,
                denoiser(predict, schedule, "v", clip_x0=True),
                schedule,
                generators.randn(3, 28, 28),
                trailing_pairs(1000, 3),
                eta=0.5 if SAMPLERS[sampler].takes_eta else 0.0,
                noise=lambda: generators.randn(3, 28, 28),
            ).cpu()

    difference = sampled(device, precision == "bf16") - sampled("cpu", False)
    assert difference.abs().max() < TOLERANCES[precision].output


@pytest.mark.parametrize("build", [tiny_base, tiny_model], ids=["small", "Stable Diffusion"])
@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
def test_encoding_images_and_text(device: str, build: Callable[[], LatentDiffusion]) -> None:
    model = build()
    images = to_model_range(torch.arange(3 * 128 * 128).remainder(251).byte().view(1, 3, 128, 128))

    def encoded(where: str) -> list[Tensor]:
        model.to(where)
        latents = model.encode(images.to(where), StackedRandomGenerator([1], where))
        return [x.cpu() for x in (latents, model.decode(latents), model.encode_text(["red"]))]

    for ours, theirs in zip(encoded(device), encoded("cpu"), strict=True):
        assert torch.allclose(ours, theirs, atol=TOLERANCES["fp32"].output)


class Program(NamedTuple):
    """A program that draws pictures, and its flags for a small network."""

    module: ModuleType
    flags: Callable[[World], tuple[Any, ...]]


PROGRAMS = {
    "digits": Program(
        p1_diffusion.inference,
        lambda world: ("--checkpoint", world.small / "digits", "--classes", "svhn/7"),
    ),
    "faces": Program(
        p2_ddim.inference,
        lambda world: ("--checkpoint", world.small / "faces", "--noises", world.small / "noises"),
    ),
    "circles": Program(
        p3_controlnet.inference,
        lambda world: (
            *("--checkpoint", world.small / "control", "--base", world.small / "base"),
            *("--prompts", world.small / "pairs" / "training" / "prompt.json", "--size", 64),
            *("--sources", world.small / "pairs" / "training" / "source"),
        ),
    ),
    "concepts": Program(
        p3_clip.personalisation.inference,
        lambda world: (
            *("--checkpoint", world.small / "base", "--concepts", world.small / "matrices"),
            *("--prompts", world.small / "input.json", "--count", 3, "--size", 64),
        ),
    ),
}


def drawn(name: str, world: World, folder: Path, *flags: Any) -> dict[str, Tensor]:
    """The pictures that a program draws, by their path."""
    module, own = PROGRAMS[name]
    flags = ("--output-dir", folder, *own(world), "--steps", 4, *flags)
    assert exit_code(module.main, module.Config, *flags) == 0
    paths = sorted(folder.rglob("*.png"))
    return {str(path.relative_to(folder)): read_rgb(path).int() for path in paths}


@pytest.mark.parametrize(
    ("device", "name", "precision"),
    [
        *(on(device, name, "fp32") for device in ("cpu", "cuda") for name in PROGRAMS),
        *(on("cpu", name, "bf16") for name in ("circles", "concepts")),
        *(on("cuda", name, "bf16") for name in ("faces", "circles", "concepts")),
    ],
)
def test_drawing(name: str, device: str, precision: str, world: World, tmp_path: Path) -> None:
    """A program's pictures; the chunks have another size, so that kernels differ on the CPU too."""
    flags = () if precision == "fp32" else ("--precision", precision)
    expected = drawn(name, world, tmp_path / "cpu", "--device", "cpu", "--chunk-size", 2)
    found = drawn(name, world, tmp_path / "out", "--device", device, "--chunk-size", 3, *flags)
    assert expected and found.keys() == expected.keys()
    limit = TOLERANCES[precision].grey
    assert all((found[path] - picture).abs().max() <= limit for path, picture in expected.items())
