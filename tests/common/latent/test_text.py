"""The tokenizer and the text tower that condition diffusion models: open_clip's ids and numbers
from transformers' classes."""

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from clip_tiny import TEXTS

from common.checkpoint import save_tensors
from common.clip.model import Clip
from common.errors import InputError
from common.files import write_json
from common.latent.text_encoder import (
    clip_tokenizer,
    load_text_encoder,
    load_text_tower,
    text_tower,
)

END = 49407


def test_the_text_tower_is_transformers_with_the_same_ids(clip: Clip) -> None:
    tokenizer, tower = clip_tokenizer(32), text_tower(clip.network)
    ids = clip.tokenize(TEXTS)
    other = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert other.shape == ids.shape and tokenizer.model_max_length == 32
    for mine, theirs in zip(ids.tolist(), other.tolist(), strict=True):
        length = mine.index(END) + 1
        assert mine[:length] == theirs[:length]
        assert set(mine[length:]) <= {0} and set(theirs[length:]) <= {END}
    with torch.no_grad():
        pooled = tower(other).pooler_output @ clip.network.text_projection
        assert torch.allclose(pooled, clip.network.encode_text(ids), atol=1e-5)


def test_the_tokenizer_is_that_of_stable_diffusion(offline: None) -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.model_max_length == 77 and len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        END - 1,
        END,
        END,
    )
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_model_folder_gives_its_tokenizer_and_text_tower(clip_world: Path, offline: None) -> None:
    tokenizer, tower = load_text_tower(clip_world / "model")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (3, 32) and not tower.training
    network = open_clip.create_model(f"local-dir:{clip_world / 'model'}").eval()
    with torch.no_grad():
        states = tower(ids).last_hidden_state
        x = network.token_embedding(ids) + network.positional_embedding
        expected = network.ln_final(network.transformer(x, attn_mask=network.attn_mask))
    assert states.shape == (3, 32, 16) and torch.allclose(states, expected, atol=1e-5)


def test_a_folder_without_a_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model folder .*none does not exist"):
        load_text_tower(tmp_path / "none")
    with pytest.raises(
        InputError, match="holds neither open_clip_config.json nor transformers' config.json"
    ):
        load_text_tower(tmp_path)


def test_a_text_encoders_own_folder_gives_the_same(
    clip_world: Path, tmp_path: Path, offline: None
) -> None:
    """As transformers writes it, in half precision, and with the names of transformers 4."""
    tokenizer, tower = load_text_tower(clip_world / "model")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    tower.save_pretrained(tmp_path / "new")
    tower.half().save_pretrained(tmp_path / "half")
    tower.float()
    old = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in tower.state_dict().items()
    }
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    save_tensors(tmp_path / "old" / "model.safetensors", old)
    for name in ("new", "half", "old"):
        again, encoder = load_text_encoder(tmp_path / name)
        assert (
            again.model_max_length == 32 and encoder.dtype == torch.float32 and not encoder.training
        )
        with torch.no_grad():
            assert torch.allclose(
                encoder(ids).last_hidden_state, tower(ids).last_hidden_state, atol=1e-2
            )


def test_a_folder_without_a_text_encoder_is_refused(clip_world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none/config\.json does not exist"):
        load_text_encoder(tmp_path / "none")
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    with pytest.raises(InputError, match=r"config\.json does not describe a CLIPTextModel"):
        load_text_encoder(tmp_path)
    load_text_tower(clip_world / "model")[1].save_pretrained(tmp_path)
    write_json(
        tmp_path / "config.json",
        {"model_type": "clip_text_model", "hidden_size": 10, "num_attention_heads": 3},
    )
    with pytest.raises(InputError, match=r"config\.json does not describe a CLIPTextModel \("):
        load_text_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_text_encoder(tmp_path)
