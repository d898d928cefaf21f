"""A classifier of handwritten digits that has seen only real ones: the judge of generated samples."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

Array = NDArray[np.floating]


def fit(features: Array, labels: NDArray[np.integer]) -> SVC:
    """Return a support vector classifier of 8x8 digits, ``features`` ``[n, 64]`` in 0..1."""
    return SVC(kernel="rbf", C=10.0, gamma="scale").fit(features, labels)


def held_out_accuracy() -> float:
    """Return the share of held-out real digits (a quarter) that a classifier fitted on the others reads correctly."""
    data = load_digits()
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        data.data / 16, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    return float(fit(seen, seen_labels).score(unseen, unseen_labels))


@cache
def classifier() -> SVC:
    """Return the classifier fitted on all real digits."""
    data = load_digits()
    return fit(data.data / 16, data.target)


def pool(images: Array) -> Array:
    """Return ``images`` (``[n, 32, 32, 3]``, 0..1) as features ``[n, 64]``: the mean of each 4x4 pixels."""
    return images.mean(axis=-1).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64)


def read(images: Array) -> NDArray[np.integer]:
    """Return the digit ``[n]`` that the classifier reads in each of ``images`` (``[n, 32, 32, 3]``, 0..1)."""
    return classifier().predict(pool(images))
