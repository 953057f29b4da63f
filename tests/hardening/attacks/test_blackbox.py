from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from hardening.attacks.blackbox import Found, nes, square

Images = NDArray[np.uint8]
WEIGHTS = np.random.default_rng(1).standard_normal((3, 1, 3)).repeat(3, axis=0).repeat(9, axis=1)


class Service:
    """Loss of a linear model, at 1 for a clean image; notes each question."""

    def __init__(self, images: Images, scale: float = 1000.0) -> None:
        self.clean = self._value(images)
        self.scale = scale
        self.asked = np.zeros(len(images), np.int64)
        self.calls: list[tuple[Images, NDArray[np.float64], NDArray[np.intp]]] = []

    def _value(self, images: Images) -> NDArray[np.float64]:
        return np.asarray((images.astype(np.float64) * WEIGHTS).sum(axis=(1, 2, 3)))

    def __call__(self, images: Images, which: NDArray[np.intp]) -> NDArray[np.float64]:
        assert images.dtype == np.uint8
        np.add.at(self.asked, which, 1)
        loss = 1 - (self._value(images) - self.clean[which]) / self.scale
        self.calls.append((images.copy(), loss, which.copy()))
        return np.asarray(loss)


@pytest.fixture
def images() -> Images:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 9, 3)).astype(np.uint8)


def test_square_stays_in_the_ball_and_lowers_the_loss(images: Images) -> None:
    service = Service(images, 1e9)
    found = square(service, images, epsilon=8.9, queries=150, seed=0)
    assert np.abs(found.images.astype(int) - images).max() == 8
    assert (found.loss < 1).all()
    np.testing.assert_allclose(found.loss, Service.__call__(service, found.images, np.arange(6)))
    # All questions too are pictures within the budget.
    assert max(np.abs(asked.astype(int) - images[which]).max() for asked, _, which in service.calls) <= 8


@pytest.mark.parametrize("attack", [square, nes])
def test_queries_are_counted_and_bounded(images: Images, attack: type) -> None:
    service = Service(images, 1e9)
    found = attack(service, images, epsilon=8, queries=50, seed=0)
    np.testing.assert_array_equal(found.queries, service.asked)
    assert found.queries.max() <= 50
    assert found.queries.min() >= (50 if attack is square else 40)


@pytest.mark.parametrize("attack", [square, nes])
def test_an_image_is_left_alone_once_broken(images: Images, attack: type) -> None:
    service = Service(images, 400.0)
    found: Found = attack(service, images, epsilon=64, queries=400, seed=0)
    assert (found.loss <= 0).all()
    assert found.queries.max() < 400
    broken: set[int] = set()
    for asked, loss, which in service.calls:
        assert attack is nes or not broken.intersection(which.tolist())
        kept = [(images == found.images[i]).all() for images, i in zip(asked, which, strict=True)]
        broken.update(which[(loss <= 0) & np.array(kept)].tolist())
    assert len(broken) == len(images)


def test_an_image_that_is_wrong_already_costs_one_query(images: Images) -> None:
    found = square(lambda pixels, _: np.full(len(pixels), -1.0), images, epsilon=8, queries=100, seed=0)
    assert found.queries.tolist() == [1] * 6
    np.testing.assert_array_equal(found.images, images)


def test_more_queries_are_never_worse_and_a_wider_ball_breaks_all(images: Images) -> None:
    service = Service(images)
    losses = [square(service, images, epsilon=64, queries=queries, seed=0).loss.mean() for queries in (1, 2, 30, 300)]
    assert losses[0] == 1
    assert losses == sorted(losses, reverse=True)
    assert (square(service, images, epsilon=64, queries=1000, seed=0).loss <= 0).all()


def test_more_queries_of_nes_are_worse_on_no_image(images: Images) -> None:
    losses = [nes(Service(images, 1e9), images, epsilon=8, queries=queries, seed=0).loss for queries in (1, 50, 200, 400)]
    # Fewer queries are the beginning of more, and the lowest loss is kept.
    assert all((more <= fewer).all() for fewer, more in itertools.pairwise(losses))
    assert (losses[3] < losses[0]).all()


def test_nes_stays_in_the_ball_and_follows_the_gradient(images: Images) -> None:
    service = Service(images, 1e9)
    found = nes(service, images, epsilon=8, queries=400, seed=0)
    assert np.abs(found.images.astype(int) - images).max() <= 8
    one = np.clip(images + 8 * np.sign(WEIGHTS), 0, 255)
    best = ((one - images) * WEIGHTS).sum(axis=(1, 2, 3))
    reached = ((found.images.astype(float) - images) * WEIGHTS).sum(axis=(1, 2, 3))
    assert (reached > 0.25 * best).all()  # 19 steps by a rough gradient; chance alone gets nowhere


def test_attacks_are_seeded(images: Images) -> None:
    first, again, other = (square(Service(images), images, epsilon=8, queries=40, seed=s).images for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_no_queries_change_nothing(images: Images) -> None:
    found = square(Service(images), images, epsilon=8, queries=0, seed=0)
    np.testing.assert_array_equal(found.images, images)
    assert found.queries.sum() == 0
