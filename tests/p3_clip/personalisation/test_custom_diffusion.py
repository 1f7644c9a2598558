"""Custom Diffusion's matrices: which they are, the closed-form merge, the delta file."""

from pathlib import Path

import pytest
import torch
from tiny_latent import WIDTH, inputs, tiny_model, tiny_unet
from torch import Tensor

from common.errors import InputError
from common.latent.model import LatentCondition, LatentDiffusion
from p3_clip.personalisation.base_kind import STABLE_DIFFUSION
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.custom_diffusion import (
    CustomDiffusionResult,
    Form,
    apply_weights,
    keep_start,
    load_delta,
    merge,
    projections,
    save_delta,
)
from p3_clip.personalisation.formats import read_file
from p3_clip.personalisation.model import load_learned


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


def test_the_start_token_passes_no_gradient_to_the_matrices() -> None:
    """A text of the start token alone teaches them nothing; what they compute is unchanged."""
    (x_t, t), text = inputs(), random(2, 77, WIDTH, seed=0).float()
    outputs, gradients = [], []
    for kept, length in ((False, 77), (True, 77), (True, 1)):
        unet = tiny_unet().requires_grad_(False)
        matrices = projections(unet)
        for weight in matrices.values():
            weight.requires_grad_(True)
        if kept:
            keep_start(unet)
        outputs.append(unet(x_t, t, text[:, :length]).sample)
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in matrices.values()]))
    assert torch.equal(outputs[0], outputs[1])
    assert gradients[1].any() and not torch.equal(gradients[0], gradients[1])
    assert not gradients[2].any()


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

    file = tmp_path / "delta.safetensors"
    loaded = load_delta(file, read_file(file), model.unet)
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
    unet, path = tiny_unet(), tmp_path / "delta.safetensors"
    base = {name: weight.detach() for name, weight in projections(unet).items()}
    name = next(iter(base))
    wide = {name: torch.ones(2, 3), "other.attn2.to_k.weight": torch.ones(1)}
    changes: list[tuple[dict[str, Tensor], str]] = [
        ({name: wide[name]}, rf"another U-Net: {name} is \[2, 3\] in it, but \[\d+, \d+\] here"),
        (wide, r"holds unet/other\.attn2\.to_k\.weight, but only the key and value matrices"),
        ({name: base[name] * torch.nan}, "is not finite"),
        ({name: base[name].to(torch.int8)}, "is torch.int8, not floats"),
        ({name: base[name].to(torch.complex64)}, "is torch.complex64, not floats"),
    ]
    for change, reason in changes:
        save_delta(path, CustomDiffusionResult({**base, **change}, []))
        with pytest.raises(InputError, match=reason):
            load_delta(path, read_file(path), unet)
    del base[name]
    save_delta(path, CustomDiffusionResult(base, []))
    with pytest.raises(InputError, match=rf"another U-Net: {name} is None in it"):
        load_delta(path, read_file(path), unet)


# ----------------------------------------------------------------------------
# The forms of others.


def learned_on(model: LatentDiffusion) -> CustomDiffusionResult:
    weights = {
        name: weight.detach() + 0.1 * random(*weight.shape, seed=5).float()
        for name, weight in projections(model.unet).items()
    }
    words = [Concept(f"<new{k}>", random(1, WIDTH, seed=k).float()) for k in (1, 2)]
    return CustomDiffusionResult(weights, words)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("own", "model.safetensors"),
        ("diffusers", "folder"),
        ("authors", "delta.bin"),
        ("authors_compvis", "delta.ckpt"),
    ],
)
def test_each_form_comes_back_by_its_file_or_its_folder(
    tmp_path: Path, form: Form, name: str
) -> None:
    model = tiny_model()
    learned, path = learned_on(model), tmp_path / "result" / name
    path.parent.mkdir()
    save_delta(path, learned, form, model.unet)
    for place in (path,) if form == "diffusers" else (path, path.parent):
        loaded = load_learned([place], model)
        assert loaded.weights.keys() == learned.weights.keys()
        assert all(torch.equal(loaded.weights[k], v) for k, v in learned.weights.items())
        assert [concept.token for concept in loaded.concepts] == ["<new1>", "<new2>"]
        assert all(
            torch.equal(ours.vectors, theirs.vectors)
            for ours, theirs in zip(learned.concepts, loaded.concepts, strict=True)
        )


def test_the_names_of_the_forms_are_those_of_the_other_programs(tmp_path: Path) -> None:
    model = tiny_model()
    learned = learned_on(model)
    own = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_delta(tmp_path / "d", learned, "diffusers", model.unet)
    matrices = read_file(tmp_path / "d" / "pytorch_custom_diffusion_weights.bin")
    theirs = own.replace("to_k", "processor.to_k_custom_diffusion")
    assert torch.equal(matrices[theirs], learned.weights[own])
    # One entry for each processor; diffusers refuses the file otherwise.
    found = {name.split(".processor")[0] + ".processor" for name in matrices}
    assert found == set(model.unet.attn_processors)
    assert read_file(tmp_path / "d" / "<new1>.bin").keys() == {"<new1>"}
    save_delta(tmp_path / "delta.bin", learned, "authors")
    content = read_file(tmp_path / "delta.bin")
    assert content.keys() == {"unet", "modifier_token"}
    assert content["modifier_token"]["<new2>"].shape == (WIDTH,)
    save_delta(tmp_path / "delta.ckpt", learned, "authors_compvis", model.unet)
    state = read_file(tmp_path / "delta.ckpt")["state_dict"]
    theirs = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(state[theirs], learned.weights[own])
    assert state["embed"].shape == (2, WIDTH)


def test_other_variants_of_the_authors_files_are_read(tmp_path: Path) -> None:
    model = tiny_model()
    weights, words = learned_on(model)
    named = {word.token: word.vectors[0] for word in words}
    prefixed = {f"model.diffusion_model.{name}": value for name, value in weights.items()}
    rows = torch.stack(list(named.values()))
    contents = [
        {"state_dict": {**prefixed, "embed": named}},
        {"state_dict": {**prefixed, "embed": rows}, "modifier_token": "<new1>+<new2>"},
        {"state_dict": {**prefixed, "embed": rows}, "modifier_token": ["<new1>", "<new2>"]},
        {"state_dict": prefixed, "modifier_token": named},
    ]
    for content in contents:
        torch.save(content, tmp_path / "delta.ckpt")
        loaded = load_learned([tmp_path / "delta.ckpt"], model)
        assert all(torch.equal(loaded.weights[k], v) for k, v in weights.items())
        assert [concept.token for concept in loaded.concepts] == list(named)
    for content, reason in (
        ({"unet": weights, "text_encoder": {}}, "holds text_encoder besides"),
        ({"state_dict": {**prefixed, "embed": rows}, "modifier_token": "<new1>"}, "for 1 words"),
        ({"unet": {**weights, "a.attn2.to_q.weight": rows}}, "only the key and value matrices"),
    ):
        torch.save(content, tmp_path / "delta.ckpt")
        with pytest.raises(InputError, match=reason):
            load_learned([tmp_path / "delta.ckpt"], model)


def test_matrices_beside_a_word_are_not_left_out_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    save_delta(tmp_path / "d", learned_on(model), "diffusers", model.unet)
    loaded = load_learned([tmp_path / "d" / "<new1>.bin"], model)
    assert not loaded.weights and len(loaded.concepts) == 1
    assert "not the matrices in" in capsys.readouterr().err


def test_captions_of_a_merge_are_of_all_kinds_of_things() -> None:
    captions = STABLE_DIFFUSION.merge_captions(200, 0)
    assert len(set(captions)) == 200 and captions == STABLE_DIFFUSION.merge_captions(200, 0)
    assert captions != STABLE_DIFFUSION.merge_captions(200, 1)
    assert len({caption.split()[-1] for caption in captions}) > 150
    assert len(STABLE_DIFFUSION.merge_captions(1200, 0)) == 1200
