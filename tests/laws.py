"""Statistical tests of whether samples have a law. Each returns a p-value, which is uniform where they have it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _kolmogorov(distance: float, size: float) -> float:
    """P(sqrt(size) * D >= sqrt(size) * distance) of Kolmogorov's limit, with Stephens' correction for finite sizes."""
    root = math.sqrt(size)
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))))


def ks_normal(values: Tensor) -> float:
    """Kolmogorov-Smirnov: are these numbers from N(0, 1)?"""
    ordered = values.double().flatten().sort().values
    return _one(0.5 * (1 + torch.erf(ordered / math.sqrt(2))))


def ks_uniform(values: Tensor) -> float:
    """Kolmogorov-Smirnov: are these numbers uniform on 0 to 1?"""
    return _one(values.double().flatten().sort().values)


def _one(expected: Tensor) -> float:
    """Of one set: the distribution function at its ordered values."""
    steps = torch.arange(len(expected) + 1, dtype=torch.float64) / len(expected)
    distance = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
    return _kolmogorov(distance, len(expected))


def ks_two(one: Tensor, other: Tensor) -> float:
    """Kolmogorov-Smirnov: are these two sets of numbers from the same law?"""
    one, other = one.double().sort().values, other.double().sort().values
    both = torch.cat([one, other]).sort().values
    first, second = (torch.searchsorted(each, both, right=True) / len(each) for each in (one, other))
    return _kolmogorov(float((first - second).abs().max()), len(one) * len(other) / (len(one) + len(other)))


def projections(dimensions: int, count: int, seed: int = 0) -> Tensor:
    """Random directions, [dimensions, count]."""
    found = torch.randn(dimensions, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return found / found.norm(dim=0)


def ks_projected(one: Tensor, other: Tensor, count: int = 8) -> float:
    """The same for points [size, dimensions], along random directions; corrected for how many these are."""
    directions = projections(one.shape[1], count)
    pairs = zip((one.double() @ directions).T, (other.double() @ directions).T, strict=True)
    return min(1.0, count * min(ks_two(*pair) for pair in pairs))


def energy(one: Tensor, other: Tensor, count: int = 16, permutations: int = 199) -> float:
    """Energy distance of points [size, dimensions], by permutation: the mean over directions of the 1-D distances.

    Over all directions it is the energy distance itself, up to a factor (Szekely and Rizzo 2013).
    """
    points = torch.cat([one, other]).double() @ projections(one.shape[1], count)
    ordered, order = points.sort(dim=0)
    widths, size = ordered.diff(dim=0), len(one)
    generator = torch.Generator().manual_seed(1)

    def distance(labels: Tensor) -> float:
        """labels: [points], True for those of the first set."""
        first = labels[order].double().cumsum(0)[:-1]
        behind = torch.arange(1, len(points), dtype=torch.float64)[:, None]
        return float(((first / size - (behind - first) / len(other)).square() * widths).sum())

    labels = torch.zeros(len(points), dtype=torch.bool)
    labels[:size] = True
    found = distance(labels)
    shuffled = (labels[torch.randperm(len(labels), generator=generator)] for _ in range(permutations))
    return (1 + sum(distance(each) >= found for each in shuffled)) / (permutations + 1)


def paired(one: Tensor, other: Tensor, count: int = 32) -> float:
    """Are the means of cosines and sines of projections the same? For samples of the same noise, [size, dimensions].

    The samples of a pair are close, so that their difference shows far smaller biases than two sets of other noise.
    """
    directions = projections(one.shape[1], count, seed=2) * torch.linspace(0.5, 4.0, count, dtype=torch.float64)

    def features(points: Tensor) -> Tensor:
        angles = points.double() @ directions
        return torch.cat([angles.cos(), angles.sin(), points.double(), points.double().square()], 1)

    away = features(one) - features(other)
    scores = away.mean(0) / (away.std(0) / math.sqrt(len(away))).clamp(min=1e-300)
    return min(1.0, away.shape[1] * math.erfc(float(scores.abs().max()) / math.sqrt(2)))


def innovations(states: Tensor, means: Tensor, spreads: Tensor) -> Tensor:
    """The noise of each step of a path, [N, samples, dimensions], without steps that add none.

    states: [N + 1, samples, dimensions]; means: [N, samples, dimensions], where the sampler's steps lead without noise;
    spreads: [N]. A path has the sampler's law if and only if these are independent N(0, 1), also of the states before.
    """
    noisy = spreads > 0
    return ((states[1:] - means) / spreads[:, None, None].clamp(min=1e-300))[noisy]


def innovation_tests(found: Tensor, departs: Tensor) -> dict[str, float]:
    """p-values of what innovations must be. departs: the states that their steps depart from, of the same shape."""
    degrees = found[0].numel()
    square = found.flatten(1).square().sum(1)  # of each step
    before = torch.cat([torch.zeros_like(found[:1]), found[:-1]])

    def uncorrelated(known: Tensor) -> float:
        """With something that is known before the step."""
        known = known - known.mean()
        return _two_sided(float((found * known).sum() / known.norm()))

    return {
        "normal": ks_normal(found),
        "of the length of normal vectors": ks_chi(found.norm(dim=-1), found.shape[-1]),
        "zero in the mean": _two_sided(float(found.sum()) / math.sqrt(found.numel())),
        "of unit variance in every step": min(
            1.0, len(square) * _two_sided(float((square - degrees).abs().max()) / math.sqrt(2 * degrees))
        ),
        "independent of the state": uncorrelated(departs),
        "independent of the noise before": uncorrelated(before),
        "independent of the size of the noise before": uncorrelated(
            before.square().sum(-1, keepdim=True).expand_as(found)
        ),
    }


def _two_sided(score: float) -> float:
    return math.erfc(abs(score) / math.sqrt(2))


def ks_chi(lengths: Tensor, dimensions: int) -> float:
    """Kolmogorov-Smirnov: are these the lengths of standard normal vectors?"""
    ordered = lengths.double().flatten().sort().values
    half = torch.full_like(ordered, dimensions / 2)
    return _one(torch.special.gammainc(half, ordered.square() / 2))
