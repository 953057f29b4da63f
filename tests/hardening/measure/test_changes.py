from __future__ import annotations

import numpy as np

from hardening.measure.changes import honest_changes
from tests.support.patterns import patterns


def test_every_change_changes_something_and_keeps_shape_and_picture() -> None:
    images = patterns(3, 32)[0]
    for name, changed in honest_changes(images, 0).items():
        assert changed.shape == images.shape, name
        assert changed.dtype == np.uint8, name
        assert 0.2 < np.abs(changed.astype(int) - images).mean() < 60, name


def test_the_same_seed_makes_the_same_noise() -> None:
    images = np.full((1, 32, 32, 3), 100, np.uint8)
    first, second = (honest_changes(images, 3)["noise, sigma 8"] for _ in range(2))
    assert (first == second).all()
    assert (honest_changes(images, 4)["noise, sigma 8"] != first).any()
