"""What is to be learned: concepts with their photos, prompts and captions."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

from torch import Tensor

from common.data.concepts import DRAWN, PHOTOS, draw_photo, read_photos
from common.errors import InputError
from p3_clip.personalisation.base_kind import BaseKind
from p3_clip.personalisation.config import CustomDiffusion, TextualInversion


@dataclasses.dataclass(frozen=True)
class ConceptData:
    """A concept that is to be learned."""

    token: str
    word: str
    phrase: str
    """How it stands in a sentence: "{}", "{} dog", "{} circle"."""
    described: str
    """The same in known words: "dog", "maroon circle"."""
    style: bool
    photos: list[Tensor]
    """uint8 [3, H, W] each."""
    captions: list[str]
    """What each photo shows, in words; {} stands for the concept. Mostly the phrase alone."""
    is_thing: bool = True
    """Whether it can stand beside another; a style and a colour of backgrounds cannot."""


def read_concept_data(config: TextualInversion | CustomDiffusion) -> list[ConceptData]:
    """The concepts with their photos. Raises InputError if the lists do not go together or photos
    are missing or unreadable."""
    for phrase in (*config.phrases, *config.held_out):
        if phrase.count("{}") != 1 or {*"{}"} & {*phrase.replace("{}", "")}:
            raise InputError(f"{phrase!r} must hold {{}} once, which stands for the concept")
    if config.views < 1:
        raise InputError(f"--views must be at least 1, not {config.views}")
    if config.cut_mix < 0:
        raise InputError(f"--cut-mix must be at least 0, not {config.cut_mix}")
    if isinstance(config, CustomDiffusion) and config.num_class_images < 0:
        raise InputError(f"--num-class-images must be at least 0, not {config.num_class_images}")
    if not config.photos:
        return _drawn_concept_data(config)
    count, tokens = len(config.photos), _tokens(config, len(config.photos))
    usual = "{}" if isinstance(config, TextualInversion) else None
    phrases = config.phrases or tuple(usual or f"{{}} {word}" for word in config.words)
    if not count == len(tokens) == len(config.words) == len(phrases):
        raise InputError(
            "--photos, --words, --tokens and --phrases must name equally many concepts, not"
            f" {count}, {len(config.words)}, {len(tokens)} and {len(phrases)}"
        )
    if strange := [token for token in config.styles if token not in tokens]:
        raise InputError(
            f"--styles names {strange[0]}, which is not among the tokens {', '.join(tokens)}"
        )
    described = [
        phrase.format(word) if config.phrases else word
        for phrase, word in zip(phrases, config.words, strict=True)
    ]
    concept_data = []
    for k, folder in enumerate(config.photos):
        photos = read_photos(folder)
        style, captions = tokens[k] in config.styles, [phrases[k]] * len(photos)
        concept_data.append(
            ConceptData(
                tokens[k],
                config.words[k],
                phrases[k],
                described[k],
                style,
                photos,
                captions,
                not style,
            )
        )
    return concept_data


def _drawn_concept_data(config: TextualInversion | CustomDiffusion) -> list[ConceptData]:
    if config.words or config.phrases or config.styles:
        raise InputError(
            "--words, --phrases and --styles are for --photos: the drawn concepts have their own"
        )
    if strange := [name for name in config.drawn if name not in DRAWN]:
        raise InputError(f"there is no drawn concept {strange[0]!r}, only {', '.join(DRAWN)}")
    tokens = _tokens(config, len(config.drawn))
    if not config.drawn or len(tokens) != len(config.drawn):
        raise InputError(
            f"--drawn and --tokens must name equally many concepts, not {len(config.drawn)} and"
            f" {len(tokens)}"
        )
    concept_data = []
    for token, name in zip(tokens, config.drawn, strict=True):
        drawn, photos = DRAWN[name], [draw_photo(name, index) for index in range(PHOTOS)]
        described = drawn.phrase.format(drawn.word)
        captions = [drawn.caption(index) for index in range(PHOTOS)]
        concept_data.append(
            ConceptData(
                token, drawn.word, drawn.phrase, described, False, photos, captions, drawn.is_thing
            )
        )
    return concept_data


def _tokens(config: TextualInversion | CustomDiffusion, count: int) -> tuple[str, ...]:
    return config.tokens or tuple(f"<new{k + 1}>" for k in range(count))


def sentences(data: ConceptData, kind: BaseKind) -> tuple[str, ...]:
    """The sentences in which a concept is shown."""
    return kind.style_sentences if data.style else kind.object_sentences


def held_out_prompts(
    config: TextualInversion | CustomDiffusion, concept_data: Sequence[ConceptData], kind: BaseKind
) -> list[tuple[int, str]]:
    """(number of a concept, prompt with {}) that no training shows."""

    def usual(data: ConceptData) -> tuple[str, ...]:
        return kind.held_out_style if data.style else kind.held_out_object

    return [
        (k, prompt)
        for k, data in enumerate(concept_data)
        for prompt in config.held_out or usual(data)
    ]


def pairs_to_mix(
    config: TextualInversion | CustomDiffusion, concept_data: Sequence[ConceptData]
) -> list[tuple[ConceptData, ConceptData]]:
    """The pairs of concepts that are shown side by side. Raises InputError if they are asked for
    and there are none."""
    pairs = list(itertools.combinations([data for data in concept_data if data.is_thing], 2))
    if config.cut_mix and not pairs:
        raise InputError("--cut-mix needs two concepts that can stand beside each other")
    return pairs if config.cut_mix else []


def photos_hash(concept_data: Sequence[ConceptData]) -> str:
    """A hash of all photos."""
    return _digest([photo for data in concept_data for photo in data.photos])


def _digest(images: Sequence[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(str(list(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()
