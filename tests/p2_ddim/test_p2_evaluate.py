"""What is said about faces: MSE and verdict, the convention behind references, distances to photos,
figures and studies."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from pages import outline
from PIL import Image
from tiny import contents, exit_code, refused
from tiny_faces import noise, save_noises, tiny_faces
from torch import Tensor

from common.data.faces import Faces, load_faces
from common.data.split import is_held_out
from common.errors import InputError
from common.images import read_rgb, write_png
from common.metrics.frechet import feature_statistics, frechet_distance
from p2_ddim import evaluate, inference
from p2_ddim.evaluate import compare
from p2_ddim.sampling import CONVENTIONS, SamplingConfig
from p2_ddim.study import calibrate, figures
from p2_ddim.study import sweeps as study
from p2_ddim.study.features import colours
from p2_ddim.study.quality import nearest_photo, quality


def random_images(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{i:02d}": torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8)
        for i in range(count)
    }


def write(folder: Path, images: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    for name, image in images.items():
        write_png(folder / f"{name}.png", image)
    return folder


# ----------------------------------------------------------------------------
# References.


def test_mse_by_hand() -> None:
    """255 against 245 in every third number: 100 / 3; and uint8 must not wrap around."""
    reference = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    image = reference.clone()
    image[1] = 245
    result = compare({"a": image, "b": reference}, {"a": reference, "b": reference})
    assert result["mse"] == {"a": pytest.approx(100 / 3), "b": 0.0}
    assert result["mean_mse"] == pytest.approx(50 / 3) and result["sum_mse"] == pytest.approx(
        100 / 3
    )
    assert result["max_difference"] == 10 and result["passes"]
    zero = torch.zeros_like(reference)
    assert compare({"a": zero}, {"a": reference})["mean_mse"] == 255**2
    assert compare({"a": reference}, {"a": zero})["max_difference"] == 255


@pytest.mark.parametrize(
    ("offset", "code", "verdict"), [(0, 0, "PASS"), (4, 0, "PASS"), (5, 1, "FAIL")]
)
def test_the_verdict_is_the_exit_code(
    offset: int, code: int, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 passes, 25 does not."""
    references = {name: image // 2 for name, image in random_images(3).items()}
    write(tmp_path / "references", references)
    write(tmp_path / "out", {name: image + offset for name, image in references.items()})
    arguments = (
        "--images",
        tmp_path / "out",
        "--references",
        tmp_path / "references",
        "--result",
        tmp_path / "r.json",
    )
    assert exit_code(evaluate.main, evaluate.Config, *arguments) == code
    out = capsys.readouterr().out
    assert out.count("MSE") == 4 and f"{verdict}: mean MSE {offset**2:.4f}" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["max_difference"] == offset and result["passes"] == (code == 0)
    assert result["sum_mse"] == pytest.approx(3 * offset**2)


def test_the_page_shows_the_worst_face_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = {name: image // 2 for name, image in random_images(3).items()}
    images = {name: image + 3 * int(name) for name, image in references.items()}
    page = tmp_path / "page.html"
    arguments = ("--images", write(tmp_path / "out", images), "--html", page)
    assert "give --references too" in refused(
        capsys, evaluate.main, evaluate.Config, *arguments, "--photos", tmp_path
    )
    arguments += ("--references", write(tmp_path / "references", references))
    assert exit_code(evaluate.main, evaluate.Config, *arguments) == 0
    text = page.read_text()
    verdicts = re.findall(r'name">(\d\d)</p><p class="(\w+)">MSE ([\d.]+)<', text)
    assert verdicts == [("02", "bad", "36.000"), ("01", "good", "9.000"), ("00", "good", "0.000")]
    captions = ["02, image", "02, reference", "02, difference x 8"]
    assert [image["alt"] for image in outline(text).all("img")[:3]] == captions


@pytest.mark.parametrize("name", ["homework", "no clamp", "trailing"])
def test_calibrate_finds_the_convention(
    name: str, face_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noises = save_noises(tmp_path / "noises", 2)
    convention = SamplingConfig(**CONVENTIONS[name])
    flags = ["--clip-x0" if convention.clip_x0 else "--no-clip-x0", "--spacing", convention.spacing]
    flags += ["--last-abar", convention.last_abar]
    common = ("--noises", noises, "--checkpoint", face_checkpoint, "--device", "cpu", "--steps", 10)
    out = tmp_path / "references"
    assert exit_code(inference.main, inference.Config, *common, "--output-dir", out, *flags) == 0
    capsys.readouterr()
    arguments = (*common, "--references", out, "--result", tmp_path / "r.json")
    assert exit_code(calibrate.main, calibrate.Config, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == len(CONVENTIONS)
        and lines[0].startswith(f"{name} ")
        and "MSE    0.0000" in lines[0]
    )
    result = json.loads((tmp_path / "r.json").read_text())
    values = [row["mse"] for row in result["conventions"]]
    assert values == sorted(values) and values[1] > 0.0
    assert result["images"] == ["00"]  # one image by default


# ----------------------------------------------------------------------------
# Photos.


def test_photos_are_read_in_order_and_split_by_name(photos: Path) -> None:
    whole, train, held_out = (load_faces(photos, split) for split in ("all", "train", "held_out"))
    assert whole.names == [f"{i:05d}.jpg" for i in range(40)]
    assert held_out.names == [name for name in whole.names if is_held_out("face", name)]
    assert sorted(train.names + held_out.names) == whole.names and 0 < len(held_out) < 10
    for name, image in zip(whole.names, whole.images, strict=True):
        assert torch.equal(image, read_rgb(photos / "photos" / name))


def test_colours_are_means_over_a_grid() -> None:
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[0, 0, :2, :2] = 255
    features = colours(images)
    assert features.shape == (1, 192) and features[0, 0] == 1.0 and features.sum() == 1.0


def test_real_photos_are_nearer_to_real_photos_than_dark_images_are(photos: Path) -> None:
    train, held_out = load_faces(photos, "train"), load_faces(photos, "held_out")
    same = quality(held_out.images, train, held_out, colours)
    other = quality(held_out.images // 8, train, held_out, colours)
    assert same["count"] == len(held_out)
    assert same["frechet_distance"] == pytest.approx(same["frechet_distance_real"], rel=1e-6)
    assert other["frechet_ratio"] > 1.5
    grain = torch.randint(
        -40, 41, held_out.images.shape, generator=torch.Generator().manual_seed(0)
    )
    noisy = quality(
        (held_out.images.int() + grain).clamp(0, 255).to(torch.uint8), train, held_out, colours
    )
    side = held_out.images.shape[-1]
    for k in (side // 4, side // 2):
        assert noisy[f"luminance_power_{k}_ratio"] > 1.2 * same[f"luminance_power_{k}_ratio"]
    assert noisy["detail"] > same["detail"] and noisy["detail_real"] == same["detail_real"]


def test_a_distance_needs_two_images_and_two_photos(photos: Path) -> None:
    train, held_out = load_faces(photos, "train"), load_faces(photos, "held_out")
    one = Faces(held_out.images[:1], held_out.names[:1])
    for images, others in ((held_out.images[:1], held_out), (held_out.images, one)):
        with pytest.raises(InputError, match="at least two images and two held-out photos"):
            quality(images, train, others, colours)
    with pytest.raises(InputError, match="at least two held-out photos are needed, not 1"):
        study.measure_real((train.images, one.images), 4, lambda images: {})


def test_any_function_can_be_the_features(photos: Path) -> None:
    """The mean brightness alone: its Frechet distance is that of two numbers' means and spreads."""
    train, held_out = load_faces(photos, "train"), load_faces(photos, "held_out")
    brightness = lambda images: images.double().mean((1, 2, 3))[:, None]  # noqa: E731
    a, b = brightness(held_out.images), brightness(train.images)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert quality(held_out.images, train, held_out, brightness)[
        "frechet_distance"
    ] == pytest.approx(expected.item())


def test_a_copy_is_found_even_mirrored(photos: Path) -> None:
    train, held_out = load_faces(photos, "train"), load_faces(photos, "held_out")
    copies = nearest_photo(train.images[:5].flip(-1), train, held_out)
    assert copies["generated_median"] < 0.1  # cdist rounds
    assert copies["held_out_min"] > 1.0
    assert copies["generated_to_seen_median"] < copies["generated_to_held_out_median"]
    darker = nearest_photo((train.images[:1].float() * 0 + 7).to(torch.uint8), train, held_out)
    expected = (train.images.double() - 7).square().mean((1, 2, 3)).sqrt().min().item()
    assert darker["generated_min"] == pytest.approx(expected, rel=1e-3)


def test_evaluation_against_photos(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write(tmp_path / "out", {name: image // 8 for name, image in random_images(4).items()})
    arguments = ("--images", out, "--photos", photos, "--result", tmp_path / "r.json")
    assert exit_code(evaluate.main, evaluate.Config, *arguments) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == 4 and result["quality"]["frechet_ratio"] > 1.0
    assert (
        "frechet ratio" in capsys.readouterr().out and result["nearest_photo"]["generated_min"] > 10
    )


# ----------------------------------------------------------------------------
# Figures and studies.


def test_figures_show_what_hw2_2_writes(face_checkpoint: Path, tmp_path: Path) -> None:
    noises = save_noises(tmp_path / "noises", 5)
    common = ("--noises", noises, "--checkpoint", face_checkpoint, "--device", "cpu", "--steps", 1)
    assert (
        exit_code(figures.main, figures.Config, *common, "--output-dir", tmp_path / "figures") == 0
    )
    assert sorted(contents(tmp_path / "figures")) == ["eta.png", "lerp.png", "slerp.png"]
    assert (
        exit_code(inference.main, inference.Config, *common, "--output-dir", tmp_path / "out") == 0
    )
    eta = read_rgb(tmp_path / "figures" / "eta.png")
    columns = [_find(eta, read_rgb(tmp_path / "out" / f"{i:02d}.png"))[1] for i in range(4)]
    assert columns == sorted(columns)
    for name in ("slerp", "lerp"):
        figure = read_rgb(tmp_path / "figures" / f"{name}.png")
        first, last = (_find(figure, read_rgb(tmp_path / "out" / f"{i:02d}.png")) for i in (0, 1))
        assert first[0] == last[0] and last[1] - first[1] == 10 * (
            32 + 2
        )  # eleven images of 16 pixels, doubled


def test_the_first_faces_of_a_folder_are_shown(
    face_checkpoint: Path, noises: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = random_images(40)
    folder = write(tmp_path / "faces", images)
    common = (
        "--noises",
        noises,
        "--checkpoint",
        face_checkpoint,
        "--device",
        "cpu",
        "--steps",
        1,
        "--images",
        folder,
    )
    assert exit_code(figures.main, figures.Config, *common, "--output-dir", tmp_path / "out") == 0
    figure = read_rgb(tmp_path / "out" / "faces.png")
    places = [_find(figure, images[f"{i:02d}"]) for i in (0, 7, 8, 31)]
    assert places[0][0] == places[1][0] < places[2][0] < places[3][0]
    assert places[0][1] == places[2][1] < places[1][1] == places[3][1]
    with pytest.raises(AssertionError):
        _find(figure, images["32"])
    write_png(folder / "00.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    capsys.readouterr()
    sentence = refused(
        capsys, figures.main, figures.Config, *common, "--output-dir", tmp_path / "other"
    )
    assert "are not of one size" in sentence and not (tmp_path / "other").exists()


def _find(figure: Tensor, image: Tensor) -> tuple[int, int]:
    """Where the image, at twice its size, lies in the figure; it must be there once."""
    image = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    windows = figure.unfold(1, image.shape[1], 1).unfold(
        2, image.shape[2], 1
    )  # [3, rows, columns, h, w]
    found = (windows == image[:, None, None]).flatten(3).all(-1).all(0).nonzero()
    assert len(found) == 1
    return int(found[0, 0]), int(found[0, 1])


def test_an_eta_grid_of_a_sampler_without_eta_is_refused() -> None:
    sampling = SamplingConfig(sampler="dpmpp_2m", steps=3)
    with pytest.raises(InputError, match="--eta applies to DDIM only"):
        figures.eta_grid(tiny_faces(), [("00", noise(0))], sampling, torch.device("cpu"))


def test_rows_of_the_eta_grid_differ() -> None:
    network, named_noises = tiny_faces(), [("00", noise(0)), ("01", noise(1))]
    sampling = SamplingConfig(steps=3)
    images = [
        figures.faces(network, named_noises, SamplingConfig(steps=3, eta=eta), torch.device("cpu"))
        for eta in figures.ETAS
    ]
    assert len({image.numpy().tobytes() for image in images}) == 5
    grid = figures.eta_grid(network, named_noises, sampling, torch.device("cpu"))
    assert grid.shape[1] > 5 * 32


def test_the_step_study_converges() -> None:
    """More steps come closer to the reference, which has distance 0 to itself."""
    table = [
        ("ddim", "trailing", 5),
        ("ddim", "trailing", 20),
        ("ddim", "homework", 50),
        ("dpmpp_2m", "trailing", 10),
    ]
    result = study.study_steps(
        tiny_faces(),
        [noise(0), noise(1)],
        torch.device("cpu"),
        [*table, ("ddim", "homework", 50)],
        50,
    )
    mse = [row["mse"] for row in result["rows"]]
    assert mse[0] > mse[1] > 0.0 and mse[2] == mse[4] == 0.0
    assert [row["evaluations"] for row in result["rows"]] == [5, 20, 50, 10, 50]
    assert len(study.STEP_TABLE) == 14 and {steps for _, _, steps in study.STEP_TABLE} == {
        10,
        20,
        50,
        100,
        250,
    }


def test_the_path_study_measures_norm_and_look(photos: Path) -> None:
    pairs = [(noise(i), noise(100 + i)) for i in range(4)]
    real = study.read_photos(photos, 16)
    sampling = SamplingConfig(steps=1, chunk_size=4)
    result = study.study_paths(
        tiny_faces(), pairs, real, torch.device("cpu"), sampling, alphas=(0.0, 0.5, 1.0)
    )
    rows = {(row["path"], row["alpha"]): row for row in result["rows"]}
    assert rows["slerp", 0.5]["norm"] == pytest.approx(1.0, abs=0.05)
    assert rows["lerp", 0.5]["norm"] == pytest.approx(math.sqrt(0.5), abs=0.05)
    for end in (0.0, 1.0):
        assert {**rows["slerp", end], "path": ""} == {**rows["lerp", end], "path": ""}
    assert all(row["frechet_distance"] > 0 for row in rows.values())
    assert result["real"] == study.measure_real(real, 4, study.measures(real, colours))


def test_real_photos_are_measured_at_the_same_number(photos: Path) -> None:
    seen: list[Tensor] = []
    train, held_out = study.read_photos(photos, 16)
    for count, expected in ((4, 4), (100, len(held_out))):
        study.measure_real((train, held_out), count, lambda images: seen.append(images) or {})
        assert len(seen[-1]) == expected and len(seen[-1].flatten(1).unique(dim=0)) == expected
    found = study.measure_real((train, held_out), 100, study.measures((train, held_out), colours))
    assert found["contrast"] == pytest.approx(study.look(held_out)["contrast"])
    target, real = feature_statistics(colours(train)), feature_statistics(colours(held_out))
    assert found["frechet_distance"] == pytest.approx(frechet_distance(real, target))
    assert study.measure_real(None, 4, study.look) is None


def test_the_eta_study_measures_what_the_fresh_noise_changes(photos: Path) -> None:
    noises, real = [noise(i) for i in range(4)], study.read_photos(photos, 16)
    result = study.study_eta(
        tiny_faces(), noises, real, torch.device("cpu"), SamplingConfig(steps=3, chunk_size=4)
    )
    rows = result["rows"]
    assert [row["eta"] for row in rows] == list(figures.ETAS) and (
        result["images"],
        result["steps"],
    ) == (4, 3)
    assert rows[0]["mse"] == 0.0 < rows[1]["mse"] < rows[-1]["mse"]
    plain = study.final_images(
        tiny_faces(), noises, SamplingConfig(steps=3, chunk_size=4), torch.device("cpu")
    )
    apart = [(plain[i] - plain[i - 1]).square().mean().item() * 127.5**2 for i in range(4)]
    assert result["unrelated_mse"] == pytest.approx(sum(apart) / 4)
    assert all(row["frechet_distance"] > 0 for row in [*rows, result["real"]])
    alone = study.study_eta(
        tiny_faces(), noises, None, torch.device("cpu"), SamplingConfig(steps=1), etas=(0.0,)
    )
    assert alone["real"] is None and "frechet_distance" not in alone["rows"][0]


def test_contrast_and_detail_by_hand() -> None:
    stripes = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    stripes[..., ::2] = 100
    assert study.look(stripes)["contrast"] == pytest.approx(50.0 * math.sqrt(48 / 47))
    assert study.look(stripes)["detail"] == pytest.approx(
        50.0
    )  # 100 from column to column, 0 from row to row


@pytest.mark.parametrize(("name", "rows"), [("steps", 2), ("eta", 2), ("paths", 4)])
def test_studies_write_numbers_and_plots(
    name: str,
    rows: int,
    face_checkpoint: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        study.study_steps,
        "__defaults__",
        ((("ddim", "homework", 10), ("dpmpp_2m", "trailing", 5)), 20),
    )
    for part in (study.study_eta, study.study_paths):
        monkeypatch.setattr(part, "__defaults__", (SamplingConfig(steps=1), colours, (0.0, 1.0)))
    arguments = (
        name,
        "--checkpoint",
        face_checkpoint,
        "--results",
        tmp_path,
        "--count",
        2,
        "--side",
        16,
        "--device",
        "cpu",
    )
    flags = () if name == "steps" else ("--photos", photos)
    assert exit_code(study.main, study.Config, *arguments, *flags) == 0
    plots = [] if name == "eta" else [f"figures/p2/{name}.png"]
    assert sorted(contents(tmp_path)) == [*plots, f"p2_{name}.json"]
    result = json.loads((tmp_path / f"p2_{name}.json").read_text())
    assert (
        result["command"] == f"python3 -m p2_ddim.study.sweeps {name}"
        and len(result["rows"]) == rows
    )
    for plot in plots:
        with Image.open(tmp_path / plot) as image:
            assert image.width > 400
