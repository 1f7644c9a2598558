"""Muon over convolutions, beside AdamW: what it moves, by how much, and that runs with it and with
8-bit moments resume bit for bit."""

import contextlib
import dataclasses
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import contents
from torch import Tensor, nn

from common.checkpoint import load_tensors
from common.errors import InputError
from common.optimizers import (
    NEWTON_SCHULZ,
    Muon,
    OptimizerName,
    is_hidden_matrix,
    make_optimizers,
    step_all,
)
from common.seeds import Draws
from common.training import Batch, TrainingConfig, fit

CONFIG = TrainingConfig(
    steps=6,
    batch_size=4,
    optimizer="muon",
    lr=0.01,
    warmup=2,
    log_every=1,
    checkpoint_every=3,
    device="cpu",
)


def test_hidden_matrices_are_those_of_layers_between_features() -> None:
    network = nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 32, 3),
            "hidden": nn.Conv2d(32, 16, 3),
            "linear": nn.Linear(16, 64),
            "embedding": nn.Embedding(100, 64),
            "norm": nn.GroupNorm(2, 32),
            "conv_out": nn.Conv2d(32, 3, 3),
        }
    )
    hidden = {name for name, param in network.named_parameters() if is_hidden_matrix(name, param)}
    assert hidden == {"hidden.weight", "linear.weight"}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_moves_along_the_nearest_orthogonal_matrix(
    memory_format: torch.memory_format,
) -> None:
    """From zero momentum the update is 0.2 sqrt(max(A, B)) lr times U V^T of the gradient's
    singular value decomposition, up to the Newton-Schulz iteration's singular values, which lie in
    0.6 to 1.3 instead of at 1."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, bias=False).to(memory_format=memory_format)
    before = conv.weight.detach().clone()
    gradient = torch.randn(conv.weight.shape, generator=generator)
    conv.weight.grad = gradient.to(memory_format=memory_format)
    muon = Muon([conv.weight], lr=0.1, weight_decay=0.0)
    muon.step()
    update = (before - conv.weight.detach()).flatten(1) / (0.1 * 0.2 * math.sqrt(144))
    assert torch.linalg.svdvals(update).min() > 0.6 and torch.linalg.svdvals(update).max() < 1.3
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    inner = (update * (u @ v)).sum() / (update.norm() * (u @ v).norm())
    assert inner > 0.97
    muon.zero_grad()
    assert conv.weight.grad is None


@pytest.mark.parametrize(("bf16", "tolerance"), [(True, 0.0), (False, 0.02)])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_matrices_move_as_in_torch_s_muon(
    shape: tuple[int, int], bf16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch iterates in bfloat16 on every device."""
    monkeypatch.setattr("common.optimizers.has_bf16_products", lambda device: bf16)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.95}
    optimizers = [
        Muon([ours], **settings),
        torch.optim.Muon(
            [theirs], **settings, ns_coefficients=NEWTON_SCHULZ, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert not torch.equal(ours, start)
    assert torch.allclose(ours, theirs, rtol=0.0, atol=tolerance)


def test_weights_moved_to_other_memory_are_still_trained() -> None:
    """As when a module is prepared for several processes."""
    weight = nn.Parameter(torch.zeros(16, 16))
    muon = Muon([weight], lr=0.1, weight_decay=0.0)
    weight.data = weight.data.clone()
    weight.grad = torch.eye(16)
    muon.step()
    assert weight.norm() > 0.1


def test_scaled_gradients_of_half_precision_are_unscaled_and_overflows_skipped() -> None:
    """Every optimiser that GradScaler steps must show it its gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = nn.Parameter(torch.zeros(16, 16))
    muon = Muon([weight], lr=0.1, weight_decay=0.0)
    scaler.scale(weight.diagonal().sum()).backward()
    scaler.unscale_(muon)
    assert torch.equal(weight.grad, torch.eye(16))
    scaler.step(muon)
    scaler.update()
    moved = weight.detach().clone()
    assert moved.norm() > 0.1
    muon.zero_grad()
    scaler.scale(weight.sum() * torch.inf).backward()
    scaler.step(muon)
    assert torch.equal(weight, moved)


def test_every_parameter_has_one_optimiser() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    params = dict(network.named_parameters())
    for name, count in (("adamw", 1), ("muon", 2)):
        optimizers = make_optimizers(params, name, lr=1e-3, beta2=0.99, weight_decay=0.0)
        assert len(optimizers) == count
        assert sorted(key for _, own in optimizers for key in own) == sorted(params)


def run(
    folder: Path,
    memory_format: torch.memory_format,
    power_cut: int | None = None,
    optimizer: OptimizerName = "muon",
) -> Tensor:
    """Fits a small network of two convolutions; returns the weights of the hidden one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1))
    network.to(memory_format=memory_format)

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        if step == power_cut:
            raise OSError("power cut")
        return {"x": torch.randn(4, 3, 6, 6, generator=generator)}

    def loss(batch: Batch, draws: Draws) -> Tensor:
        return (network(batch["x"]) - draws.randn(32, 6, 6)).square().mean()

    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    fit(dict(network.named_parameters()), loss, get_batch, config, folder)
    return network[1].weight.detach()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_a_run_resumes_bit_for_bit(
    optimizer: OptimizerName, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    """The hidden convolution has 4,608 weights: bitsandbytes keeps 8 bits of moments from 4,096."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole = run(tmp_path / "whole", memory_format, None, optimizer)
    with pytest.raises(OSError, match="power cut"):
        run(tmp_path / "halves", memory_format, 4, optimizer)
    assert torch.equal(run(tmp_path / "halves", memory_format, None, optimizer), whole)
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_fp16_updates_are_those_without_loss_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Muon there are two optimisers and one scaler, which also survives a resume."""

    def scaled(*_: object) -> Accelerator:
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=2)
        accelerator.native_amp = True  # as on CUDA
        # The network itself is in float32, where scaling by powers of two is exact.
        accelerator.autocast = contextlib.nullcontext
        accelerator.prepare_model = lambda model, **_: model
        return accelerator

    def weights(name: str) -> dict[str, Tensor]:
        tensors = load_tensors(tmp_path / name / "state.safetensors")[0]
        return {key: value for key, value in tensors.items() if key.startswith("param/")}

    run(tmp_path / "plain", torch.contiguous_format)
    AcceleratorState._reset_state(True)
    monkeypatch.setattr("common.training.make_accelerator", scaled)
    try:
        run(tmp_path / "whole", torch.contiguous_format)
        torch.testing.assert_close(weights("whole"), weights("plain"), rtol=0.0, atol=1e-5)
        with pytest.raises(OSError, match="power cut"):
            run(tmp_path / "halves", torch.contiguous_format, 4)
        run(tmp_path / "halves", torch.contiguous_format)
        assert contents(tmp_path / "halves") == contents(tmp_path / "whole")
        state = load_tensors(tmp_path / "whole" / "state.safetensors")[1]
        assert state["loss_scale"] == 65536.0 * 8  # six steps, doubled after every two
    finally:
        AcceleratorState._reset_state(True)


def test_no_optimiser_steps_if_one_of_them_overflows() -> None:
    """All gradients are clipped together, so the others' are spoilt too."""
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizers = [torch.optim.AdamW([param], lr=0.1) for param in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow, scale in ((math.inf, 2.0), (math.nan, 1.0), (1.0, 1.0)):
        scaler.scale(params[0].sum() * overflow + params[1].sum()).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        step_all(
            [types.SimpleNamespace(optimizer=x, zero_grad=x.zero_grad) for x in optimizers],
            scaler,
            norm,
        )
        assert scaler.get_scale() == scale
        stepped = [not torch.equal(param, torch.ones(2)) for param in params]
        assert stepped == [overflow == 1.0] * 2 and all(p.isfinite().all() for p in params)


def test_8_bit_moments_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        run(tmp_path / "run", torch.contiguous_format, None, "adamw8bit")
    assert not (tmp_path / "run").exists()
