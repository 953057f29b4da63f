from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from hardening.attacks.targeted import targeted_features
from hardening.encoders import Encoder, features
from tests.hardening.conftest import QuietBars
from tests.support.patterns import patterns

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def images() -> Images:
    return patterns(10, seed=3)[0]


@pytest.fixture(scope="module")
def targets() -> Images:
    """Of another class each."""
    return np.roll(patterns(10, seed=4)[0], 1, axis=0)


def attack(
    encoder: Encoder,
    images: Images,
    targets: Images,
    epsilon: float = 8,
    *,
    steps: int = 5,
    restarts: int = 1,
    seed: int = 0,
) -> Images:
    return targeted_features(
        encoder, images, targets, epsilon=epsilon, steps=steps, restarts=restarts, seed=seed, device="cpu", bars=QuietBars()
    )


def likeness(encoder: Encoder, images: Images, targets: Images) -> NDArray[np.float64]:
    found = F.cosine_similarity(features(encoder, images), features(encoder, targets))
    return np.asarray(found.numpy(), dtype=np.float64)


def test_images_come_nearer_to_their_own_targets(toy_encoder: Encoder, images: Images, targets: Images) -> None:
    attacked = attack(toy_encoder, images, targets)
    before, after = likeness(toy_encoder, images, targets), likeness(toy_encoder, attacked, targets)
    assert (after > before).all()
    signs = np.random.default_rng(0).choice([-8.0, 8.0], size=images.shape)
    noisy = np.clip(images + signs, 0, 255).astype(np.uint8)
    assert (after - before).mean() > 10 * np.abs(likeness(toy_encoder, noisy, targets) - before).mean()
    # Not to any target, but to theirs.
    assert after.mean() > likeness(toy_encoder, attacked, np.roll(targets, 1, axis=0)).mean() + 0.1


def test_a_larger_budget_comes_nearer(toy_encoder: Encoder, images: Images, targets: Images) -> None:
    reached = [likeness(toy_encoder, images, targets).mean()]
    for epsilon in (1, 3, 10):
        attacked = attack(toy_encoder, images, targets, epsilon)
        assert attacked.dtype == np.uint8
        assert np.abs(images.astype(int) - attacked).max() == epsilon
        reached.append(likeness(toy_encoder, attacked, targets).mean())
    assert all(later > earlier + 0.005 for earlier, later in itertools.pairwise(reached))


def test_more_steps_are_never_weaker(toy_encoder: Encoder, images: Images, targets: Images) -> None:
    reached = [
        likeness(toy_encoder, attack(toy_encoder, images, targets, steps=steps), targets).mean() for steps in (1, 5, 20)
    ]
    assert all(later >= earlier - 0.005 for earlier, later in itertools.pairwise(reached))
    assert reached[-1] > reached[0]


def test_more_restarts_keep_the_nearest_for_each_image(toy_encoder: Encoder, images: Images, targets: Images) -> None:
    one, four = (
        likeness(toy_encoder, attack(toy_encoder, images, targets, steps=2, restarts=restarts), targets)
        for restarts in (1, 4)
    )
    # The first of the four is the one; rounding to 8 bits may cost a little. Later batches start from other noise.
    assert (four[:32] >= one[:32] - 0.01).all()
    assert four[:32].mean() > one[:32].mean()


def test_it_is_seeded(toy_encoder: Encoder, images: Images, targets: Images) -> None:
    first, again, other = (attack(toy_encoder, images[:4], targets[:4], steps=2, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_it_leaves_the_weights_alone(toy_encoder: Encoder, images: Images, targets: Images) -> None:
    before = {name: value.clone() for name, value in toy_encoder.state_dict().items()}
    attack(toy_encoder, images[:4], targets[:4], steps=2)
    assert all(p.grad is None for p in toy_encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in toy_encoder.state_dict().items())


def test_each_image_needs_a_target(toy_encoder: Encoder, images: Images, targets: Images) -> None:
    with pytest.raises(ValueError, match="one target of its size"):
        attack(toy_encoder, images, targets[:-1])
    with pytest.raises(ValueError, match="one target of its size"):
        attack(toy_encoder, images, targets[:, :8])
