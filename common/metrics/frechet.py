"""The Frechet distance between two sets of features, each modelled as a Gaussian."""

from typing import NamedTuple

import torch
from torch import Tensor


class FeatureStatistics(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    cov: Tensor


def feature_statistics(features: Tensor, weights: Tensor | None = None) -> FeatureStatistics:
    """Mean and covariance of features [N, D].

    `weights` [N] weights the rows, for example to balance classes of unequal size; None weights all
    rows equally.
    """
    features = features.double()
    weights = (
        torch.ones(len(features), dtype=torch.float64) if weights is None else weights.double()
    )
    weights = weights / weights.sum()
    mean = weights @ features
    centred = features - mean
    # Unbiased for equal weights, where 1 - sum w^2 = 1 - 1/N.
    return FeatureStatistics(
        mean, (centred * weights[:, None]).T @ centred / (1.0 - weights.square().sum())
    )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

    Equation 6 of Heusel et al. 2017 (arXiv:1706.08500). The trace of the matrix root is computed as
    the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), a symmetric matrix.
    """
    values, vectors = torch.linalg.eigh(a.cov)
    root_a = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ b.cov @ root_a).clamp(min=0.0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2.0 * cross
    return max(float(distance), 0.0)
