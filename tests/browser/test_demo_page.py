"""The web demo with the shipped weights, as a newcomer meets it: in a browser and by its API."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
import torch
from demo_server import serving
from tiny import Malice
from torch import Tensor
from web_page import PHONE, Visit

from common.data.digits import SIZE
from common.data.layouts import caption, make_layouts, write_layouts
from common.files import ROOT
from common.grid import GAP, MARGIN
from common.images import read_rgb

if TYPE_CHECKING:
    from gradio_client import Client

pytest.importorskip("gradio", reason="gradio is missing: pip install -e '.[demo]'")

TABS = {
    "Digits": "Sample",
    "Faces": "Interpolate",
    "ControlNet": "Draw the picture",
    "CLIP": "Classify",
    "Concepts": "Draw",
}
"""The button of each tab."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a demo with the shipped weights."""
    with serving(tmp_path_factory.mktemp("demo")) as address:
        yield address


# ----------------------------------------------------------------------------
# In a browser.


def open_tab(seen: Visit, name: str) -> None:
    """Shows a tab, once the page is there."""
    seen.page.get_by_role("tab", name=name, exact=True).click()
    button = seen.page.get_by_role("button", name=TABS[name], exact=True)
    button.locator("visible=true").wait_for()


PENDING = """() => [...document.querySelectorAll("[data-testid='status-tracker']")].some(
    tracker => tracker.classList.contains("generating")
        || !tracker.classList.contains("hide") && !tracker.querySelector(".error"))"""
"""JavaScript: whether a component of the page waits for a job."""


def click(seen: Visit, name: str) -> None:
    """Clicks the visible button of this name and waits until the job has an answer."""
    with seen.page.expect_response("**/queue/join*"):
        seen.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()
    seen.page.wait_for_function(f"() => !({PENDING})()")
    seen.page.wait_for_timeout(300)


def pictures(seen: Visit) -> list[str]:
    """The addresses of the visible results."""
    shown = seen.page.locator(
        "[data-testid='detailed-image'] img:visible, .image-frame img:visible"
    )
    return [image.get_attribute("src") or "" for image in shown.all()]


def refused(seen: Visit) -> str:
    """The sentence with which the page refuses an input."""
    seen.page.wait_for_function("() => window.toasts.length")
    return seen.page.evaluate("() => window.toasts.splice(0).at(-1)")


def set_number(seen: Visit, label: str, value: int) -> None:
    """Types into a slider's number, again where a page that is still built puts its own back."""
    number = seen.page.get_by_label(f"number input for {label}")
    for _ in range(10):
        number.fill(str(value))
        number.press("Tab")
        seen.page.wait_for_timeout(500)
        if number.input_value() == str(value):
            return
    raise AssertionError(f"{label} stays {number.input_value()}, not {value}")


def check_quiet(seen: Visit) -> None:
    """No error in the console, and no request to another computer."""
    assert seen.errors == []
    assert seen.left_the_loopback() == []


def test_digits_grow_and_can_be_looked_back_at(demo: str, visit: Callable[..., Visit]) -> None:
    seen = visit(demo)
    open_tab(seen, "Digits")
    seen.page.locator("img:visible").first.wait_for()
    (before,) = pictures(seen)
    seen.page.get_by_label("svhn").check()
    click(seen, "Sample")
    (after,) = pictures(seen)
    assert after != before
    seen.screenshot("digits")
    set_number(seen, "Look back: steps done", 10)
    seen.page.wait_for_function(
        "before => !document.querySelector(`img[src='${before}']`)", arg=after
    )
    seen.screenshot("digits_after_ten_steps")
    seen.page.get_by_text("Sampler and guidance interval").click()
    set_number(seen, "Lowest t with guidance", 900)
    click(seen, "Sample")
    assert "Guidance interval must give the lowest t and then the highest" in refused(seen)
    check_quiet(seen)


def test_faces_and_a_file_that_would_run_code(
    demo: str, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    seen = visit(demo)
    open_tab(seen, "Faces")
    click(seen, "Sample the first")
    click(seen, "Interpolate")
    assert len(pictures(seen)) == 2
    seen.screenshot("faces")
    torch.save(Malice(tmp_path / "trace"), tmp_path / "evil.pt")
    seen.page.get_by_text("Noises of your own").click()
    with seen.page.expect_response("**/upload*"):
        seen.page.locator("input[type=file]:visible, input[type=file]").first.set_input_files(
            tmp_path / "evil.pt"
        )
    seen.page.get_by_text("evil", exact=False).first.wait_for()
    click(seen, "Sample the first")
    assert "evil.pt was refused: it holds something other than plain tensors" in refused(seen)
    assert not (tmp_path / "trace").exists()
    check_quiet(seen)


def test_circles_are_drawn_with_the_mouse(demo: str, visit: Callable[..., Visit]) -> None:
    seen = visit(demo)
    open_tab(seen, "ControlNet")
    page = seen.page
    page.locator("#drawing canvas").first.wait_for()
    page.wait_for_timeout(1000)
    page.locator("#drawing").get_by_label("Clear canvas").click()
    page.wait_for_timeout(5000)
    click(seen, "Draw the picture")
    assert "draw a" in refused(seen)
    page.locator("#drawing").get_by_label("Brush", exact=True).click()
    box = page.locator("#drawing canvas").first.bounding_box()
    x, y, radius = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, 90
    page.mouse.move(x + radius, y)
    page.mouse.down()
    for k in range(1, 50):
        wobble = radius * (1 + 0.05 * math.sin(k / 3))
        page.mouse.move(x + wobble * math.cos(k / 7.8), y + wobble * math.sin(k / 7.8))
    page.mouse.up()
    page.locator("#controlnet_prompt textarea").fill("red circle with light blue background")
    click(seen, "Draw the picture")
    assert len(pictures(seen)) == 2
    for measure in ("IoU with the circles", "red circle: CIEDE2000"):
        page.get_by_text(measure).locator("visible=true").first.wait_for()
    seen.screenshot("controlnet")
    check_quiet(seen)


def test_clip_names_a_picture(demo: str, visit: Callable[..., Visit]) -> None:
    seen = visit(demo)
    open_tab(seen, "CLIP")
    click(seen, "Classify")
    first = seen.page.locator("#clip_names textarea").input_value().split("\n")[0]
    assert first in seen.page.locator("[data-testid='label-output-value']").inner_text()
    seen.screenshot("clip")
    seen.page.get_by_label("Template", exact=False).fill("a photo")
    click(seen, "Classify")
    assert "The template must contain {} exactly once" in refused(seen)
    check_quiet(seen)


def test_concepts_are_drawn_beside_untrained_words(demo: str, visit: Callable[..., Visit]) -> None:
    seen = visit(demo)
    open_tab(seen, "Concepts")
    click(seen, "Draw")
    assert len(set(pictures(seen))) == 3
    seen.screenshot("concepts")
    seen.page.locator("#concepts_prompt textarea").fill("a <new9> circle")
    click(seen, "Draw")
    assert "holds <new9>, which is not loaded" in refused(seen)
    check_quiet(seen)


def test_every_tab_fits_a_phone(demo: str, visit: Callable[..., Visit]) -> None:
    """Nothing is wider than the window, in light or in dark colours."""
    for scheme in ("light", "dark"):
        seen = visit(demo, PHONE, color_scheme=scheme, has_touch=True)
        open_tab(seen, "Digits")
        for name in TABS:
            tab = seen.page.get_by_role("tab", name=name, exact=True).locator("visible=true")
            if not tab.count():  # behind the button of the tabs that do not fit
                seen.page.locator(".overflow-menu > button").click()
                tab = seen.page.locator(".overflow-dropdown button", has_text=name)
            tab.first.click()
            seen.page.wait_for_timeout(1000)
            seen.screenshot(f"phone_{scheme}_{name}")
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        check_quiet(seen)


# ----------------------------------------------------------------------------
# By the API, which must agree with the programs.


@pytest.fixture(scope="module")
def client(demo: str, tmp_path_factory: pytest.TempPathFactory) -> "Client":
    from gradio_client import Client

    return Client(demo, download_files=tmp_path_factory.mktemp("answers"), verbose=False)


def tile(grid: Tensor, side: int, row: int, column: int) -> Tensor:
    """A picture of a grid without its magnification; rows and columns count from the last, 0."""
    height, width = grid.shape[-2:]
    scale = round((width - 2 * MARGIN) / 10 / SIZE) if side == SIZE else 3
    step = side * scale + GAP
    bottom, right = height - MARGIN - row * step, width - MARGIN - column * step
    return grid[:, bottom - side * scale : bottom : scale, right - side * scale : right : scale]


def close(a: Tensor, b: Tensor) -> bool:
    """Whether pictures agree within one grey level."""
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


def test_digits_are_those_of_the_program(client: "Client", tmp_path: Path) -> None:
    from p1_diffusion.inference import Config, main
    from p1_diffusion.sampling import SamplingConfig

    settings = dict(low=0, high=999, steps=4, sampler="ddim", seed=3)
    path = client.predict("7", "svhn", 2.0, 1.0, *settings.values(), api_name="/digits")
    grid = read_rgb(Path(path))
    sampling = SamplingConfig(
        guidance_scale=2.0, guidance_interval=(0, 999), steps=4, sampler="ddim", seed=3
    )
    main(Config(tmp_path, classes=("svhn/7",), sampling=sampling))
    for number in range(1, 11):
        own = read_rgb(tmp_path / f"svhn/7_{number:03d}.png")
        assert close(tile(grid, SIZE, 3, 10 - number), own)


def test_faces_are_those_of_the_program(client: "Client", tmp_path: Path) -> None:
    from gradio_client import handle_file

    from p2_ddim.inference import Config, main
    from p2_ddim.sampling import SamplingConfig
    from scripts import make_noise

    make_noise.main(make_noise.Config(tmp_path / "noise", count=2))
    main(Config(tmp_path / "noise", tmp_path, sampling=SamplingConfig(steps=5, eta=0.5, seed=7)))
    first, second = (read_rgb(tmp_path / f"{n:02d}.png") for n in range(2))
    side = first.shape[-1]
    path = client.predict(1, None, 0.5, 5, 7, api_name="/face")
    assert close(tile(read_rgb(Path(path)), side, 0, 0), second)
    upload = handle_file(tmp_path / "noise" / "00.pt")
    path = client.predict(5, upload, 0.5, 5, 7, api_name="/face")
    assert close(tile(read_rgb(Path(path)), side, 0, 0), first)
    path = client.predict(0, None, 1, None, 0.3, 0.5, 5, 7, api_name="/interpolate")
    grid = read_rgb(Path(path))
    assert close(tile(grid, side, 0, 3), first) and close(tile(grid, side, 0, 0), second)
    assert not close(tile(grid, side, 0, 2), tile(grid, side, 0, 1))


def test_controlled_pictures_are_those_of_the_program(client: "Client", tmp_path: Path) -> None:
    from gradio_client import handle_file

    from common.latent.generate import ControlledGenerationConfig
    from p3_controlnet.inference import Config, main

    scene = make_layouts("two", 1)[0]
    write_layouts(tmp_path, [scene])
    source = handle_file(tmp_path / "source" / "0.png")
    drawing = {"background": source, "layers": [], "composite": source}
    picture, hint, table = client.predict(
        drawing, caption(scene), 1.0, 0.0, 1.0, 2.0, 4, 5, api_name="/controlnet"
    )
    generation = ControlledGenerationConfig(guidance_scale=2.0, steps=4, seed=5)
    prompts, sources = tmp_path / "prompt.json", tmp_path / "source"
    main(Config(prompts, sources, tmp_path / "out", generation=generation))
    (own,) = (tmp_path / "out").rglob("*.png")
    assert close(read_rgb(Path(picture)), read_rgb(own))
    assert torch.equal(read_rgb(Path(hint)), read_rgb(tmp_path / "source" / "0.png"))
    assert [name.split(":")[0] for name, _ in table["data"]][0].startswith("IoU")
    assert len(table["data"]) == 4


def test_probabilities_are_those_of_the_program(client: "Client", tmp_path: Path) -> None:
    from gradio_client import handle_file

    from common.clip.loading import SHIPPED, ClipConfig
    from p3_clip.inference import Config, Run, main

    names = ["red circle", "green star", "blue square"]
    write_layouts(tmp_path / "drawn", make_layouts("two", 1))
    (tmp_path / "val").mkdir()
    shutil.copy(tmp_path / "drawn" / "target" / "0.png", tmp_path / "val" / "0_0.png")
    (tmp_path / "id2label.json").write_text(json.dumps(dict(enumerate(names))))
    answer = client.predict(
        handle_file(tmp_path / "val" / "0_0.png"), "\n".join(names), "a {}", api_name="/clip"
    )
    main(
        Config(
            tmp_path / "val",
            tmp_path / "id2label.json",
            tmp_path / "out",
            template="a {}",
            use_cache=False,
            clip=ClipConfig(model=str(SHIPPED)),
        )
    )
    run = Run.load(tmp_path / "out")
    found = {entry["label"]: entry["confidence"] for entry in answer["confidences"]}
    own = dict(zip(names, run.probabilities("single")[0].tolist(), strict=True))
    assert found == pytest.approx(own, abs=1e-5)


def test_concepts_are_those_of_the_program(client: "Client", tmp_path: Path) -> None:
    from gradio_client import handle_file

    from common.latent.generate import GenerationConfig
    from p3_clip.personalisation.concepts import Concept
    from p3_clip.personalisation.formats import save_concepts
    from p3_clip.personalisation.inference import Config, main

    prompt = "a <new1> circle with pink background"
    learned, untrained, plain = client.predict(prompt, None, 2.0, 4, 5, api_name="/concepts")
    task = {
        "src_image": "circle",
        "token_name": "<new1>",
        "prompt": [prompt],
        "prompt_4_clip_eval": ["a circle with pink background"],
        "baseline": [[0, 0]],
    }
    (tmp_path / "input.json").write_text(json.dumps({"0": task}))
    generation = GenerationConfig(guidance_scale=2.0, steps=4, seed=5)
    main(Config(tmp_path / "input.json", tmp_path / "out", count=1, generation=generation))
    (own,) = (tmp_path / "out").rglob("*.png")
    assert close(read_rgb(Path(learned)), read_rgb(own))
    config = ROOT / "checkpoints" / "ldm_shapes" / "text_encoder" / "config.json"
    width = json.loads(config.read_text())["hidden_size"]
    save_concepts(tmp_path / "mine.pt", [Concept("<mine>", torch.zeros(1, width))], "diffusers")
    answers = client.predict(
        "a <mine> circle", handle_file(tmp_path / "mine.pt"), 2.0, 4, 5, api_name="/concepts"
    )
    assert len(answers) == 3


def test_bad_settings_are_answered_with_one_sentence(client: "Client") -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="^The seed must be a whole number.$"):
        client.predict(0, None, 0.0, 5, None, api_name="/face")
    with pytest.raises(AppError, match="^There is no picture: upload one"):
        client.predict(None, "a", "{}", api_name="/clip")
    with pytest.raises(AppError, match="^The noise number must be a whole number.$"):
        client.predict(1.5, None, 0.0, 5, 0, api_name="/face")


def test_values_that_a_field_cannot_hold_are_answered_with_one_sentence(
    client: "Client", tmp_path: Path
) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "text.png").write_text("no picture")
    text = handle_file(tmp_path / "text.png")
    digits = ["7", "svhn", 3.0, 1.0, 150, 700, 5, "dpmpp_2m", 0]
    unreadable = "this value or file cannot be read."
    for endpoint, values, said in (
        ("/digits", [*digits[:2], "x", *digits[3:]], f"Guidance scale: {unreadable}"),
        ("/digits", [*digits[:2], None, *digits[3:]], f"Guidance scale: {unreadable}"),
        ("/digits", [*digits[:6], 101, *digits[7:]], "101"),
        ("/digits", ["11", *digits[1:]], "11"),
        ("/digits", [*digits[:8], [0]], "seed"),
        ("/face", [0, None, None, 5, 0], f"eta: {unreadable}"),
        ("/face", [0, "/etc/passwd", 0.0, 5, 0], f"One of the inputs: {unreadable}"),
        ("/clip", [text, "a", "{}"], "Picture"),
        ("/clip", [5, "a", "{}"], unreadable),
        (
            "/controlnet",
            [{"background": text, "layers": [], "composite": text}, "a", 1, 0, 1, 2, 4, 5],
            f"Control image: {unreadable}",
        ),
        ("/concepts", [None, None, 2.0, 4, 5], "Prompt must be a text."),
    ):
        with pytest.raises(AppError) as refusal:
            client.predict(*values, api_name=endpoint)
        assert said.lower() in str(refusal.value).lower(), (endpoint, values, refusal.value)


def test_a_clean_thick_circle_counts_once(client: "Client", tmp_path: Path) -> None:
    from gradio_client import handle_file
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (512, 512))
    ImageDraw.Draw(image).ellipse((100, 150, 300, 350), outline="white", width=12)
    image.save(tmp_path / "ring.png")
    ring = handle_file(tmp_path / "ring.png")
    drawing = {"background": ring, "layers": [], "composite": ring}
    _, hint, table = client.predict(
        drawing, "red circle with blue background", 1.0, 0.0, 1.0, 2.0, 4, 5, api_name="/controlnet"
    )
    assert len(table["data"]) == 3
    assert 0.003 < read_rgb(Path(hint)).float().mean() / 255 < 0.02  # a thin line


def test_the_endpoints_are_documented(client: "Client") -> None:
    """Each public one has a name, and a section in docs/demo.md."""
    endpoints = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert set(endpoints) == {
        "/digits", "/face", "/interpolate", "/controlnet", "/clip", "/concepts",
    }  # fmt: skip
    text = (ROOT / "docs" / "demo.md").read_text()
    for name, endpoint in endpoints.items():
        assert f"`{name}`" in text
        for parameter in endpoint["parameters"]:
            assert f"`{parameter['parameter_name']}`" in text, parameter


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "../README.md"])
def test_no_other_file_is_served(demo: str, path: str) -> None:
    with pytest.raises(HTTPError) as refusal:
        urlopen(f"{demo}gradio_api/file={quote(path)}")
    assert refusal.value.code in (403, 404)
    refusal.value.close()


def test_large_uploads_are_refused(client: "Client", tmp_path: Path) -> None:
    from gradio_client import handle_file

    (tmp_path / "large.pt").write_bytes(os.urandom(17 * 2**20))
    with pytest.raises(Exception, match="(?i)large|size|413"):
        client.predict(0, handle_file(tmp_path / "large.pt"), 0.0, 5, 0, api_name="/face")
