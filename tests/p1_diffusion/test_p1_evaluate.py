"""The replica grader: what it counts, what it refuses, how it answers, and measures that the grader
does not see."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from pages import outline
from tiny import exit_code, refused, run_process
from torch import Tensor

from common.data.digits import NUM_DIGITS, Digits, Edition, pairing
from common.errors import InputError
from common.files import ROOT
from common.images import write_png
from common.metrics.classifier import DigitClassifier, LeNet
from p1_diffusion import evaluate
from p1_diffusion import quality as quality_module
from p1_diffusion.evaluate import Config, grade, main, read_output
from p1_diffusion.quality import (
    dropped_context_rate,
    load_reference,
    make_reference,
    nearest_training,
    quality,
)


def random_digits(per_class: int, seed: int) -> Digits:
    """Noise in the shape of real digits, all twenty classes; each class around its own
    brightness."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(20).repeat_interleave(per_class)
    noise = torch.randn(len(classes), 3, 28, 28, generator=generator)
    images = (60 + 6 * classes[:, None, None, None] + 25 * noise).clamp(0, 255).to(torch.uint8)
    return Digits(
        images, classes % 10, classes // 10, [f"{i:05d}.png" for i in range(len(classes))]
    )


def oracle(images: Tensor) -> Tensor:
    """Knows the digit of the images that `write_set` writes, by their mean brightness."""
    digits = (((images.mean((1, 2, 3)) + 1.0) * 127.5 - 10.0) / 20.0).round().long().clamp(0, 9)
    return torch.nn.functional.one_hot(digits, NUM_DIGITS).float()


def write_set(folder: Path, edition: Edition = "2025") -> Path:
    """A complete output folder whose images are as bright as their digit says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        for dataset, digit in pairing(edition):
            (folder / dataset).mkdir(parents=True, exist_ok=True)
            for n in range(1, 51):
                image = torch.full((3, 28, 28), 10 + 20 * digit, dtype=torch.uint8)
                image[:, n // 8, n % 8] += 5
                write_png(folder / dataset / f"{digit}_{n:03d}.png", image)
    return folder


@pytest.fixture(scope="module")
def train_digits() -> Digits:
    return random_digits(12, 0)


@pytest.fixture(scope="module")
def held_out_digits() -> Digits:
    return random_digits(8, 1)


@pytest.fixture(scope="module")
def grader(
    tmp_path_factory: pytest.TempPathFactory, train_digits: Digits, held_out_digits: Digits
) -> Path:
    """A classifier folder with random weights and the reference statistics of noise."""
    folder = tmp_path_factory.mktemp("grader")
    torch.manual_seed(0)
    network = DigitClassifier().eval()
    network.save(folder)
    make_reference(network, train_digits, held_out_digits, folder / "reference.safetensors")
    return folder


@pytest.fixture(scope="module")
def perfect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete 2025 folder."""
    return write_set(tmp_path_factory.mktemp("perfect"))


@pytest.fixture
def copy(perfect: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(perfect, tmp_path / "copy")


@pytest.fixture(autouse=True)
def _no_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "find_published_svhn", lambda: None)


# ----------------------------------------------------------------------------
# The grader's part.


@pytest.mark.parametrize("edition", ["2025", "2024"])
def test_the_folder_is_read_with_its_labels(
    edition: Edition, perfect: Path, tmp_path: Path
) -> None:
    folder = perfect if edition == "2025" else write_set(tmp_path, edition)
    found, images, digits, datasets = read_output(folder)
    assert found == edition
    assert images.shape == ({"2025": 500, "2024": 1000}[edition], 3, 28, 28)
    assert torch.equal(images.double().mean((1, 2, 3)).round().long(), 10 + 20 * digits)
    counts = torch.bincount(datasets * 10 + digits, minlength=20)
    if edition == "2024":
        assert counts.tolist() == [50] * 20
    else:  # even digits from MNIST-M, odd ones from SVHN
        assert counts.tolist() == [50, 0] * 5 + [0, 50] * 5


def test_an_oracle_gets_everything_right(perfect: Path) -> None:
    _, images, digits, datasets = read_output(perfect)
    result = grade(
        images, digits, datasets, {"mnistm": ("oracle", oracle), "svhn": ("oracle", oracle)}
    )
    assert result["mean_accuracy"] == 1.0
    for dataset, own in (("mnistm", (0, 2, 4, 6, 8)), ("svhn", (1, 3, 5, 7, 9))):
        part = result["datasets"][dataset]
        assert part["accuracy"] == 1.0 and part["judge"] == "oracle"
        assert part["accuracy_by_digit"] == {str(digit): 1.0 for digit in own}
        assert part["confusion"] == [
            [50 * (i == j and i in own) for j in range(10)] for i in range(10)
        ]


def test_confusion_has_the_digit_asked_for_in_rows() -> None:
    """Four images asked to be 3, of which the judge takes one for an 8; and two of 8, taken
    rightly."""
    digits = torch.tensor([3, 3, 3, 3, 8, 8, 0])
    datasets = torch.tensor([0, 0, 0, 0, 0, 0, 1])
    images = (
        (10 + 20 * torch.tensor([3, 3, 8, 3, 8, 8, 5]))
        .to(torch.uint8)[:, None, None, None]
        .expand(7, 3, 28, 28)
    )
    result = grade(
        images, digits, datasets, {"mnistm": ("oracle", oracle), "svhn": ("oracle", oracle)}
    )
    confusion = result["datasets"]["mnistm"]["confusion"]
    assert (confusion[3][3], confusion[3][8], confusion[8][8], confusion[8][3]) == (3, 1, 2, 0)
    assert sum(map(sum, confusion)) == 6
    assert result["datasets"]["mnistm"]["accuracy"] == pytest.approx(5 / 6)
    assert result["datasets"]["mnistm"]["accuracy_by_digit"] == {"3": 0.75, "8": 1.0}
    assert result["datasets"]["svhn"]["accuracy"] == 0.0
    # The grader takes the mean of the two accuracies, not the share of all images.
    assert result["mean_accuracy"] == pytest.approx(5 / 12)


def test_wrong_images_come_first_then_the_least_certain() -> None:
    """Images of brightness 0 to 3, asked to be 0, 1, 1 and 1 by a judge that knows brightness."""
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 28, 28)

    def judge(images: Tensor) -> Tensor:
        brightness = ((images.mean((1, 2, 3)) + 1.0) * 127.5).round().long()
        rows = [[4.0, 0.0], [0.0, 9.0], [5.0, 0.0], [0.0, 1.0]]
        logits = torch.full((len(images), NUM_DIGITS), -50.0)
        logits[:, :2] = torch.tensor(rows)[brightness]
        return logits

    digits, datasets = torch.tensor([0, 1, 1, 1]), torch.zeros(4, dtype=torch.long)
    pictures = evaluate.judged_pictures(
        images, digits, datasets, {"mnistm": ("judge", judge), "svhn": ("judge", oracle)}
    )
    order = sorted(pictures, key=lambda picture: -picture.badness)
    assert [(picture.name, picture.passed) for picture in order] == [
        ("mnistm/1_002.png", False),
        ("mnistm/1_003.png", True),
        ("mnistm/0_001.png", True),
        ("mnistm/1_001.png", True),
    ]
    # softmax of (5, 0) and (1, 0): 1 / (1 + e^5) and 1 / (1 + e^-1).
    verdicts = [picture.verdict for picture in order[:2]]
    assert verdicts == ["read as 0, p(1) = 0.007", "read as 1, p(1) = 0.731"]


def test_a_perfect_folder_passes_and_the_result_is_written(
    perfect: Path,
    grader: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judges = {"mnistm": ("oracle", oracle), "svhn": ("oracle", oracle)}
    monkeypatch.setattr(evaluate, "pick_judges", lambda config, network: judges)
    path = tmp_path / "new" / "result.json"
    page = tmp_path / "page.html"
    arguments = ("--images", perfect, "--grader", grader, "--result", path, "--html", page)
    assert exit_code(main, Config, *arguments) == 0
    found = outline(page.read_text())
    assert len(found.all("article")) == 500 and not found.all("article", "failed")
    assert len(found.all("figure", "matrix")) == 2 and "PASS</span>" in page.read_text()
    assert "500 images of 2025, mean accuracy 100.00%: passes" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert (
        result["mean_accuracy"] == 1.0 and result["images"] == 500 and result["edition"] == "2025"
    )
    assert {"frechet_distance", "frechet_distance_real", "spread_ratio"} <= result["quality"][
        "svhn"
    ].keys()


def test_the_script_answers_1_below_the_baseline(
    perfect: Path, grader: Path, tmp_path: Path
) -> None:
    """A random classifier takes nearly every image for one digit; the course's, given, judges
    MNIST-M."""
    lenet = tmp_path / "Classifier.pth"
    torch.save({"state_dict": LeNet().state_dict()}, lenet)
    arguments = (perfect, "--grader", grader, "--classifier", lenet)
    result = run_process(["bash", ROOT / "scripts" / "grade.sh", *arguments], cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "fails the simple baseline (90%), fails the strong baseline (95%)" in result.stdout
    assert "course LeNet" in result.stdout and "project" in result.stdout
    assert result.stderr.endswith("were inside 'state_dict', which was taken off\n")


def spoil_missing(folder: Path) -> str:
    (folder / "svhn" / "3_017.png").unlink()
    return "lacks 1 of the 500 images of the edition 2025, such as svhn/3_017.png"


def spoil_dataset(folder: Path) -> str:
    shutil.rmtree(folder / "svhn")
    return "lacks 250 of the 500 images of the edition 2025, such as svhn/1_001.png"


def spoil_stray(folder: Path) -> str:
    (folder / "mnistm" / ".DS_Store").write_text("x")
    return "holds 1 entries that break the grader, such as mnistm/.DS_Store"


def spoil_number(folder: Path) -> str:
    shutil.copy(folder / "mnistm" / "0_001.png", folder / "mnistm" / "0_051.png")
    return "such as mnistm/0_051.png"


def spoil_size(folder: Path) -> str:
    write_png(folder / "svhn" / "9_050.png", torch.zeros(3, 28, 32, dtype=torch.uint8))
    return "svhn/9_050.png has 32x28 pixels, but 28x28 are expected"


def spoil_content(folder: Path) -> str:
    (folder / "mnistm" / "4_004.png").write_bytes(b"no image")
    return "mnistm/4_004.png is not a readable image"


def spoil_everything(folder: Path) -> str:
    shutil.rmtree(folder)
    return f"the folder {folder} does not exist"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_missing,
        spoil_dataset,
        spoil_stray,
        spoil_number,
        spoil_size,
        spoil_content,
        spoil_everything,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_what_cannot_be_graded_is_named(
    spoil, copy: Path, grader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = spoil(copy)
    assert expected in refused(capsys, main, Config, "--images", copy, "--grader", grader)


def test_the_courses_classifier_and_the_published_network_take_over(
    grader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": LeNet().state_dict()}, tmp_path / "Classifier.pth")
    monkeypatch.setattr(evaluate, "load_published_svhn", lambda path: ("loaded", path))
    network = DigitClassifier.load(grader)
    config = Config(images=tmp_path, grader=grader)
    judges = evaluate.pick_judges(config, network)
    assert judges == {"mnistm": ("project", network), "svhn": ("project", network)}
    config = dataclasses.replace(
        config, classifier=tmp_path / "Classifier.pth", svhn_classifier=tmp_path / "w.bin"
    )
    judges = evaluate.pick_judges(config, network)
    assert judges["mnistm"][0] == "course LeNet" and isinstance(judges["mnistm"][1], LeNet)
    assert judges["svhn"] == ("published ResNet-34", ("loaded", tmp_path / "w.bin"))
    monkeypatch.setattr(evaluate, "find_published_svhn", lambda: tmp_path / "cached")
    assert evaluate.pick_judges(Config(images=tmp_path), network)["svhn"][1] == (
        "loaded",
        tmp_path / "cached",
    )


# ----------------------------------------------------------------------------
# What the grader does not see.


def test_real_digits_have_the_spread_and_distance_of_real_digits(
    grader: Path, held_out_digits: Digits
) -> None:
    held_out = held_out_digits
    network, reference = DigitClassifier.load(grader), load_reference(grader)
    result = quality(held_out.images, held_out.digits, held_out.datasets, network, reference)
    for part in result.values():
        assert part["spread_ratio"] == pytest.approx(1.0, rel=1e-3)
        assert part["pixel_spread_ratio"] == pytest.approx(1.0, rel=1e-6)
        # As many real digits as there are: every draw takes all of them.
        assert part["frechet_distance"] == pytest.approx(part["frechet_distance_real"], rel=1e-2)
        assert part["frechet_ratio"] == pytest.approx(
            part["frechet_distance"] / part["frechet_distance_real"]
        )


def test_a_dataset_without_images_is_left_out(
    grader: Path, train_digits: Digits, held_out_digits: Digits
) -> None:
    """As a third one that no edition draws, and that the real digits have."""
    network, reference = DigitClassifier.load(grader), load_reference(grader)
    mine = held_out_digits.datasets == 1
    some = tuple(part[mine] for part in (held_out_digits.images, held_out_digits.digits))
    images, digits, datasets = *some, held_out_digits.datasets[mine]
    judges = {"svhn": ("project", network)}
    graded = grade(images, digits, datasets, judges)
    assert graded["mean_accuracy"] == graded["datasets"]["svhn"]["accuracy"]
    found = (
        graded["datasets"],
        quality(images, digits, datasets, network, reference),
        nearest_training(images, digits, datasets, train_digits, held_out_digits),
        quality_module.detail(images, datasets, held_out_digits),
    )
    assert all(list(parts) == ["svhn"] for parts in found)
    pictures = evaluate.judged_pictures(images, digits, datasets, judges)
    assert len(pictures) == len(images)


def test_collapse_shows(grader: Path, held_out_digits: Digits) -> None:
    """One image for each class: no spread, and a greater distance."""
    held_out = held_out_digits
    network, reference = DigitClassifier.load(grader), load_reference(grader)
    collapsed = held_out.images[::8].repeat_interleave(8, 0)
    result = quality(collapsed, held_out.digits, held_out.datasets, network, reference)
    for part in result.values():
        assert part["spread_ratio"] == pytest.approx(0.0, abs=1e-3)
        assert part["pixel_spread_ratio"] == 0.0
        assert part["frechet_ratio"] > 1.1


def test_reference_statistics_weigh_classes_equally(grader: Path, train_digits: Digits) -> None:
    """By the mean of class means and of class second moments, whatever the class sizes."""
    network, reference = DigitClassifier.load(grader), load_reference(grader)
    classes = quality_module.class_index(train_digits.digits, train_digits.datasets)
    features = quality_module.extract_features(network, train_digits.images).double()
    chosen = torch.cat([features[classes == c] for c in (2, 15)])  # of equal sizes
    statistics = reference.statistics([2, 15])
    torch.testing.assert_close(statistics.mean, chosen.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        statistics.cov, torch.cov(chosen.T, correction=0), rtol=1e-3, atol=1e-5
    )


def test_spread_is_the_root_mean_square_distance_from_the_mean() -> None:
    """Of (0, 0), (2, 0), (0, 4), (2, 4): variances 4/3 and 16/3 with Bessel's correction."""
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    assert quality_module._spread(rows).item() == pytest.approx((20.0 / 3.0) ** 0.5)


def test_copies_of_training_images_are_at_distance_zero(
    train_digits: Digits, held_out_digits: Digits
) -> None:
    images, digits, datasets = train_digits.images, train_digits.digits, train_digits.datasets
    result = nearest_training(images, digits, datasets, train_digits, held_out_digits)
    for part in result.values():
        assert part["generated_median"] == pytest.approx(0.0, abs=0.1)
        assert part["held_out_min"] > 10.0
    brighter = (
        train_digits.images + 7
    )  # 7 grey levels from every pixel of the original, and nothing nearer
    result = nearest_training(brighter, digits, datasets, train_digits, held_out_digits)
    assert result["mnistm"]["generated_median"] == pytest.approx(7.0, abs=0.1)


def test_context_is_dropped_as_often_as_asked() -> None:
    """16,000 draws: the standard deviation of the rate is 0.0024 at 0.1."""
    assert dropped_context_rate(0.1) == pytest.approx(0.1, abs=0.01)
    assert dropped_context_rate(0.0, steps=5) == 0.0
    assert dropped_context_rate(1.0, steps=5) == 1.0


def test_a_reference_of_another_kind_is_refused(tmp_path: Path, grader: Path) -> None:
    folder = shutil.copytree(grader, tmp_path / "grader")
    (folder / "reference.safetensors").unlink()
    with pytest.raises(InputError, match="reference.safetensors does not exist"):
        load_reference(folder)
    shutil.copy(folder / "model.safetensors", folder / "reference.safetensors")
    with pytest.raises(
        InputError, match="reference.safetensors does not hold the reference statistics"
    ):
        load_reference(folder)
