"""Both forms that libraries gave to one thing are read; tests of formats read whole files of
both."""

import json
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from common.versions import (
    new_text_model,
    read_vocabulary,
    text_prefix,
    without_positions,
)
from common.weights import has_old_attention, old_attention_names


def test_names_of_a_text_model_with_and_without_prefix() -> None:
    assert text_prefix(["final_layer_norm.bias"]) == ""
    assert text_prefix(["text_model.final_layer_norm.bias"]) == "text_model."
    assert text_prefix(["x.text_model.final_layer_norm.bias"], before="x.") == "text_model."
    state = {
        "embeddings.position_ids": torch.arange(3),
        "embeddings.position_embedding.weight": torch.ones(3, 2),
    }
    assert list(without_positions(state)) == ["embeddings.position_embedding.weight"]


def test_names_of_an_autoencoders_attention() -> None:
    names = [
        f"mid_block.attentions.0.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    table = old_attention_names([*names, "conv_in.bias"])
    assert [table[name].split(".")[3] for name in names] == ["query", "key", "value", "proj_attn"]
    assert table["conv_in.bias"] == "conv_in.bias"
    assert has_old_attention(table.values()) and not has_old_attention(names)


def test_a_vocabulary_in_both_forms(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds no tokenizer: neither vocab\.json nor tokenizer\.json"
    ):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    assert read_vocabulary(tmp_path) == {"a": 0}
    (tmp_path / "vocab.json").write_text(json.dumps({"b": 1}))
    assert read_vocabulary(tmp_path) == {"b": 1}


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": "wide"}, {"hidden_size": 10, "num_attention_heads": 3}]
)
def test_a_configuration_that_describes_nothing_is_a_value_error(wrong: dict) -> None:
    with pytest.raises(ValueError):
        new_text_model(wrong)
