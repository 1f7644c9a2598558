"""Learned words: placeholder tokens such as <new1>, and a text encoder with their embeddings.

Textual inversion (Gal et al. 2022, arXiv:2208.01618) adds rows to the token-embedding table and
trains only those rows. Here they are separate parameters beside the frozen table, so that weight
decay cannot change any other row.

    concepts = [Concept("<new1>", vectors)]
    encoder, tokenizer = with_concepts(model.text_encoder, model.tokenizer, concepts)
    model.text_encoder, model.tokenizer = encoder, tokenizer
    model.encode_text([expand("a <new1> circle", concepts)])
"""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import check_finite, is_plain_float
from common.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

ONE_WORD = re.compile(r"<[^<>\s]+>")


@dataclasses.dataclass(frozen=True)
class Concept:
    """A placeholder token and its learned embedding vectors."""

    token: str
    """The placeholder in prompts, for example <new1>."""
    vectors: Tensor
    """float32 [k, D]: one or more rows for the token-embedding table."""

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or not len(self.vectors):
            raise InputError(
                f"the vectors of {self.token} have the shape {list(self.vectors.shape)}, not [k, D]"
            )
        if not is_plain_float(self.vectors):
            raise InputError(f"the vectors of {self.token} are {self.vectors.dtype}, not floats")
        check_finite(self.vectors, f"the learned word {self.token}")

    @property
    def words(self) -> list[str]:
        """The tokenizer's words for the placeholder, one per vector: <new1>, <new1>/2, <new1>/3."""
        return [self.token, *(f"{self.token}/{i}" for i in range(2, len(self.vectors) + 1))]


class ConceptEmbedding(nn.Module):
    """A frozen token-embedding table [V, D], extended by trainable rows for concepts."""

    def __init__(self, table: nn.Embedding, concepts: Sequence[Concept]) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.tokens = [concept.token for concept in concepts]
        # A list, since a ParameterDict takes no names with a full stop.
        self.vectors = nn.ParameterList(concept.vectors.clone() for concept in concepts)

    @property
    def rows(self) -> dict[str, nn.Parameter]:
        """The trainable rows [k, D] of each placeholder, in the order of the tokenizer's words."""
        return dict(zip(self.tokens, self.vectors, strict=True))

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [N, L, D] of token ids [N, L]; ids from V on are the concepts' words."""
        known = self.table.num_embeddings
        rows = torch.cat(list(self.vectors))
        learned = F.embedding((ids - known).clamp(min=0), rows).to(self.table.weight.dtype)
        return torch.where((ids >= known)[..., None], learned, self.table(ids.clamp(max=known - 1)))

    def concepts(self) -> list[Concept]:
        """Returns the concepts with copies of their current vectors, float32 on the CPU."""
        return [
            Concept(token, rows.detach().float().cpu().clone()) for token, rows in self.rows.items()
        ]


def with_concepts(
    text_encoder: "CLIPTextModel", tokenizer: "CLIPTokenizer", concepts: Sequence[Concept]
) -> tuple["CLIPTextModel", "CLIPTokenizer"]:
    """Returns a text encoder and a tokenizer that know the concepts; the given ones are unchanged.

    The new encoder shares all weights with the given one, and its token embedding is a
    `ConceptEmbedding`. Raises InputError if a placeholder is already a word of the tokenizer,
    occurs twice, or has vectors of another width.
    """
    from transformers import AddedToken

    check_tokens([concept.token for concept in concepts], tokenizer)
    width = text_encoder.config.hidden_size
    for concept in concepts:
        if concept.vectors.shape[1] != width:
            raise InputError(
                f"the vectors of {concept.token} are {concept.vectors.shape[1]} wide, but this text"
                f" encoder's are {width}: they were learned for another model"
            )
    tokenizer = copy.deepcopy(tokenizer)
    # Normalising would turn them to lower case, which makes <New1> and <new1> the same word.
    words = [word for concept in concepts for word in concept.words]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    table = text_encoder.get_input_embeddings()
    shared = {id(parameter): parameter for parameter in text_encoder.parameters()}
    text_encoder = copy.deepcopy(text_encoder, shared)
    text_encoder.set_input_embeddings(ConceptEmbedding(table, concepts).to(table.weight.device))
    return text_encoder, tokenizer


def check_tokens(tokens: Sequence[str], tokenizer: "CLIPTokenizer") -> None:
    """Raises InputError if a placeholder is already a word, is not <name>, or occurs twice."""
    vocabulary = tokenizer.get_vocab()
    for i, token in enumerate(tokens):
        if token in vocabulary or f"{token}</w>" in vocabulary:
            raise InputError(
                f"{token!r} is a word that the model already knows: choose another placeholder,"
                " such as <new1>"
            )
        if not is_placeholder(token):
            raise InputError(f"the placeholder {token!r} must have the form <name>, such as <new1>")
        if token in tokens[:i]:
            raise InputError(f"the placeholder {token} occurs twice")


def is_placeholder(token: str) -> bool:
    """Whether the token has the form <name>; the name may hold spaces, full stops and brackets."""
    return bool(re.fullmatch(r"<.*[^<>\s].*>", token)) and token.isprintable()


def expand(prompt: str, concepts: Sequence[Concept]) -> str:
    """Returns the prompt with each placeholder replaced by the words of its concept.

    Raises InputError if a placeholder of one word is not among the concepts. (What is in angle
    brackets with a space in it is a placeholder only if a concept has that name.)
    """
    by_token = {concept.token: concept for concept in concepts}
    tokens = sorted(by_token, key=len, reverse=True)  # of two that fit, the longer one is meant
    pattern = "|".join([*map(re.escape, tokens), ONE_WORD.pattern])

    def words(found: re.Match[str]) -> str:
        if found[0] not in by_token:
            known = ", ".join(by_token) or "none"
            raise InputError(
                f"the prompt {prompt!r} holds {found[0]}, which is not loaded (loaded: {known})"
            )
        return " ".join(by_token[found[0]].words)

    return re.sub(pattern, words, prompt)


def without(prompt: str, concepts: Sequence[Concept]) -> str:
    """Returns the prompt without the placeholders of the concepts."""
    for concept in sorted(concepts, key=lambda concept: len(concept.token), reverse=True):
        prompt = prompt.replace(concept.token, "")
    return " ".join(prompt.split())


def unused(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Returns the placeholders of the concepts that occur in no prompt."""
    tokens = [concept.token for concept in concepts]
    return [token for token in tokens if not any(token in prompt for prompt in prompts)]


def initial_vectors(
    word: str, count: int, text_encoder: "CLIPTextModel", tokenizer: "CLIPTokenizer"
) -> Tensor:
    """Returns initial vectors for a concept, float32 [count, D]: the embeddings of a word's tokens.

    If the word has fewer than `count` tokens, the last one is repeated; if it has more, the first
    `count` are used. Raises InputError if the word is empty or `count` is below 1.
    """
    if count < 1:
        raise InputError(f"a concept needs at least one vector, not {count}")
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise InputError(f"the word {word!r} to start from is empty")
    ids = (ids + [ids[-1]] * count)[:count]
    return text_encoder.get_input_embeddings().weight.detach()[ids].float().cpu().clone()


def norms(concepts: Sequence[Concept], vocabulary: Tensor) -> Mapping[str, float]:
    """Returns the relative norm of each concept: 1 is that of a typical word.

    It is the mean norm of the concept's vectors divided by the median norm of the embeddings
    `vocabulary` [V, D].
    """
    typical = vocabulary.float().norm(dim=1).median()
    return {
        concept.token: (concept.vectors.norm(dim=1).mean() / typical).item() for concept in concepts
    }
