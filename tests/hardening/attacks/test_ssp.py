from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from hardening.attacks.features import apply_universal
from hardening.attacks.pap import NoConvolutions, convolutions
from hardening.attacks.ssp import ssp
from hardening.encoders import Encoder, features
from tests.hardening.conftest import QuietBars
from tests.support.patterns import patterns

Images = NDArray[np.uint8]
Delta = NDArray[np.float32]


@pytest.fixture(scope="module")
def images() -> Images:
    return patterns(10, seed=3)[0]


@pytest.fixture(scope="module")
def surrogate() -> Images:
    return patterns(10, seed=9)[0]


def attack(encoder: nn.Module, surrogate: Images, iterations: int = 10, *, epsilon: float = 8, seed: int = 0) -> Delta:
    return ssp(encoder, surrogate, epsilon=epsilon, iterations=iterations, seed=seed, device="cpu", bars=QuietBars())


def shift(encoder: Encoder, images: Images, delta: Delta) -> float:
    attacked = apply_universal(images, delta)
    return float(1 - F.cosine_similarity(features(encoder, images), features(encoder, attacked)).mean())


@pytest.mark.parametrize("epsilon", [2, 10])
def test_it_is_one_perturbation_within_the_budget(
    toy_encoder: Encoder, surrogate: Images, images: Images, epsilon: float
) -> None:
    delta = attack(toy_encoder, surrogate, epsilon=epsilon)
    assert delta.dtype == np.float32
    assert delta.shape == images.shape[1:]
    assert np.abs(delta).max() == epsilon
    assert np.abs(apply_universal(images, delta).astype(int) - images).max() == epsilon


def test_it_moves_features_further_than_noise(toy_encoder: Encoder, surrogate: Images, images: Images) -> None:
    signs = [np.random.default_rng(seed).choice([-8.0, 8.0], size=(16, 16, 3)).astype(np.float32) for seed in range(5)]
    by_noise = max(shift(toy_encoder, images, delta) for delta in signs)
    assert shift(toy_encoder, images, attack(toy_encoder, surrogate)) > 5 * by_noise


def test_more_iterations_are_never_much_weaker(toy_encoder: Encoder, surrogate: Images, images: Images) -> None:
    moved = [shift(toy_encoder, images, attack(toy_encoder, surrogate, iterations)) for iterations in (0, 1, 5, 30)]
    assert moved[1] > 2 * moved[0]
    assert all(later >= 0.9 * earlier for earlier, later in itertools.pairwise(moved))
    assert moved[3] > moved[1]


def test_it_is_seeded(toy_encoder: Encoder, surrogate: Images) -> None:
    first, again, other = (attack(toy_encoder, surrogate, 3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_it_leaves_the_encoder_alone(toy_encoder: Encoder, surrogate: Images) -> None:
    before = {name: value.clone() for name, value in toy_encoder.state_dict().items()}
    attack(toy_encoder, surrogate, 2)
    assert all(p.grad is None for p in toy_encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in toy_encoder.state_dict().items())
    assert not any(layer._forward_hooks for layer in convolutions(toy_encoder))


def test_what_lies_behind_the_middle_has_no_part_in_it(toy_encoder: Encoder, surrogate: Images) -> None:
    found = attack(toy_encoder, surrogate, 3)
    layers = convolutions(toy_encoder)
    with torch.no_grad():
        layers[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(attack(toy_encoder, surrogate, 3), found)
    with torch.no_grad():
        layers[len(layers) // 2].weight.normal_(generator=torch.Generator().manual_seed(0))
    assert (attack(toy_encoder, surrogate, 3) != found).any()


def test_an_encoder_without_convolutions_is_refused(surrogate: Images) -> None:
    with pytest.raises(NoConvolutions, match="Flatten has no convolutions"):
        attack(nn.Flatten(), surrogate)
