"""The concepts to learn, with their photos, captions and prompts."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

from torch import Tensor

from common.data.concepts import DRAWN, draw_photo, read_photos
from common.errors import InputError
from p3_clip.personalisation.base_kind import BaseKind
from p3_clip.personalisation.config import CustomDiffusion, TextualInversion


@dataclasses.dataclass(frozen=True)
class ConceptData:
    """A concept to learn."""

    token: str
    """Placeholder in prompts, for example <new1>."""
    word: str
    """A known word of similar meaning, for example "dog"."""
    phrase: str
    """Noun phrase in prompts, where {} stands for the token: "{}", "{} dog", "{} circle"."""
    described: str
    """The phrase in known words: "dog", "maroon circle"."""
    style: bool
    """Whether it is a style, which has prompts of its own."""
    photos: list[Tensor]
    """Training photos, uint8 [3, H, W] each."""
    phrases: list[str]
    """The phrase of each photo, where its colour may be named: "{}", "gold {}"."""
    captions: list[tuple[str, ...]]
    """Captions of each photo, where {} stands for the token; mostly the phrase alone."""
    is_thing: bool = True
    """Whether it can stand beside another object; a style and a background colour cannot."""


def read_concept_data(config: TextualInversion | CustomDiffusion) -> list[ConceptData]:
    """Reads the concepts that `config` names, with their photos.

    Raises InputError if settings are out of range or do not fit together, or if photos are missing
    or unreadable.
    """
    for phrase in (*config.phrases, *config.held_out):
        if phrase.count("{}") != 1 or {*"{}"} & {*phrase.replace("{}", "")}:
            raise InputError(
                f"{phrase!r}, of --phrases or --held-out, must contain {{}} exactly once, in the"
                " place of the concept, and no other braces"
            )
    if not config.photos:
        return _drawn_concept_data(config)
    count, tokens = len(config.photos), _tokens(config, len(config.photos))
    default_phrase = "{}" if isinstance(config, TextualInversion) else None
    phrases = config.phrases or tuple(default_phrase or f"{{}} {word}" for word in config.words)
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
        style = tokens[k] in config.styles
        concept_data.append(
            ConceptData(
                tokens[k],
                config.words[k],
                phrases[k],
                described[k],
                style,
                photos,
                [phrases[k]] * len(photos),
                [(phrases[k],)] * len(photos),
                not style,
            )
        )
    return concept_data


def _drawn_concept_data(config: TextualInversion | CustomDiffusion) -> list[ConceptData]:
    """Draws the photos of the concepts that --drawn names. Raises InputError on unfit settings."""
    if config.words or config.phrases or config.styles:
        raise InputError(
            "--words, --phrases and --styles need --photos: the drawn concepts have their own"
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
        drawn, count = DRAWN[name], range(config.drawn_photos)
        phrases = [drawn.phrase_in(index) for index in count]
        captions = [drawn.captions(index) for index in count]
        concept_data.append(
            ConceptData(
                token,
                drawn.word,
                drawn.phrase,
                drawn.phrase.format(drawn.word),
                False,
                [draw_photo(name, index) for index in count],
                phrases,
                captions,
                drawn.is_thing,
            )
        )
    return concept_data


def _tokens(config: TextualInversion | CustomDiffusion, count: int) -> tuple[str, ...]:
    return config.tokens or tuple(f"<new{k + 1}>" for k in range(count))


def sentences(data: ConceptData, kind: BaseKind) -> tuple[str, ...]:
    """Returns the training prompts of a concept, with {} in its place."""
    return kind.style_sentences if data.style else kind.object_sentences


def held_out_prompts(
    config: TextualInversion | CustomDiffusion, concept_data: Sequence[ConceptData], kind: BaseKind
) -> list[tuple[int, str]]:
    """Returns (index of the concept, prompt with {}) for each validation prompt of each concept."""

    def default_prompts(data: ConceptData) -> tuple[str, ...]:
        return kind.held_out_style if data.style else kind.held_out_object

    return [
        (k, prompt)
        for k, data in enumerate(concept_data)
        for prompt in config.held_out or default_prompts(data)
    ]


def check_objects(
    config: TextualInversion | CustomDiffusion, concept_data: Sequence[ConceptData]
) -> None:
    """Raises InputError if a flag needs objects in the photos and no concept is one."""
    things = sum(data.is_thing for data in concept_data)
    if config.cut_mix and things < 2:
        raise InputError("--cut-mix needs two concepts that can stand beside each other")
    if config.collage and not things:
        raise InputError("--collage needs a concept that can stand beside another object")
    if config.object_weight != 1.0 and not things:
        raise InputError("--object-weight needs a concept that can stand beside another object")
    if config.attention_weight and all(data.style for data in concept_data):
        raise InputError("--attention-weight needs a concept that is not a style")


def pairs_to_mix(
    config: TextualInversion | CustomDiffusion, concept_data: Sequence[ConceptData]
) -> list[tuple[int, int]]:
    """Returns the indices of the pairs of concepts to show side by side; none if --cut-mix is 0."""
    things = [k for k, data in enumerate(concept_data) if data.is_thing]
    return list(itertools.combinations(things, 2)) if config.cut_mix else []


def photos_hash(concept_data: Sequence[ConceptData]) -> str:
    """Returns a hash of all photos, 32 hexadecimal digits."""
    return images_hash([photo for data in concept_data for photo in data.photos])


def images_hash(images: Sequence[Tensor]) -> str:
    """BLAKE2b hash of the shapes and values of images."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(str(list(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()
