from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hardening.attacks.pgd import pgd
from hardening.encoders import Encoder, as_input
from tests.support.patterns import patterns

EPSILON = 8 / 255


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(encoder: Encoder, images: Tensor, steps: int, *, epsilon: float = EPSILON, seed: int = 0) -> Tensor:
    step_size = epsilon * min(1.25, 2.5 / max(steps, 1))
    return pgd(
        images, Distance(encoder, images), epsilon=epsilon, steps=steps, step_size=step_size, generator=generator(seed)
    )


class Distance:
    """1 - cos between an encoder's features and those of the clean images."""

    def __init__(self, encoder: Encoder, clean: Tensor) -> None:
        self.encoder = encoder
        with torch.no_grad():
            self.clean = encoder(clean)

    def __call__(self, x: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(self.encoder(x), self.clean)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return as_input(patterns(4, seed=3)[0])


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_it_stays_in_the_ball_and_in_the_range_of_pixels(toy_encoder: Encoder, steps: int) -> None:
    edges = torch.rand(8, 3, 16, 16, generator=generator()).round()  # every value at an end of the range
    found = run(toy_encoder, edges, steps)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - edges).abs().max() <= EPSILON + 1e-6
    assert not found.requires_grad


def test_weights_keep_no_gradient(toy_encoder: Encoder, images: Tensor) -> None:
    run(toy_encoder, images, 3)
    assert all(p.grad is None for p in toy_encoder.parameters())
    for p in toy_encoder.parameters():
        p.grad = torch.ones_like(p)
    run(toy_encoder, images, 3)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in toy_encoder.parameters())


def test_more_steps_are_never_weaker(toy_encoder: Encoder, images: Tensor) -> None:
    loss = Distance(toy_encoder, images)
    strength = [loss(run(toy_encoder, images, steps)).mean().item() for steps in (0, 1, 3, 10, 30)]
    assert strength[1] > 2 * strength[0]
    assert all(later >= 0.98 * earlier for earlier, later in itertools.pairwise(strength))
    assert strength[-1] > 1.1 * strength[1]


def test_it_finds_the_corner_of_a_linear_loss() -> None:
    weights = torch.randn(2, 3, 4, 4, generator=generator())
    images = torch.full((2, 3, 4, 4), 0.5)
    found = pgd(
        images,
        lambda x: (x * weights).sum((1, 2, 3)),
        epsilon=0.1,
        steps=5,
        step_size=0.05,
        generator=generator(),
    )
    assert torch.allclose(found, images + 0.1 * weights.sign(), atol=1e-6)


def test_an_images_gradient_does_not_depend_on_its_batch() -> None:
    seen: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        x.register_hook(seen.append)  # type: ignore[no-untyped-call]
        return x.square().sum((1, 2, 3))

    images = torch.rand(4, 3, 4, 4, generator=generator())
    for batch in (images, images[:1]):
        pgd(batch, loss, epsilon=0.1, steps=1, step_size=0.1, generator=generator())
    assert torch.equal(seen[0][:1], seen[1])


def test_neighbours_in_the_batch_do_not_change_an_attack(toy_encoder: Encoder, images: Tensor) -> None:
    together = run(toy_encoder, images, 1)
    alone = run(toy_encoder, images[:1], 1)
    assert (together[:1] - alone).abs().mean() < 1e-3


def test_the_start_is_random_and_seeded(toy_encoder: Encoder, images: Tensor) -> None:
    first, again, other = (run(toy_encoder, images, 0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Uniform over the ball, not its corners and not its middle.
    assert (first - images).abs().mean() == pytest.approx(EPSILON / 2, rel=0.1)
