from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from hardening.attacks.features import apply_universal, pgd_features, to_uint8, uap_features
from hardening.encoders import Encoder, as_input, features
from tests.hardening.conftest import QuietBars
from tests.support.patterns import patterns

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def images() -> Images:
    return patterns(10, seed=3)[0]


def shift(encoder: Encoder, images: Images, attacked: Images) -> NDArray[np.float64]:
    clean, other = features(encoder, images), features(encoder, attacked)
    return np.asarray(1 - F.cosine_similarity(clean, other).numpy(), dtype=np.float64)


def largest(images: Images, attacked: Images) -> int:
    return int(np.abs(images.astype(int) - attacked).max())


def attack(
    encoder: Encoder, images: Images, epsilon: float = 8, *, steps: int = 5, restarts: int = 1, seed: int = 0
) -> Images:
    return pgd_features(
        encoder, images, epsilon=epsilon, steps=steps, restarts=restarts, seed=seed, device="cpu", bars=QuietBars()
    )


def universal(encoder: Encoder, images: Images, epsilon: float, epochs: int = 3) -> NDArray[np.float32]:
    return uap_features(encoder, images, epsilon=epsilon, epochs=epochs, seed=0, device="cpu", bars=QuietBars())


def test_a_larger_budget_moves_features_further(toy_encoder: Encoder, images: Images) -> None:
    moved = []
    for epsilon in (1, 3, 10):
        attacked = attack(toy_encoder, images, epsilon)
        assert attacked.dtype == np.uint8
        assert largest(images, attacked) == epsilon
        moved.append(shift(toy_encoder, images, attacked).mean())
    assert moved[0] * 1.5 < moved[1]
    assert moved[1] * 1.5 < moved[2]


def test_an_attack_is_worse_than_noise(toy_encoder: Encoder, images: Images) -> None:
    signs = np.random.default_rng(0).choice([-8.0, 8.0], size=images.shape)
    noisy = np.clip(images + signs, 0, 255).astype(np.uint8)
    by_noise = shift(toy_encoder, images, noisy).mean()
    assert shift(toy_encoder, images, attack(toy_encoder, images)).mean() > 3 * by_noise
    one_for_all = apply_universal(images, universal(toy_encoder, patterns(16, seed=9)[0], 8))
    assert largest(images, one_for_all) <= 8
    assert shift(toy_encoder, images, one_for_all).mean() > 1.5 * by_noise


def test_more_restarts_keep_the_worst_for_each_image(toy_encoder: Encoder, images: Images) -> None:
    one = shift(toy_encoder, images, attack(toy_encoder, images, steps=2, restarts=1))
    four = shift(toy_encoder, images, attack(toy_encoder, images, steps=2, restarts=4))
    # The first of the four is the one; rounding to 8 bits may cost a little.
    assert (four[:32] >= one[:32] - 0.02).all()
    assert four[:32].mean() > one[:32].mean()


def test_attacks_are_seeded(toy_encoder: Encoder, images: Images) -> None:
    first, again, other = (attack(toy_encoder, images[:4], steps=2, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(universal(toy_encoder, images, 8, 1), universal(toy_encoder, images, 8, 1))


def test_attacks_leave_the_weights_alone(toy_encoder: Encoder, images: Images) -> None:
    before = {name: value.clone() for name, value in toy_encoder.state_dict().items()}
    attack(toy_encoder, images[:4], steps=2)
    universal(toy_encoder, images[:4], 8, 1)
    assert all(p.grad is None for p in toy_encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in toy_encoder.state_dict().items())


def test_a_universal_perturbation_is_one_within_the_budget(toy_encoder: Encoder, images: Images) -> None:
    weak, strong = (universal(toy_encoder, images, epsilon) for epsilon in (2, 10))
    assert weak.shape == images.shape[1:]
    assert np.abs(weak).max() <= 2 + 1e-4
    assert 2 < np.abs(strong).max() <= 10 + 1e-4
    moved = [shift(toy_encoder, images, apply_universal(images, delta)).mean() for delta in (weak, strong)]
    assert moved[0] < moved[1]


def test_applying_clips_and_rounds() -> None:
    images = np.array([0, 3, 250, 255], np.uint8).reshape(1, 2, 2, 1)
    delta = np.array([-10, 1.4, 9.6, 10], np.float32).reshape(2, 2, 1)
    assert apply_universal(images, delta).ravel().tolist() == [0, 4, 255, 255]


def test_a_file_stores_what_the_tensor_holds(images: Images) -> None:
    np.testing.assert_array_equal(to_uint8(as_input(images)), images)
