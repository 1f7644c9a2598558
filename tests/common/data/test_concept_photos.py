"""Photos of concepts: the drawn ones have no name, and real ones are read upright."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import contents, exit_code, refused

from common.colour import CSS_COLOURS, colour_difference
from common.data.concepts import DRAWN, MAUVE, OTHERS, RING_COLOURS, draw_photo, read_photos
from common.errors import InputError
from common.metrics.segmentation import inner_region, median_colour, object_mask
from p3_clip.personalisation.task import read_tasks
from scripts import make_concepts

UNNAMED = 15.0
"""How far, in CIEDE2000, a colour is from every CSS colour if it counts as having no name."""


def distance_to_names(colour: tuple[int, int, int]) -> float:
    """CIEDE2000 from a colour to the nearest CSS colour."""
    return float(
        colour_difference(np.array(colour)[None], np.array(list(CSS_COLOURS.values()))).min()
    )


@pytest.mark.parametrize("name", [name for name, concept in DRAWN.items() if concept.colour])
def test_the_colours_have_no_name(name: str) -> None:
    assert distance_to_names(DRAWN[name].colour) >= UNNAMED


def test_the_distance_is_that_of_the_nearest_name() -> None:
    assert distance_to_names((255, 0, 1)) == pytest.approx(
        float(colour_difference((255, 0, 1), (255, 0, 0)))
    )


def test_unnamed_colours_differ_from_each_other() -> None:
    colours = [concept.colour for concept in DRAWN.values() if concept.colour]
    assert (
        min(colour_difference(a, b) for i, a in enumerate(colours) for b in colours[:i]) >= UNNAMED
    )


@pytest.mark.parametrize("name", DRAWN)
def test_a_photo_shows_its_concept(name: str) -> None:
    """The colour is measured where the concept has it; triangles fill half of their box, rings have
    a hole, the others are filled discs."""
    photos = torch.stack([draw_photo(name, index) for index in range(5)])
    assert photos.dtype == torch.uint8 and photos.shape == (5, 3, 128, 128)
    places = set()
    for photo in photos:
        mask = object_mask(photo)
        large = torch.nn.functional.interpolate(photo[None], mask.shape)[0]
        if colour := DRAWN[name].colour:
            region = ~mask if name == "mauve" else mask
            assert colour_difference(median_colour(large, inner_region(region, 128)), colour) < 0.5
        rows, columns = (np.flatnonzero(mask.any(axis).numpy()) for axis in (1, 0))
        box = (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1]))
        filled = mask.sum().item() / ((box[1] - box[0] + 1) * (box[3] - box[2] + 1))
        assert (filled > 0.7) == (name in ("wine", "mauve"))
        centre_row, centre_column = (box[0] + box[1]) // 2, (box[2] + box[3]) // 2
        assert mask[centre_row, centre_column] == (name != "ring")
        places.add(box)
    assert len(places) == 5


def test_captions_name_the_other_colour() -> None:
    """Which differs from photo to photo, and visibly so from each concept's own."""
    assert DRAWN["wine"].caption(0) == "{} circle with white background"
    assert DRAWN["mauve"].caption(11) == "pink circle with {} background"
    assert DRAWN["ring"].caption(2) == "crimson {} with light green background"
    assert DRAWN["ring"].captions(2) == (
        "crimson {} with light green background",
        "{} with light green background",
        "crimson {}",
        "{}",
    )
    assert DRAWN["wine"].captions(0) == ("{} circle with white background", "{} circle")
    for name, drawn in DRAWN.items():
        assert len({drawn.caption(index) for index in range(10)}) == 10
        for other in OTHERS:
            assert not drawn.colour or (
                colour_difference(CSS_COLOURS[other], drawn.colour) >= UNNAMED
            )
        ground = draw_photo(name, 3)[:, 0, 0]
        assert tuple(ground.tolist()) == (MAUVE if name == "mauve" else CSS_COLOURS["sky blue"])


def test_rings_have_several_named_colours() -> None:
    """So that the word is the shape alone: the caption names the colour that the photo shows."""
    ring = DRAWN["ring"]
    assert ring.phrase_in(0) == "gold {}" and DRAWN["wine"].phrase_in(3) == "{} circle"
    shown = set()
    for index in range(10):
        photo, (colour, other) = draw_photo("ring", index), (RING_COLOURS[index], OTHERS[index])
        assert ring.caption(index) == f"{colour} {{}} with {other} background"
        pixels = {tuple(pixel) for pixel in photo.flatten(1).T.tolist()}
        assert {CSS_COLOURS[colour], CSS_COLOURS[other]} <= pixels
        assert colour_difference(CSS_COLOURS[colour], CSS_COLOURS[other]) >= UNNAMED
        shown.add(colour)
    assert len(shown) == 10


def test_photos_depend_on_the_seed_and_their_number_alone() -> None:
    assert torch.equal(draw_photo("ring", 3, seed=1), draw_photo("ring", 3, seed=1))
    assert not torch.equal(draw_photo("ring", 3, seed=1), draw_photo("ring", 3, seed=2))
    assert not torch.equal(draw_photo("ring", 3), draw_photo("ring", 2))


def test_the_script_writes_the_homeworks_layout(tmp_path: Path, capsys) -> None:
    main, config = make_concepts.main, make_concepts.Config
    for folder in ("a", "b"):
        assert (
            exit_code(main, config, "--output-dir", tmp_path / folder, "--count", 2, "--side", 32)
            == 0
        )
    files = contents(tmp_path / "a")
    photos = [f"{name}/{index:02d}.png" for name in DRAWN for index in range(2)]
    assert sorted(files) == sorted([*photos, "input.json"])
    tasks = read_tasks(tmp_path / "a" / "input.json")
    assert [(task.key, task.token) for task in tasks] == [
        (name, f"<new{k + 1}>") for k, name in enumerate(DRAWN)
    ]
    assert tasks[1].prompts == [
        "a circle with <new2> background",
        "red square next to circle with <new2> background",
    ]
    assert tasks[0].texts == ["a maroon circle", "red square next to maroon circle"]
    assert contents(tmp_path / "b") == files
    assert torch.equal(read_photos(tmp_path / "a" / "wine")[1], draw_photo("wine", 1, side=32))
    capsys.readouterr()
    for flags in (["--count", 0], ["--side", 4]):
        assert "must be between" in refused(
            capsys, main, config, "--output-dir", tmp_path / "c", *flags
        )
    assert "--seed must be between" in refused(
        capsys, main, config, "--output-dir", tmp_path / "c", "--seed", -1
    )
    assert not (tmp_path / "c").exists()


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was turned, so what the file has on the left belongs on
    top."""
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    (photo,) = read_photos(tmp_path)
    assert photo.shape == (3, 6, 4)
    assert (photo[:, 0] == 255).all() and (photo[:, 1:] == 0).all()


def test_folders_that_are_no_concepts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no photo"):
        read_photos(tmp_path)
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(
        InputError, match=r"the photo .*a.jpg is not a readable image \(not an image\)"
    ):
        read_photos(tmp_path)
