"""Sampling faces: the homework's convention to the grey level, the others by their steps, and the
same bytes however it is run."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import contents, exit_code, run_process
from tiny_faces import noise, save_noises, tiny_faces
from torch import Tensor

from common.diffusion.schedule import linear_schedule
from common.images import read_rgb
from p2_ddim import inference
from p2_ddim.model import FaceUNet
from p2_ddim.sampling import (
    CONVENTIONS,
    SamplingConfig,
    minmax_to_uint8,
    plan,
    read_noise,
    read_noises,
    sample_faces,
)


def run(noises: Path, out: Path, checkpoint: Path, *flags: object) -> dict[str, bytes]:
    arguments = (
        "--noises",
        noises,
        "--output-dir",
        out,
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        *flags,
    )
    assert exit_code(inference.main, inference.Config, *arguments) == 0
    return contents(out)


def draw(network: FaceUNet, *seeds: int, **config: object) -> Tensor:
    named_noises = [(f"{seed:02d}", noise(seed)) for seed in seeds]
    return torch.cat(
        [
            x0
            for _, x0 in sample_faces(
                network, named_noises, SamplingConfig(**config), show_progress=False
            )
        ]
    )


# ----------------------------------------------------------------------------
# The homework's convention.


def transcription(network: FaceUNet, x_T: Tensor, eta: float = 0.0) -> np.ndarray:
    """The formulas of the homework's convention, step by step in float64: the image in [0, 1], [H,
    W, 3]."""
    network = network.double()
    betas = np.linspace(1e-4, 2e-2, 1000)
    abar, product = [], 1.0
    for beta in betas:
        product *= 1.0 - float(beta)
        abar.append(product)
    x = x_T.double()[None]
    for t in range(981, 0, -20):
        previous = t - 20 if t > 1 else 0
        with torch.no_grad():
            eps = network(x, torch.tensor([t]))
        x0 = torch.clamp((x - math.sqrt(1 - abar[t]) * eps) / math.sqrt(abar[t]), -1, 1)
        sigma = (
            eta
            * math.sqrt((1 - abar[previous]) / (1 - abar[t]))
            * math.sqrt(1 - abar[t] / abar[previous])
        )
        x = math.sqrt(abar[previous]) * x0 + math.sqrt(1 - abar[previous] - sigma**2) * eps
    image = x[0].numpy().transpose(1, 2, 0)
    return (image - image.min()) / (image.max() - image.min())


def test_the_images_are_the_transcriptions_to_one_grey_level(
    face_checkpoint: Path, noises: Path, tmp_path: Path
) -> None:
    run(noises, tmp_path, face_checkpoint)
    for seed in range(2):
        expected = np.round(transcription(tiny_faces(), noise(seed)) * 255.0)
        with Image.open(tmp_path / f"{seed:02d}.png") as image:
            assert image.mode == "RGB"
            written = np.asarray(image).astype(float)
        difference = np.abs(written - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.1
        assert written.min() == 0 and written.max() == 255
        assert written.std() > 20  # there is a picture to compare


def test_the_plan_is_the_homeworks() -> None:
    schedule, pairs = plan(SamplingConfig())
    assert pairs == [(t, max(t - 20, 0)) for t in range(981, 0, -20)]
    assert [schedule.abar(t) for t in (1, 21, 981)] == pytest.approx(
        [0.9997801, 0.9932204, 5.7878e-05], rel=1e-4
    )
    assert schedule.abar(0) == pytest.approx(0.9999)


def test_eta_adds_the_homeworks_noise() -> None:
    """With an oracle that always predicts the same image and eps, one step's spread is sigma."""
    calls: list[Tensor] = []

    class Still(torch.nn.Module):
        parameterization, side_multiple = "eps", 1

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            calls.append(x_t.clone())
            return torch.zeros_like(x_t)

    named_noises = [("a", torch.full((3, 64, 64), 0.5))]
    for eta in (0.0, 0.5, 1.0):
        calls.clear()
        next(sample_faces(Still(), named_noises, SamplingConfig(eta=eta), show_progress=False))
        schedule = linear_schedule()
        abar_t, abar_prev = schedule.abar(981), schedule.abar(961)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_prev)
        assert calls[1].std().item() == pytest.approx(sigma, rel=0.03, abs=1e-6)
        assert calls[1].mean().item() == pytest.approx(math.sqrt(abar_prev), abs=0.02)


def test_exact_kernels_are_chosen_for_sampling_alone() -> None:
    """A training that draws a preview keeps its own choice."""
    backends = torch.backends
    before = (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32)
    inside: list[tuple[bool, bool]] = []

    def look(*_: object) -> None:
        inside.append((backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32))

    try:
        backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = True, True
        config = SamplingConfig(steps=1)
        faces = sample_faces(tiny_faces(), [("a", noise(0))], config, callback=look)
        assert len(list(faces)) == 1 and inside == [(False, False)]
        assert backends.cudnn.allow_tf32 and backends.cuda.matmul.allow_tf32
    finally:
        backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before


def test_min_max_is_torchvisions(tmp_path: Path) -> None:
    """What save_image(normalize=True), with which the references were made, writes; each image for
    itself."""
    from torchvision.utils import save_image

    images = torch.stack([noise(0), 3.0 * noise(1) + 1.0, torch.zeros(3, 16, 16)])
    ours = minmax_to_uint8(images)
    for image, own in zip(images, ours, strict=True):
        save_image(image.clone(), tmp_path / "reference.png", normalize=True)
        assert torch.equal(own, read_rgb(tmp_path / "reference.png"))


# ----------------------------------------------------------------------------
# The other conventions.


def steps_taken(changes: dict[str, Any]) -> list[tuple[int, float, float, bool]]:
    """At each of 50 steps: what the network is fed, alpha-bar before and after it, and whether x0
    was clamped."""
    fed: list[int] = []

    class Loud(torch.nn.Module):
        parameterization, side_multiple = "eps", 1

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            fed.append(int(t))
            return -100.0 * torch.ones_like(x_t)  # an x0 far outside [-1, 1]

    clamped: list[bool] = []
    sampling = SamplingConfig(**changes)
    named_noises = [("a", torch.zeros(3, 2, 2))]
    list(
        sample_faces(
            Loud(),
            named_noises,
            sampling,
            callback=lambda i, t, x_t, x0: clamped.append(x0.abs().max().item() <= 1.0),
            show_progress=False,
        )
    )
    schedule, pairs = plan(sampling)
    abars = [(schedule.abar(t), schedule.abar(t_prev)) for t, t_prev in pairs]
    return [(t, *abar, clamp) for t, abar, clamp in zip(fed, abars, clamped, strict=True)]


def test_every_convention_takes_other_steps() -> None:
    walks = {name: steps_taken(changes) for name, changes in CONVENTIONS.items()}
    assert walks and all(len(walk) == 50 for walk in walks.values())
    assert len({str(walk) for walk in walks.values()}) == len(CONVENTIONS)


def test_each_convention_differs_where_its_name_says() -> None:
    """Held against alpha-bars computed here."""
    own = steps_taken(CONVENTIONS["homework"])
    abar = np.cumprod(1.0 - np.linspace(1e-4, 2e-2, 1000))
    longer = np.cumprod(1.0 - np.linspace(1e-4, 2e-2, 1001))
    assert [step[0] for step in own] == list(range(981, 0, -20)) and all(step[3] for step in own)
    assert own[-1][1:3] == pytest.approx((abar[1], abar[0]), rel=1e-12)

    free = steps_taken(CONVENTIONS["no clamp"])
    assert [step[:3] for step in free] == [step[:3] for step in own] and not any(
        step[3] for step in free
    )

    ends_at_one = steps_taken(CONVENTIONS["last alpha-bar 1"])
    assert ends_at_one[:-1] == own[:-1] and ends_at_one[-1][:3] == (1, own[-1][1], 1.0)

    leading = steps_taken(CONVENTIONS["t = 0, 20, ..., 980"])
    assert [step[0] for step in leading] == list(range(980, -1, -20)) and leading[-1][2] == 1.0

    table = steps_taken(CONVENTIONS["table of 1001"])
    assert [step[0] for step in table] == list(range(981, 0, -20))
    assert [step[1] for step in table] == pytest.approx(
        [longer[t] for t in range(981, 0, -20)], rel=1e-9
    )

    shifted = steps_taken(CONVENTIONS["alpha-bar of t - 1"])
    assert [step[0] for step in shifted] == list(range(981, 0, -20))
    assert [step[1] for step in shifted] == pytest.approx(
        [abar[t - 1] for t in range(981, 0, -20)], rel=1e-9
    )
    assert shifted[-1][2] == 1.0

    trailing = steps_taken(CONVENTIONS["trailing"])
    assert [step[0] for step in trailing] == list(range(999, 0, -20)) and trailing[-1][2] == 1.0

    linspace = steps_taken(CONVENTIONS["linspace"])
    assert [linspace[i][0] for i in (0, -1)] == [999, 0] and len(
        {step[0] for step in linspace}
    ) == 50


@pytest.mark.parametrize(
    ("flags", "convention"),
    [
        ("--no-clip-x0", "no clamp"),
        ("--last-abar one", "last alpha-bar 1"),
        ("--spacing leading --last-abar one", "t = 0, 20, ..., 980"),
        ("--table-length 1001", "table of 1001"),
        ("--table-offset -1", "alpha-bar of t - 1"),
        ("--spacing trailing --last-abar one", "trailing"),
        ("--spacing linspace --last-abar one", "linspace"),
    ],
)
def test_each_convention_is_a_flag(
    flags: str, convention: str, noises: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(inference, "main", lambda config: seen.append(config.sampling))
    arguments = ("--noises", noises, "--output-dir", tmp_path, *flags.split())
    assert exit_code(inference.main, inference.Config, *arguments) == 0
    assert seen == [SamplingConfig(**CONVENTIONS[convention])]


# ----------------------------------------------------------------------------
# Noise files.


def test_noises_of_three_or_four_dimensions_any_name_and_precision(tmp_path: Path) -> None:
    torch.save(noise(0), tmp_path / "b.pt")
    torch.save(noise(1)[None].double(), tmp_path / "A 7.pt")
    torch.save(noise(2).requires_grad_(), tmp_path / "c.d.pt")
    (tmp_path / "readme.txt").write_text("not a noise")
    named_noises = read_noises(tmp_path)
    assert [name for name, _ in named_noises] == ["A 7", "b", "c.d"]
    for (_, tensor), seed in zip(named_noises, (1, 0, 2), strict=True):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, noise(seed))


def test_a_noise_saved_on_cuda_is_read_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(noise(0)[None], tmp_path / "00.pt")
    assert b"cuda:0" in (tmp_path / "00.pt").read_bytes()
    assert torch.equal(read_noise(tmp_path / "00.pt"), noise(0))


def test_sizes_need_not_be_square(face_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    torch.save(torch.randn(3, 8, 24), tmp_path / "in" / "x.pt")
    run(tmp_path / "in", tmp_path / "out", face_checkpoint, "--steps", 2)
    assert read_rgb(tmp_path / "out" / "x.png").shape == (3, 8, 24)


# ----------------------------------------------------------------------------
# The same image however the work is split.


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_second_run_and_a_part_of_the_job_write_the_same_bytes(
    eta: float, face_checkpoint: Path, noises: Path, tmp_path: Path
) -> None:
    flags = ("--steps", 5, "--eta", eta)
    files = run(noises, tmp_path / "out", face_checkpoint, *flags)
    assert sorted(files) == ["00.png", "01.png", "02.png"] and len(set(files.values())) == 3
    assert run(noises, tmp_path / "again", face_checkpoint, *flags) == files
    alone = save_noises(tmp_path / "alone")
    (alone / "00.pt").unlink()
    assert run(alone, tmp_path / "part", face_checkpoint, *flags) == {
        name: files[name] for name in ("01.png", "02.png")
    }


def test_chunk_sizes_agree_to_a_grey_level() -> None:
    for eta in (0.0, 1.0):
        one = minmax_to_uint8(draw(tiny_faces(), 0, 1, 2, steps=5, eta=eta, chunk_size=1))
        for size in (2, 4):
            other = minmax_to_uint8(draw(tiny_faces(), 0, 1, 2, steps=5, eta=eta, chunk_size=size))
            assert (one.int() - other.int()).abs().max() <= 1


def test_two_processes_share_the_job_and_write_the_same_bytes(
    face_checkpoint: Path, noises: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the variables that torchrun sets, one process after the other."""
    whole = run(noises, tmp_path / "one", face_checkpoint, "--steps", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in (("0", ["00.png", "02.png"]), ("1", ["00.png", "01.png", "02.png"])):
        monkeypatch.setenv("RANK", rank)
        files = run(noises, tmp_path / "two", face_checkpoint, "--steps", 2)
        assert sorted(files) == names
    assert files == whole


def test_fresh_noise_depends_on_the_seed_only_where_it_is_drawn() -> None:
    network = tiny_faces()
    assert torch.equal(draw(network, 0, steps=5, seed=0), draw(network, 0, steps=5, seed=1))
    assert not torch.equal(
        draw(network, 0, steps=5, eta=1.0, seed=0), draw(network, 0, steps=5, eta=1.0, seed=1)
    )


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "heun"])
def test_other_samplers_run(sampler: str) -> None:
    assert draw(tiny_faces(), 0, steps=3, sampler=sampler).isfinite().all()


def test_a_v_network_samples_like_the_eps_network_that_it_implies() -> None:
    """The convention is the same for both: v is turned into x0 and eps first."""
    eps_network = tiny_faces()

    class AsV(torch.nn.Module):
        parameterization, side_multiple = "v", 2

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            alpha_t, rate = linear_schedule().alpha_sigma(int(t[0]))
            return (eps_network(x_t, t) - rate * x_t) / alpha_t

    first = draw(eps_network, 0, steps=5)
    torch.testing.assert_close(draw(AsV(), 0, steps=5), first, atol=1e-3, rtol=1e-3)


def test_no_stretch_clamps(face_checkpoint: Path, noises: Path, tmp_path: Path) -> None:
    run(noises, tmp_path, face_checkpoint, "--no-stretch", "--steps", 2)
    x0 = draw(tiny_faces(), 0, steps=2)[0]
    expected = ((x0.clamp(-1, 1) + 1) * 127.5).round()
    assert (read_rgb(tmp_path / "00.png").float() - expected).abs().max() <= 1


def test_the_default_sampling_is_the_homeworks() -> None:
    default = SamplingConfig()
    assert (default.sampler, default.steps, default.eta, default.precision) == (
        "ddim",
        50,
        0.0,
        "fp32",
    )
    assert default == SamplingConfig(**CONVENTIONS["homework"])


# ----------------------------------------------------------------------------
# The noise script.


def test_made_noises_are_fixed_and_like_the_homeworks(tmp_path: Path) -> None:
    """Noise NN depends on the seed, the side and NN alone; the shape is that of the course's
    files."""

    def make(folder: str, *flags: object) -> dict[str, bytes]:
        result = run_process(
            [sys.executable, "-m", "scripts.make_noise", "--output-dir", tmp_path / folder, *flags]
        )
        assert result.returncode == 0, result.stderr
        return contents(tmp_path / folder)

    files = make("ten", "--side", 8)
    assert sorted(files) == [f"{i:02d}.pt" for i in range(10)]
    assert make("two", "--side", 8, "--count", 2) == {
        name: files[name] for name in ("00.pt", "01.pt")
    }
    first = torch.load(tmp_path / "ten" / "00.pt", weights_only=True)
    assert first.shape == (1, 3, 8, 8) and first.dtype == torch.float32
    values = torch.stack([noise for _, noise in read_noises(tmp_path / "ten")])
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1 and len(values.unique()) > 1900
