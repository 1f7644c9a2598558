"""The table of sentences with drawn concepts: what is offered to users is in it, so is measured."""

import re
from pathlib import Path

from common.data.concepts import DRAWN
from common.data.examples import VOCABULARY
from common.files import ROOT
from p3_clip.personalisation.sentences import (
    ALONE,
    BESIDE_SQUARE,
    EXAMPLES,
    HARDER,
    OFFERED,
    PAIRS,
    SENTENCES,
    SINGLES,
    TOKENS,
)
from p3_clip.personalisation.templates import HELD_OUT_SHAPES
from scripts.make_concepts import tasks

DOCUMENTS = ("checkpoints/concepts_shapes/README.md", "README.md", "docs/p3_clip.md")


def quoted_sentences(path: Path) -> set[str]:
    """The quoted texts with a placeholder and at least one more word."""
    found = re.findall(r'"([^"\n]*<new\d>[^"\n]*)"', path.read_text().replace("`", ""))
    return {text for text in found if " " in text.strip()}


def test_every_sentence_offered_is_measured() -> None:
    measured = {sentence.prompt(TOKENS) for sentence in SENTENCES.values()}
    offered = {prompt for task in tasks().values() for prompt in task["prompt"]} | {*EXAMPLES}
    for document in DOCUMENTS:
        offered |= quoted_sentences(ROOT / document)
    assert "a <new4>" in offered and offered <= measured


def test_the_tables_are_apart_and_say_what_their_sentences_say() -> None:
    assert len(SENTENCES) == sum(map(len, (SINGLES, OFFERED, PAIRS, HARDER)))
    assert len({sentence.text for sentence in SENTENCES.values()}) == len(SENTENCES)
    known = {word for name in VOCABULARY for word in name.split()}
    for sentence in SENTENCES.values():
        assert {*sentence.names} <= DRAWN.keys() and sentence.names
        assert {*sentence.in_known_words.split()} <= known
        assert len(sentence.objects) == 1 + sentence.text.count("next to")
        assert (sentence.background is not None) == ("background" in sentence.text)
    for name, drawn in DRAWN.items():
        phrase = drawn.phrase.replace("{}", f"{{{name}}}")
        assert ALONE[name].text == f"a {phrase}"
        assert BESIDE_SQUARE[name].text == HELD_OUT_SHAPES[0].format(phrase)
