from __future__ import annotations

import numpy as np
from PIL import Image

from hardening.honest import KINDS, changed_at_random, noisy
from tests.support.patterns import patterns


def test_every_kind_changes_a_picture_and_leaves_it_that_picture() -> None:
    images = patterns(KINDS, 32)[0]
    found = changed_at_random(images, 0)
    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    difference = np.abs(found.astype(float) - images).mean((1, 2, 3)).reshape(-1, KINDS)
    assert (difference.mean(0) > 0.2).all(), difference.mean(0)
    for before, after in zip(images, found, strict=True):
        others = np.abs(images.astype(float) - after).mean((1, 2, 3))
        assert np.abs(after.astype(float) - before).mean() <= np.median(others)


def test_a_seed_draws_the_same_changes_again_and_another_one_others() -> None:
    images = patterns(2 * KINDS, 32)[0]
    first = changed_at_random(images, 0)
    assert np.array_equal(first, changed_at_random(images, 0))
    assert not np.array_equal(first, changed_at_random(images, 1))


def test_noise_is_weak_as_often_as_strong() -> None:
    image, rng = Image.fromarray(np.full((16, 16, 3), 128, np.uint8)), np.random.default_rng(0)
    deviation = np.array([np.asarray(noisy(image, rng)).std() for _ in range(60)])
    assert (deviation < 2).sum() >= 20
    assert (deviation > 2).sum() >= 20
