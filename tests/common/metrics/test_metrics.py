"""The Frechet distance by closed forms, and the digit classifiers with their files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint import save_tensors
from common.errors import InputError
from common.metrics import classifier
from common.metrics.classifier import (
    FEATURES,
    SVHN_MEAN,
    SVHN_STD,
    DigitClassifier,
    LeNet,
    PublishedSVHN,
    classify,
    load_lenet,
    load_published_svhn,
)
from common.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance


def random_statistics(dim: int, seed: int) -> FeatureStatistics:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    return FeatureStatistics(
        torch.randn(dim, dtype=torch.float64, generator=generator), root @ root.T / dim
    )


# ----------------------------------------------------------------------------
# The Frechet distance.


def test_equal_gaussians_are_at_distance_zero() -> None:
    statistics = random_statistics(8, 0)
    assert frechet_distance(statistics, statistics) == pytest.approx(0.0, abs=1e-10)


def test_a_shift_alone_is_the_squared_distance_of_the_means() -> None:
    a = random_statistics(5, 0)
    b = FeatureStatistics(a.mean + torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]), a.cov)
    assert frechet_distance(a, b) == pytest.approx(25.0, abs=1e-9)


def test_diagonal_covariances_give_the_distance_of_the_standard_deviations() -> None:
    """For axis-aligned Gaussians: sum of (m_a - m_b)^2 + (s_a - s_b)^2; a rotation of both changes
    nothing."""
    std_a, std_b = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    mean_b = torch.tensor([1.0, 0.0, -2.0]).double()
    expected = 5.0 + (4.0 + 2.25 + 1.0)
    for rotation in (torch.eye(3).double(), torch.linalg.qr(random_statistics(3, 1).cov)[0]):
        a = FeatureStatistics(torch.zeros(3).double(), rotation @ torch.diag(std_a**2) @ rotation.T)
        b = FeatureStatistics(rotation @ mean_b, rotation @ torch.diag(std_b**2) @ rotation.T)
        assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)
        assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-6)


def test_the_distance_is_that_of_the_matrix_root() -> None:
    """Against |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) with SciPy's root of the
    unsymmetric product."""
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(3):
        a, b = random_statistics(12, seed), random_statistics(12, seed + 100)
        root = linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
        expected = (
            (a.mean - b.mean).square().sum() + torch.trace(a.cov + b.cov) - 2.0 * np.trace(root)
        )
        assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_a_covariance_of_low_rank_is_no_obstacle() -> None:
    """Fewer images than features: eigenvalues of rounding size may be negative."""
    features = torch.randn(5, 40)
    distance = frechet_distance(feature_statistics(features), feature_statistics(features))
    assert math.isfinite(distance) and distance == pytest.approx(0.0, abs=1e-4)


def test_statistics_are_the_mean_and_the_unbiased_covariance() -> None:
    features = torch.randn(50, 4) + 1000.0
    statistics = feature_statistics(features)
    assert statistics.mean.dtype == statistics.cov.dtype == torch.float64
    torch.testing.assert_close(statistics.mean, features.double().mean(0))
    torch.testing.assert_close(statistics.cov, torch.cov(features.double().T))
    torch.testing.assert_close(statistics, feature_statistics(features, torch.full((50,), 7.0)))


def test_weights_count_rows() -> None:
    """A weight of 3 is a row three times over; only the correction for bias, 1 - sum of w^2,
    differs."""
    features = torch.randn(4, 2)
    weights = torch.tensor([3.0, 1.0, 2.0, 0.0])
    weighted = feature_statistics(features, weights)
    repeated = features.repeat_interleave(weights.long(), 0).double()
    torch.testing.assert_close(weighted.mean, repeated.mean(0))
    biased = (repeated - repeated.mean(0)).T @ (repeated - repeated.mean(0)) / len(repeated)
    torch.testing.assert_close(weighted.cov, biased / (1.0 - (9.0 + 1.0 + 4.0) / 36.0))


# ----------------------------------------------------------------------------
# Classifiers.


def random_images(count: int) -> Tensor:
    return torch.randint(
        256, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_the_projects_classifier_comes_back_from_its_folder(tmp_path: Path) -> None:
    model = DigitClassifier().eval()
    model.save(tmp_path)
    loaded = DigitClassifier.load(tmp_path)
    assert not loaded.training
    images = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        assert loaded.features(images).shape == (3, FEATURES)
        assert loaded(images).shape == (3, 10)
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


def test_classify_sees_the_model_range_and_keeps_the_order() -> None:
    """The stub reads the digit from the brightness: 25 d grey levels stand for d."""
    seen = []

    def stub(images: Tensor) -> Tensor:
        seen.append((float(images.min()), float(images.max()), len(images)))
        digits = ((images.mean((1, 2, 3)) + 1.0) * 127.5 / 25.0).round().long()
        return torch.nn.functional.one_hot(digits, 10).float()

    digits = torch.tensor([3, 0, 9, 7, 7])
    images = (25 * digits)[:, None, None, None].expand(5, 3, 28, 28).to(torch.uint8)
    assert torch.equal(classify(stub, images, batch_size=2), digits)
    assert [count for _, _, count in seen] == [2, 2, 1]
    assert min(low for low, _, _ in seen) == -1.0 and all(high <= 1.0 for _, high, _ in seen)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_courses_classifier_loads(tmp_path: Path, wrapped: bool) -> None:
    """`Classifier.pth` is a dict with `state_dict` (CUDA tensors in it are mapped to the CPU)."""
    model = LeNet().eval()
    assert {
        name: tuple(value.shape) for name, value in model.state_dict().items() if "weight" in name
    } == {
        "conv1.weight": (6, 3, 5, 5),
        "conv2.weight": (16, 6, 5, 5),
        "fc1.weight": (128, 256),
        "fc2.weight": (64, 128),
        "fc3.weight": (10, 64),
    }
    state = model.state_dict()
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "Classifier.pth")
    loaded = load_lenet(tmp_path / "Classifier.pth")
    assert torch.equal(classify(loaded, random_images(20)), classify(model, random_images(20)))


@pytest.mark.parametrize(
    "content", [[1, 2], {"state_dict": 3}, {"state_dict": {"conv1.weight": torch.ones(1)}}]
)
def test_a_file_without_the_courses_classifier_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "Classifier.pth")
    with pytest.raises(InputError, match=r"Classifier\.pth"):
        load_lenet(tmp_path / "Classifier.pth")


def test_the_published_svhn_network_loads_and_normalises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    model = PublishedSVHN().eval()
    monkeypatch.setattr(classifier, "PublishedSVHN", lambda: model)  # it is large: one is enough
    torch.save(model.network.state_dict(), tmp_path / "pytorch_model.bin")
    save_tensors(tmp_path / "model.safetensors", model.network.state_dict())
    images = torch.rand(2, 3, 28, 28) * 2.0 - 1.0
    # Pixels in [0, 1], then each channel by its statistics.
    scaled = [((images[:, c] + 1.0) / 2.0 - SVHN_MEAN[c]) / SVHN_STD[c] for c in range(3)]
    with torch.no_grad():
        expected = model.network(torch.stack(scaled, 1))
        assert expected.shape == (2, 10)
        for name in ("pytorch_model.bin", "model.safetensors"):
            model.network.fc.weight.zero_()
            torch.testing.assert_close(load_published_svhn(tmp_path / name)(images), expected)
