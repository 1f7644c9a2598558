"""Custom Diffusion's matrices: which they are, the closed-form merge, the delta file."""

from pathlib import Path

import pytest
import torch
from tiny_latent import WIDTH, inputs, tiny_model, tiny_unet
from torch import Tensor

from common.checkpoint import save_tensors
from common.errors import InputError
from common.latent.model import LatentCondition
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.custom_diffusion import (
    CustomDiffusionResult,
    apply_weights,
    load_delta,
    merge,
    projections,
    save_delta,
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_projections_are_the_keys_and_values_of_the_text_alone() -> None:
    unet = tiny_unet()
    found = projections(unet)
    blocks = [
        module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"
    ]
    assert len(found) == 2 * len(blocks) and all(
        weight.shape[1] == WIDTH for weight in found.values()
    )
    others = [name for name in dict(unet.named_parameters()) if name not in found]
    assert not any("attn2.to_k" in name or "attn2.to_v" in name for name in others)


def test_the_merge_solves_the_normal_equations() -> None:
    """Of the Lagrangian: [2 R^T R, C^T; C, 0] [W^T; multipliers] = [2 R^T R W0^T; V], one column
    for each output."""
    width, outputs = 8, 5
    base = random(outputs, width, seed=0)
    learned = [(random(outputs, width, seed=i), random(2, width, seed=10 + i)) for i in (1, 2)]
    regular = random(30, width, seed=3)
    merged = merge(
        {"w": base}, [({"w": weight}, features) for weight, features in learned], regular
    )["w"]

    c = torch.cat([features for _, features in learned])
    v = torch.cat([features @ weight.T for weight, features in learned])
    gram = 2.0 * regular.T @ regular
    system = torch.cat(
        [torch.cat([gram, c.T], 1), torch.cat([c, torch.zeros(len(c), len(c), dtype=c.dtype)], 1)]
    )
    solution = torch.linalg.solve(system, torch.cat([gram @ base.T, v]))
    assert torch.allclose(merged, solution[:width].T, atol=1e-9)
    assert torch.allclose(c @ merged.T, v, atol=1e-9)  # every concept has its own keys and values


def test_merging_one_concept_keeps_its_values_and_merging_none_of_a_change_keeps_the_base() -> None:
    base, other = random(5, 8, seed=0), random(5, 8, seed=1)
    features, regular = random(3, 8, seed=2), random(30, 8, seed=3)
    merged = merge({"w": base}, [({"w": other}, features)], regular)["w"]
    assert torch.allclose(features @ merged.T, features @ other.T)
    assert torch.allclose(merge({"w": base}, [({"w": base}, features)], regular)["w"], base)


def test_repeated_features_do_no_harm() -> None:
    base, other, features = random(5, 8, seed=0), random(5, 8, seed=1), random(2, 8, seed=2)
    regular = random(30, 8, seed=3)
    once = merge({"w": base}, [({"w": other}, features)], regular)["w"]
    twice = merge({"w": base}, [({"w": other}, torch.cat([features, features]))], regular)["w"]
    assert torch.allclose(once, twice, atol=1e-9)


def test_other_matrices_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="other matrices"):
        merge(
            {"a": random(2, 2, seed=0)},
            [({"b": random(2, 2, seed=0)}, random(1, 2, seed=1))],
            random(3, 2, seed=2),
        )


def test_a_delta_brings_the_same_picture_back(tmp_path: Path) -> None:
    model = tiny_model()
    x_t, t = inputs()
    cond = LatentCondition(random(2, 77, WIDTH, seed=4).float())
    base = {name: weight.detach().clone() for name, weight in projections(model.unet).items()}
    plain = model.apply_model(x_t, t, cond)
    learned = {
        name: weight + 0.1 * random(*weight.shape, seed=5).float() for name, weight in base.items()
    }
    concept = Concept("<new1>", random(2, WIDTH, seed=6).float())
    save_delta(tmp_path / "delta.safetensors", CustomDiffusionResult(learned, [concept]))

    loaded = load_delta(tmp_path / "delta.safetensors", base)
    assert loaded.concepts[0].token == "<new1>" and torch.equal(
        loaded.concepts[0].vectors, concept.vectors
    )
    apply_weights(model.unet, learned)
    expected = model.apply_model(x_t, t, cond)
    apply_weights(model.unet, loaded.weights)
    assert not torch.equal(expected, plain) and torch.equal(
        model.apply_model(x_t, t, cond), expected
    )


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, name = tmp_path / "delta.safetensors", "a.attn2.to_k.weight"
    save_delta(path, CustomDiffusionResult({name: torch.ones(2, 3)}, []))
    with pytest.raises(
        InputError, match=r"another U-Net: a.attn2.to_k.weight is \[2, 3\] in it, but \[2, 4\] here"
    ):
        load_delta(path, {name: torch.zeros(2, 4)})
    with pytest.raises(InputError, match=r"another U-Net: b is None in it, but \[1\] here"):
        load_delta(path, {name: torch.zeros(2, 3), "b": torch.zeros(1)})
    save_tensors(path, {"other": torch.zeros(1)})
    with pytest.raises(InputError, match="is not a result of Custom Diffusion"):
        load_delta(path, {name: torch.zeros(2, 3)})
