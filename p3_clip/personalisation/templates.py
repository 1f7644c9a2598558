"""Prompt templates for personalisation; {} stands for the concept."""

OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
"""Textual inversion's templates for objects, a subset of CLIP's templates for ImageNet (Gal et al.
2022, arXiv:2208.01618, supplementary)."""

STYLE = tuple(
    f"{what} in the style of {{}}"
    for what in (
        "a painting",
        "a rendering",
        "a cropped painting",
        "the painting",
        "a clean painting",
        "a dirty painting",
        "a dark painting",
        "a picture",
        "a cool painting",
        "a close-up painting",
        "a bright painting",
        "a good painting",
        "a rendition",
        "a nice painting",
        "a small painting",
        "a weird painting",
        "a large painting",
    )
)
"""Textual inversion's templates for styles (Gal et al. 2022, supplementary)."""

SHAPES = ("{}", "a {}", "a photo of a {}")
"""Templates for the small model, whose text encoder was trained on no other sentences
(`common.data.examples.WORDINGS`)."""

HELD_OUT_OBJECT = ("a {} on the beach", "a {} in front of the Eiffel tower")
HELD_OUT_STYLE = ("a lighthouse in the style of {}", "a bowl of fruit in the style of {}")
HELD_OUT_SHAPES = ("red square next to {}", "lime triangle next to {}")
"""Validation prompts, by which checkpoints are compared; no training uses them."""
