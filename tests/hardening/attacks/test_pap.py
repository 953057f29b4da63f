from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.features import apply_universal
from hardening.attacks.pap import NoConvolutions, activations, convolutions, pap
from hardening.encoders import Encoder, as_input, features, fold_batch_norm
from model_store.errors import TwogateError
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import patterns

Images = NDArray[np.uint8]
Delta = NDArray[np.float32]
Variant = Literal["base", "fuse", "ugs"]
VARIANTS: tuple[Variant, ...] = ("base", "fuse", "ugs")


@pytest.fixture(scope="module")
def images() -> Images:
    return patterns(10, seed=3)[0]


@pytest.fixture(scope="module")
def surrogate() -> Images:
    return patterns(10, seed=9)[0]


def attack(
    encoder: nn.Module,
    surrogate: Images,
    variant: Variant = "base",
    iterations: int = 10,
    *,
    epsilon: float = 8,
    seed: int = 0,
) -> Delta:
    return pap(
        encoder,
        surrogate,
        variant=variant,
        epsilon=epsilon,
        iterations=iterations,
        seed=seed,
        device="cpu",
        bars=QuietBars(),
    )


def signs(seed: int) -> Delta:
    return np.random.default_rng(seed).choice([-8.0, 8.0], size=(16, 16, 3)).astype(np.float32)


def shift(encoder: Encoder, images: Images, delta: Delta) -> float:
    attacked = apply_universal(images, delta)
    return float(1 - F.cosine_similarity(features(encoder, images), features(encoder, attacked)).mean())


@torch.no_grad()
def energy(encoder: Encoder, x: Tensor, delta: Delta) -> float:
    """Mean square of the first convolution's output."""
    moved = (x + torch.from_numpy(delta).permute(2, 0, 1) / 255).clamp(0, 1)
    return float(activations(encoder, convolutions(encoder)[:1], moved)[0].square().mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("epsilon", [2, 10])
def test_it_is_one_perturbation_within_the_budget(
    toy_encoder: Encoder, surrogate: Images, images: Images, variant: Variant, epsilon: float
) -> None:
    delta = attack(toy_encoder, surrogate, variant, epsilon=epsilon)
    assert delta.dtype == np.float32
    assert delta.shape == images.shape[1:]
    assert np.abs(delta).max() == epsilon
    assert np.abs(apply_universal(images, delta).astype(int) - images).max() == epsilon


@pytest.mark.parametrize("variant", ["base", "fuse"])
def test_it_moves_features_further_than_noise(
    toy_encoder: Encoder, surrogate: Images, images: Images, variant: Variant
) -> None:
    by_noise = max(shift(toy_encoder, images, signs(seed)) for seed in range(5))
    assert shift(toy_encoder, images, attack(toy_encoder, surrogate, variant)) > 5 * by_noise


def test_ugs_inflates_the_low_layer_on_noise_of_another_colour(toy_encoder: Encoder, surrogate: Images) -> None:
    noise = 0.5 + 0.08 * torch.randn((16, 3, 16, 16), generator=torch.Generator().manual_seed(5))
    clean = energy(toy_encoder, noise, np.zeros((16, 16, 3), np.float32))
    by_signs = max(energy(toy_encoder, noise, signs(seed)) for seed in range(5))
    # Long enough for steps so small that no single colour of the noise decides.
    by_attack = energy(toy_encoder, noise, attack(toy_encoder, surrogate, "ugs", 1000))
    assert by_attack - clean > 1.4 * (by_signs - clean)


def test_more_iterations_are_never_weaker(toy_encoder: Encoder, surrogate: Images, images: Images) -> None:
    x = as_input(images)
    clean = energy(toy_encoder, x, np.zeros((16, 16, 3), np.float32))
    gained = [
        energy(toy_encoder, x, attack(toy_encoder, surrogate, iterations=iterations)) - clean for iterations in (0, 2, 10, 40)
    ]
    assert gained[1] > 2 * gained[0]
    assert all(later >= 0.98 * earlier for earlier, later in itertools.pairwise(gained))


def test_variants_differ_and_are_seeded(toy_encoder: Encoder, surrogate: Images) -> None:
    found = {variant: attack(toy_encoder, surrogate, variant) for variant in VARIANTS}
    for variant, delta in found.items():
        np.testing.assert_array_equal(delta, attack(toy_encoder, surrogate, variant))
        assert (delta != attack(toy_encoder, surrogate, variant, seed=1)).any()
    for one, other in itertools.combinations(found.values(), 2):
        assert (one != other).any()


def test_it_leaves_the_encoder_alone(toy_encoder: Encoder, surrogate: Images) -> None:
    before = {name: value.clone() for name, value in toy_encoder.state_dict().items()}
    for variant in VARIANTS:
        attack(toy_encoder, surrogate, variant, 2)
    assert all(p.grad is None for p in toy_encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in toy_encoder.state_dict().items())
    assert not any(layer._forward_hooks for layer in convolutions(toy_encoder))


def test_an_interrupted_attack_leaves_no_hook(toy_encoder: Encoder, surrogate: Images) -> None:
    with pytest.raises(Interrupted):
        pap(
            toy_encoder,
            surrogate,
            variant="fuse",
            epsilon=8,
            iterations=5,
            seed=0,
            device="cpu",
            bars=InterruptingBars(after=2),
        )
    assert toy_encoder(as_input(surrogate[:2])).shape == (2, toy_encoder.dim)


def test_an_encoder_folded_for_training_is_attacked_too(toy_encoder: Encoder, surrogate: Images, images: Images) -> None:
    assert fold_batch_norm(toy_encoder, as_input(images))
    by_noise = max(shift(toy_encoder, images, signs(seed)) for seed in range(3))
    assert shift(toy_encoder, images, attack(toy_encoder, surrogate, "fuse")) > 2 * by_noise


class Pooled(nn.Module):
    """An encoder with one convolution and no dimension of its own to tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean((2, 3))  # type: ignore[no-any-return]


def test_one_convolution_is_enough_for_every_variant(surrogate: Images) -> None:
    for variant in VARIANTS:
        assert np.abs(attack(Pooled(), surrogate, variant)).max() == 8


def test_an_encoder_without_convolutions_is_refused(surrogate: Images) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(NoConvolutions, match="Sequential has no convolutions") as caught:
        attack(flat, surrogate)
    assert isinstance(caught.value, TwogateError)


def test_activations_are_those_of_the_whole_encoder(toy_encoder: Encoder, images: Images) -> None:
    layers = convolutions(toy_encoder)
    x = as_input(images[:2])
    expected = layers[0]((x - toy_encoder.mean) / toy_encoder.std)
    calls: list[nn.Module] = []
    handle = layers[-1].register_forward_hook(lambda layer, *_: calls.append(layer))
    first, third = activations(toy_encoder, [layers[0], layers[2]], x)
    handle.remove()
    assert torch.equal(first, expected)
    assert third.shape[1] == layers[2].out_channels
    assert not calls  # what lies behind the last layer is not computed
