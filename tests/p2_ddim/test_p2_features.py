"""The network in whose features faces are compared: its views, its training, its folder."""

from pathlib import Path

import pytest
import torch
from tiny import exit_code

from common.contrastive import contrastive_loss
from common.data.faces import load_faces
from common.errors import InputError
from common.files import read_json
from common.images import to_model_range
from common.seeds import StackedRandomGenerator
from p2_ddim.study import evaluate_features, train_features
from p2_ddim.study.features import (
    SHIPPED,
    FaceFeatures,
    choose_features,
    colours,
    random_views,
    recognised,
)


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a few steps."""
    run_dir = tmp_path_factory.mktemp("features")
    flags = (
        "--steps",
        "12",
        "--batch-size",
        "16",
        "--validate-every",
        "6",
        "--checkpoint-every",
        "12",
        "--device",
        "cpu",
    )
    assert (
        exit_code(
            train_features.main,
            train_features.Config,
            "--data",
            photos,
            "--run-dir",
            run_dir,
            *flags,
        )
        == 0
    )
    return run_dir


def test_a_view_depends_on_its_own_image_and_seed_alone(photos: Path) -> None:
    x = to_model_range(load_faces(photos).images[:4])
    views = random_views(x, StackedRandomGenerator([5, 6, 7, 8]))
    assert views.shape == x.shape and not torch.equal(views, x)
    assert torch.equal(random_views(x[2:3], StackedRandomGenerator([7])), views[2:3])
    assert not torch.equal(random_views(x[2:3], StackedRandomGenerator([9])), views[2:3])


def test_a_view_of_one_colour_is_of_one_colour() -> None:
    """Nothing from outside the picture comes in, whatever the crop and the turn."""
    views = random_views(torch.full((20, 3, 16, 16), 0.5), StackedRandomGenerator(range(20)))
    assert views.flatten(2).std(2).max() < 1e-6 and views.mean((1, 2, 3)).std() > 0.05


def test_the_loss_of_a_perfect_and_of_a_blind_network() -> None:
    assert contrastive_loss(torch.eye(8) * 100.0) < 1e-6
    assert contrastive_loss(torch.zeros(8, 8)) == pytest.approx(torch.tensor(8.0).log().item())


def test_training_learns_to_recognise_a_photo_and_writes_a_folder(
    trained: Path, photos: Path
) -> None:
    features, name = choose_features(trained / "last")
    assert "last" in name
    images = load_faces(photos).images
    rows = features(images)
    assert rows.shape == (len(images), 160) and rows.std(0).max() > 0.0
    assert torch.allclose(features(images[3:4]), rows[3:4], atol=1e-5)  # the statistics are fixed
    vectors = FaceFeatures.load(trained / "last")(to_model_range(images[:2]))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2))


def test_the_judge_is_judged(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FaceFeatures().save(tmp_path / "features")
    arguments = (
        "--photos",
        photos,
        "--features",
        tmp_path / "features",
        "--result",
        tmp_path / "r.json",
    )
    assert exit_code(evaluate_features.main, evaluate_features.Config, *arguments) == 0
    result = read_json(tmp_path / "r.json")
    assert result["among"] == result["held_out"] == 7 and 0.0 <= result["recognised"] <= 1.0
    assert [row["photos"] for row in result["rows"]] == list(evaluate_features.CHANGES)
    assert result["rows"][0]["ratio"] == 1.0 and "as they are" in capsys.readouterr().out


def test_changes_to_photos_by_hand() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4) * 20
    assert torch.equal(evaluate_features.blurred(images), images)  # plain ones have nothing to blur
    noise = evaluate_features.noisy(images[5:6].repeat(100, 1, 1, 1)).float() - 100
    assert noise.std().item() == pytest.approx(15.0, rel=0.05)
    halves = evaluate_features.mixed(images)
    assert torch.equal(halves[3, :, :, :2], images[3, :, :, :2])
    assert torch.equal(halves[3, :, :, 2:], images[2, :, :, 2:])
    assert torch.equal(evaluate_features.collapsed(images)[8:], images[:2])


def test_recognition_by_hand() -> None:
    cosines = torch.eye(4)
    assert recognised(cosines) == 1.0
    cosines[0, 3] = 2.0
    assert recognised(cosines) == 0.75


def test_without_a_folder_the_features_are_colours(tmp_path: Path) -> None:
    assert choose_features(tmp_path / "none") == (colours, "colours on an 8x8 grid")


def test_the_shipped_network_loads_if_it_is_there() -> None:
    if not SHIPPED.is_dir():
        pytest.skip("no feature network is shipped")
    assert FaceFeatures.load(SHIPPED).describe(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    ).shape == (1, 160)


def test_a_batch_cannot_be_cut(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data",
        photos,
        "--run-dir",
        tmp_path / "run",
        "--gradient-accumulation-steps",
        "2",
    )
    assert exit_code(train_features.main, train_features.Config, *arguments) == 2
    assert "needs its whole batch at once" in capsys.readouterr().err


def test_a_batch_of_more_photos_than_there_are_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", photos, "--run-dir", tmp_path / "run", "--batch-size", "4000")
    assert exit_code(train_features.main, train_features.Config, *arguments) == 2
    assert "a step takes 4000 different photos" in capsys.readouterr().err


def test_another_folder_is_refused(digit_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="holds a model of kind"):
        FaceFeatures.load(digit_checkpoint)
