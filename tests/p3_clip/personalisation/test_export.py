"""Learned words and matrices go out in each form and come back."""

from pathlib import Path

import pytest
import torch
from tiny_base import tiny_base

from common.errors import InputError
from common.latent.small import load_model, save_model
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.custom_diffusion import (
    CustomDiffusionResult,
    projections,
    save_delta,
)
from p3_clip.personalisation.export import Config, main
from p3_clip.personalisation.formats import save_concepts
from p3_clip.personalisation.model import load_learned


def test_what_goes_out_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "base", tiny_base(), zero_terminal=True)
    model = load_model(tmp_path / "base")
    width = model.text_encoder.config.hidden_size
    word = Concept("<dog>", torch.randn(1, width))
    weights = {name: value.detach() + 1 for name, value in projections(model.unet).items()}
    save_concepts(tmp_path / "word.safetensors", [word])
    save_delta(tmp_path / "both.safetensors", CustomDiffusionResult(weights, [word]))

    def export(source: str, form: str, name: str) -> CustomDiffusionResult:
        path = tmp_path / "out" / name
        main(Config((str(tmp_path / source),), form, path, tmp_path / "base"))
        return load_learned([path], model)

    for form, name in (
        *(("own", "a.safetensors"), ("diffusers", "a.bin"), ("compvis", "a.pt")),
        *(("a1111", "dog.pt"), ("a1111_safetensors", "dog.safetensors")),
    ):
        back = export("word.safetensors", form, name)
        assert [one.token for one in back.concepts] == ["<dog>"] and not back.weights
        assert torch.equal(back.concepts[0].vectors, word.vectors)
    for form, name in (
        *(("own", "b.safetensors"), ("diffusers", "folder"), ("authors", "delta.bin")),
        ("authors_compvis", "delta.ckpt"),
    ):
        back = export("both.safetensors", form, name)
        assert all(torch.equal(back.weights[key], value) for key, value in weights.items())
        token = "<new1>" if form == "authors_compvis" else "<dog>"  # that form names no word
        assert [one.token for one in back.concepts] == [token]
        assert torch.equal(back.concepts[0].vectors, word.vectors)
    assert "<dog> in" in capsys.readouterr().out
    for source, form, what in (
        ("both.safetensors", "a1111", "cannot hold matrices"),
        ("word.safetensors", "authors", "cannot hold words alone"),
    ):
        with pytest.raises(InputError, match=what):
            export(source, form, "no")
    assert not (tmp_path / "out" / "no").exists()
    before = (tmp_path / "out" / "dog.pt").read_bytes()
    with pytest.raises(InputError, match="dog.pt is there already"):
        export("word.safetensors", "own", "dog.pt")
    assert (tmp_path / "out" / "dog.pt").read_bytes() == before
