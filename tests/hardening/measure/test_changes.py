from __future__ import annotations

import numpy as np

from hardening.measure.changes import honest_changes


def test_every_change_changes_something_and_keeps_the_shape() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for name, changed in honest_changes(images, 0).items():
        assert changed.shape == images.shape, name
        assert changed.dtype == np.uint8, name
        assert (changed != images).any(), name


def test_the_same_seed_makes_the_same_noise() -> None:
    images = np.full((1, 32, 32, 3), 100, np.uint8)
    first, second = (honest_changes(images, 3)["noise, sigma 8"] for _ in range(2))
    assert (first == second).all()
    assert (honest_changes(images, 4)["noise, sigma 8"] != first).any()
