from __future__ import annotations

import numpy as np
from PIL import Image

from model_store.honest import KINDS, changed_at_random, changed_each_way, noisy, to_be_changed
from model_store.pixels import PixelRule, to_input
from tests.support.patterns import patterns

RULE = PixelRule(height=32, width=32)


def test_every_kind_changes_a_picture_and_leaves_it_that_picture() -> None:
    images = patterns(len(KINDS), 32)[0]
    found = changed_at_random(images, 0)
    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    difference = np.abs(found.astype(float) - images).mean((1, 2, 3)).reshape(-1, len(KINDS))
    assert (difference.mean(0) > 0.2).all(), difference.mean(0)
    for before, after in zip(images, found, strict=True):
        others = np.abs(images.astype(float) - after).mean((1, 2, 3))
        assert np.abs(after.astype(float) - before).mean() <= np.median(others)


def test_a_seed_draws_the_same_changes_again_and_another_one_others() -> None:
    images = patterns(2 * len(KINDS), 32)[0]
    first = changed_at_random(images, 0)
    assert np.array_equal(first, changed_at_random(images, 0))
    assert not np.array_equal(first, changed_at_random(images, 1))


def test_noise_is_weak_as_often_as_strong() -> None:
    image, rng = Image.fromarray(np.full((16, 16, 3), 128, np.uint8)), np.random.default_rng(0)
    deviation = np.array([np.asarray(noisy(image, rng)).std() for _ in range(60)])
    assert (deviation < 2).sum() >= 20
    assert (deviation > 2).sum() >= 20


def test_each_way_changes_every_picture_by_every_kind() -> None:
    images = patterns(12, 32)[0]
    found = dict(changed_each_way(images, 0, RULE))
    assert tuple(found) == KINDS
    for name, changed in found.items():
        assert (changed.shape, changed.dtype) == (images.shape, np.uint8)
        assert (np.abs(changed.astype(float) - images).mean((1, 2, 3)) > 0).mean() > 0.8, name
        assert np.array_equal(changed, dict(changed_each_way(images, 0, RULE))[name])
    assert not np.array_equal(found["noise"], dict(changed_each_way(images, 1, RULE))["noise"])


def test_a_small_picture_is_changed_before_it_is_enlarged() -> None:
    """Noise of one pixel becomes noise of four."""
    small = np.full((8, 8, 3), 128, np.uint8)
    large = to_input(Image.fromarray(small), RULE)
    rough = {}
    for name, picture in (("small", small), ("large", large)):
        changed = dict(changed_each_way([picture] * 20, 0, RULE))["noise"].astype(float)
        assert changed.shape == (20, 32, 32, 3)
        rough[name] = np.abs(np.diff(changed, axis=2)).mean() / changed.std()
    assert rough["small"] < rough["large"] / 2


def test_half_of_the_images_are_changed_and_no_more_than_500() -> None:
    for n, count in ((1, 1), (19, 10), (99, 50), (999, 500), (1000, 500), (8000, 500)):
        chosen = to_be_changed(n)
        assert len(set(chosen)) == count
        assert (chosen[0], chosen[-1]) == (0, n - 1 if n > 1 else 0)
