"""Learned words: the table of embeddings, prompts, and every file format."""

from pathlib import Path

import pytest
import torch
from tiny import Malice
from tiny_base import tiny_base
from tiny_latent import WIDTH, tiny_model
from torch import nn

from common.checkpoint import save_tensors
from common.errors import InputError
from common.latent.model import LatentDiffusion
from p3_clip.personalisation.base_kind import SMALL, STABLE_DIFFUSION
from p3_clip.personalisation.concepts import (
    Concept,
    expand,
    initial_vectors,
    norms,
    unused,
    with_concepts,
)
from p3_clip.personalisation.formats import Form, load_concepts, save_concepts
from p3_clip.personalisation.model import load_learned, usual_words


def concept(token: str = "<new1>", count: int = 1, width: int = WIDTH) -> Concept:
    return Concept(token, torch.randn(count, width, generator=torch.Generator().manual_seed(count)))


def known(*concepts: Concept) -> LatentDiffusion:
    """The tiny model, knowing these concepts."""
    model = tiny_model()
    model.text_encoder, model.tokenizer = with_concepts(
        model.text_encoder, model.tokenizer, concepts
    )
    return model


def test_prompts_without_placeholders_read_as_before() -> None:
    assert torch.equal(known(concept()).encode_text(["ab cd"]), tiny_model().encode_text(["ab cd"]))


def test_a_concept_with_a_words_vector_reads_as_that_word() -> None:
    model = tiny_model()
    ids = model.tokenizer("b", add_special_tokens=False).input_ids
    row = model.text_encoder.get_input_embeddings().weight[ids]
    learned = known(concept("<other>"), Concept("<new1>", row))
    assert torch.equal(learned.encode_text(["a <new1> c"]), model.encode_text(["a b c"]))
    assert not torch.equal(learned.encode_text(["a <other> c"]), model.encode_text(["a b c"]))


def test_capitals_tell_placeholders_apart() -> None:
    model = tiny_model()
    table = model.text_encoder.get_input_embeddings().weight
    b, c = (table[model.tokenizer(letter, add_special_tokens=False).input_ids] for letter in "bc")
    learned = known(Concept("<New>", b), Concept("<new>", c))
    assert torch.equal(learned.encode_text(["A <New> d, <new>."]), model.encode_text(["a b d, c."]))


def test_several_vectors_are_several_words() -> None:
    model = tiny_model()
    table = model.text_encoder.get_input_embeddings().weight
    three = Concept(
        "<new1>",
        torch.stack([table[model.tokenizer.convert_tokens_to_ids(f"{c}</w>")] for c in "bcd"]),
    )
    learned = known(three)
    assert expand("a <new1> e", [three]) == "a <new1> <new1>/2 <new1>/3 e"
    assert torch.equal(
        learned.encode_text([expand("a <new1> e", [three])]), model.encode_text(["a b c d e"])
    )


def test_training_moves_the_rows_and_no_other() -> None:
    """Weight decay included, which would move every row of the table if the rows were a part of
    it."""
    model = known(concept())
    embedding = model.text_encoder.get_input_embeddings()
    before = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
    rows = list(embedding.rows.values())
    for row in rows:
        row.requires_grad_(True)
    optimizer = torch.optim.AdamW(rows, lr=0.1, weight_decay=0.5)
    ids = model.tokenizer(["a <new1> b"], padding="max_length", return_tensors="pt").input_ids
    model.text_encoder(ids).last_hidden_state.square().mean().backward()
    optimizer.step()
    after = model.text_encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 1 and changed.pop().endswith("vectors.0")
    assert len(embedding.concepts()) == 1 and torch.equal(
        embedding.concepts()[0].vectors, rows[0].detach()
    )


def test_the_given_text_encoder_stays_as_it_is() -> None:
    model = tiny_model()
    size, weights = len(model.tokenizer), model.text_encoder.get_input_embeddings()
    encoder, tokenizer = with_concepts(model.text_encoder, model.tokenizer, [concept(count=2)])
    assert len(model.tokenizer) == size and len(tokenizer) == size + 2
    assert model.text_encoder.get_input_embeddings() is weights
    assert encoder.get_input_embeddings().table.weight.data_ptr() == weights.weight.data_ptr()


def test_vectors_to_start_from() -> None:
    model = tiny_model()
    table = model.text_encoder.get_input_embeddings().weight
    b, c = (model.tokenizer.convert_tokens_to_ids(f"{letter}</w>") for letter in "bc")
    start = lambda word, count: initial_vectors(word, count, model.text_encoder, model.tokenizer)  # noqa: E731
    assert torch.equal(start("b c", 2), table[[b, c]]) and torch.equal(
        start("b c", 3), table[[b, c, c]]
    )
    assert torch.equal(start("b c", 1), table[[b]])
    with pytest.raises(InputError, match="is empty"):
        start(" ", 1)
    with pytest.raises(InputError, match="at least one vector, not 0"):
        start("b", 0)


def test_norms_are_relative_to_the_vocabulary() -> None:
    table = torch.eye(8) * 2.0
    assert norms([Concept("<new1>", torch.eye(8)[:2] * 3.0)], table) == {
        "<new1>": pytest.approx(1.5)
    }


def test_the_usual_words_of_a_small_model_are_those_of_its_captions() -> None:
    """Most of CLIP's table was never trained there, and keeps smaller, random values."""
    model = tiny_base()
    words = {tuple(row) for row in usual_words(model, SMALL).tolist()}
    table = model.text_encoder.get_input_embeddings().weight
    for text in ("circle", "maroon", "next", "photo", "background", "golden"):
        assert (
            tuple(table[model.tokenizer(text, add_special_tokens=False).input_ids[0]].tolist())
            in words
        )
    assert 100 < len(words) < 200 and torch.equal(usual_words(model, STABLE_DIFFUSION), table)


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([Concept("ab", torch.zeros(1, WIDTH))], "must have the form <name>"),
        ([Concept("b</w>", torch.zeros(1, WIDTH))], "a word that the model already knows"),
        ([Concept("b", torch.zeros(1, WIDTH))], "a word that the model already knows"),
        ([concept(), concept()], "<new1> occurs twice"),
        ([concept(width=8)], "are 8 wide, but this text encoder's are 16"),
    ],
)
def test_what_cannot_be_a_concept_is_refused(concepts: list[Concept], message: str) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=message):
        with_concepts(model.text_encoder, model.tokenizer, concepts)


def test_placeholders_must_be_loaded_and_should_be_used() -> None:
    with pytest.raises(InputError, match=r"holds <new2>, which is not loaded \(loaded: <new1>\)"):
        expand("a <new1> next to a <new2>", [concept()])
    assert unused(["a <new1>"], [concept(), concept("<new2>")]) == ["<new2>"]


# ----------------------------------------------------------------------------
# Files.

SUFFIXES: dict[Form, str] = {
    "own": "safetensors",
    "diffusers": "bin",
    "a1111": "pt",
    "a1111_safetensors": "safetensors",
    "compvis": "pt",
}


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("form", SUFFIXES)
def test_round_trips_are_bit_equal(form: Form, count: int, tmp_path: Path) -> None:
    path, learned = tmp_path / f"file.{SUFFIXES[form]}", concept(count=count)
    save_concepts(path, [learned], form)
    (loaded,) = load_concepts(path, token="<new1>")
    assert loaded.token == "<new1>" and torch.equal(loaded.vectors, learned.vectors)
    assert load_concepts(path, token="<other>")[0].token == "<other>"


@pytest.mark.parametrize("form", ["own", "compvis"])
def test_several_concepts_in_one_file(form: Form, tmp_path: Path) -> None:
    path = tmp_path / f"file.{SUFFIXES[form]}"
    save_concepts(path, [concept(), concept("<new2>", 3)], form)
    loaded = {one.token: one.vectors for one in load_concepts(path)}
    assert loaded.keys() == {"<new1>", "<new2>"} and torch.equal(
        loaded["<new2>"], concept("<new2>", 3).vectors
    )
    with pytest.raises(InputError, match="holds 2 concepts"):
        load_concepts(path, token="<new1>")


def test_a1111_holds_one_and_may_not_name_it(tmp_path: Path) -> None:
    for form in ("a1111", "diffusers"):  # diffusers refuses a file of several
        with pytest.raises(InputError, match="holds one concept, not 2"):
            save_concepts(tmp_path / "a.pt", [concept(), concept("<new2>")], form)
    save_concepts(tmp_path / "a.pt", [concept()], "a1111")
    assert load_concepts(tmp_path / "a.pt")[0].token == "<a>"  # the file's name counts
    save_concepts(tmp_path / "dog.safetensors", [concept()], "a1111_safetensors")
    assert load_concepts(tmp_path / "dog.safetensors")[0].token == "<dog>"  # as A1111 does


def test_diffusers_words_of_one_concept_are_joined(tmp_path: Path) -> None:
    rows = concept(count=3).vectors
    torch.save(
        {"<new1>": rows[0], "<new1>_1": rows[1], "<new1>_2": rows[2]},
        tmp_path / "learned_embeds.bin",
    )
    (loaded,) = load_concepts(tmp_path / "learned_embeds.bin")
    assert loaded.token == "<new1>" and torch.equal(loaded.vectors, rows)


def test_the_vectors_of_a_word_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Files may have them in another: safetensors sorts by name, <new1>_10 before <new1>_2."""
    rows = concept(count=13).vectors
    names = ["<new1>", *(f"<new1>_{number}" for number in range(1, 13))]
    content = dict(zip(names, rows, strict=True))
    save_tensors(tmp_path / "words.safetensors", content)
    torch.save(dict(reversed(content.items())), tmp_path / "words.bin")
    for name in ("words.safetensors", "words.bin"):
        (loaded,) = load_concepts(tmp_path / name)
        assert loaded.token == "<new1>" and torch.equal(loaded.vectors, rows)
    del content["<new1>_4"]
    torch.save(content, tmp_path / "gap.bin")
    with pytest.raises(InputError, match=r"gap\.bin holds <new1>_12 but not <new1>_4"):
        load_concepts(tmp_path / "gap.bin")


def test_files_of_old_pytorch_are_read(tmp_path: Path) -> None:
    """The paper's code ran on PyTorch 1.10, whose ParameterDict has no list of keys of its own."""
    rows = concept(count=2).vectors
    old = nn.ParameterDict()
    del old._keys
    old._parameters["*"] = nn.Parameter(rows)
    torch.save(
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": old},
        tmp_path / "embeddings.pt",
    )
    (loaded,) = load_concepts(tmp_path / "embeddings.pt", token="<new1>")
    assert torch.equal(loaded.vectors, rows) and not loaded.vectors.requires_grad


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"<new1>": torch.zeros(2, 2, 2)},
        {"<new1>": "text"},
        [1],
        {"string_to_param": {}},
        {"string_to_param": 1},
    ],
)
def test_files_without_learned_words_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(InputError, match="holds no learned words"):
        load_concepts(tmp_path / "file.pt")


def test_a_pickle_that_would_run_code_never_runs(tmp_path: Path) -> None:
    torch.save({"<new1>": Malice(tmp_path / "ran")}, tmp_path / "file.bin")
    with pytest.raises(InputError, match="was refused"):
        load_concepts(tmp_path / "file.bin")
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------
# Names and files as people have them.


@pytest.mark.parametrize(
    "token",
    ["<my.dog>", "<The Little Robot-moon >", "<dog (v1.0)>", "<[x]>", "<a<b>>", "<größe>", "<*>"],
)
def test_a_name_may_hold_anything_between_its_brackets(token: str) -> None:
    """It reads as the word whose vectors it has, alone and beside a name that begins alike."""
    model = tiny_model()
    ids = model.tokenizer("b", add_special_tokens=False).input_ids
    row = model.text_encoder.get_input_embeddings().weight[ids]
    concepts = [Concept(f"{token[:-1]}y>", -row), Concept(token, row)]
    learned = known(*concepts)
    prompt = expand(f"a {token} c", concepts)
    assert torch.equal(learned.encode_text([prompt]), model.encode_text(["a b c"]))
    assert unused([f"a {token} c"], concepts) == [concepts[0].token]
    assert list(learned.text_encoder.get_input_embeddings().rows) == [x.token for x in concepts]


def test_brackets_around_several_words_are_no_placeholder_unless_loaded() -> None:
    assert expand("3 < 4 and 5 > 4, a <new1>", [concept()]) == "3 < 4 and 5 > 4, a <new1>"


@pytest.mark.parametrize(
    ("file", "content", "token"),
    [
        ("dog.pt", {"string_to_param": {"*": 1}, "name": "charturner"}, "<dog>"),
        ("Empire Style v1.0.safetensors", {"emb_params": 1}, "<Empire Style v1.0>"),
        ("<new1>.pt", {"string_to_param": {"*": 1}}, "<new1>"),
        ("bare.bin", {"cat-toy": 1}, "<cat-toy>"),
        ("spaces.bin", {"<The Little Robot-moon >": 1}, "<The Little Robot-moon >"),
        ("embeddings_gs-6099.pt", {"string_to_param": {"*": 1}}, "<embeddings_gs-6099>"),
    ],
)
def test_the_name_of_a_word_follows_from_its_file(
    tmp_path: Path, file: str, content: dict[str, object], token: str
) -> None:
    rows = concept().vectors
    inner = content.get("string_to_param")
    if inner:
        content = {**content, "string_to_token": {"*": 265}, "string_to_param": {"*": rows}}
    else:
        content = dict.fromkeys(content, rows)
    if file.endswith(".safetensors"):
        save_tensors(tmp_path / file, content)
    else:
        torch.save(content, tmp_path / file)
    model = tiny_model()
    (loaded,) = load_learned([tmp_path / file], model).concepts
    assert loaded.token == token and torch.equal(loaded.vectors, rows)
    renamed = load_learned([f"{tmp_path / file}=<my dog.1>"], model).concepts
    assert [one.token for one in renamed] == ["<my dog.1>"]


def test_a_folder_of_textual_inversion_is_read(tmp_path: Path) -> None:
    for name in ("learned_embeds", "learned_embeds-steps-500"):
        save_tensors(tmp_path / f"{name}.safetensors", {"<new1>": concept().vectors})
    model = tiny_model()
    assert [one.token for one in load_learned([tmp_path], model).concepts] == ["<new1>"]
    (tmp_path / "learned_embeds.safetensors").unlink()
    with pytest.raises(InputError, match="holds no learned words: neither"):
        load_learned([tmp_path], model)
    save_concepts(tmp_path / "two.safetensors", [concept(), concept("<new2>")])
    with pytest.raises(InputError, match="holds 2 concepts .* only a single one can be renamed"):
        load_learned([f"{tmp_path / 'two.safetensors'}=<x>"], model)


def test_words_of_other_models_and_nonsense_are_refused(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "x.safetensors"
    rows = concept().vectors
    for content, reason in (
        ({"clip_l": rows, "clip_g": 2 * rows}, "Stable Diffusion XL"),
        ({"<new1>": rows * torch.nan}, "the learned word <new1> in .* is not finite"),
        ({"<new1>": rows.to(torch.int8)}, "are torch.int8, not floats"),
        ({"<new1>": rows > 0}, "are torch.bool, not floats"),
        ({"<new1>": rows.to(torch.complex64)}, "are torch.complex64, not floats"),
    ):
        save_tensors(path, content)
        with pytest.raises(InputError, match=reason):
            load_learned([path], model)
