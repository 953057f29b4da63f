from __future__ import annotations

import numpy as np

from hardening.measure.changes import honest_changes
from model_store.pixels import PixelRule
from tests.support.patterns import patterns

RULE = PixelRule(height=32, width=32)


def test_every_change_changes_something_and_keeps_shape_and_picture() -> None:
    images = patterns(3, 32)[0]
    for name, changed in honest_changes(images, 0, RULE).items():
        assert changed.shape == images.shape, name
        assert changed.dtype == np.uint8, name
        assert 0.2 < np.abs(changed.astype(int) - images).mean() < 60, name


def test_the_same_seed_makes_the_same_noise() -> None:
    images = np.full((1, 32, 32, 3), 100, np.uint8)
    first, second = (honest_changes(images, 3, RULE)["noise, sigma 8"] for _ in range(2))
    assert (first == second).all()
    assert (honest_changes(images, 4, RULE)["noise, sigma 8"] != first).any()


def test_a_small_picture_is_changed_before_it_is_enlarged() -> None:
    small = list(patterns(2, 16)[0])
    for name, changed in honest_changes(small, 0, RULE).items():
        assert changed.shape == (len(small), 32, 32, 3), name
    fine = np.diff(honest_changes([np.full((16, 16, 3), 100, np.uint8)], 0, RULE)["noise, sigma 8"].astype(float), axis=2)
    coarse = np.diff(honest_changes([np.full((32, 32, 3), 100, np.uint8)], 0, RULE)["noise, sigma 8"].astype(float), axis=2)
    assert np.abs(fine).mean() < 0.7 * np.abs(coarse).mean()
