"""Attacks that see answers alone (T7, docs/measure.md): no weights and no gradients, only what a service returns.

The caller says what is to be lowered, built from whatever the service gives away: the score and the returned embedding, or no
more than the verdict. Images are uint8, as a client would upload them; epsilon is in 1/255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Query = Callable[[NDArray[np.uint8], NDArray[np.intp]], NDArray[np.floating]]
"""Images [M, H, W, 3], and which of the attacked images each is a version of [M] -> loss [M]; <= 0 is a success.

Images that were broken are not asked about again, so the caller needs the numbers to tell which is which."""

_SHRINKS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10 000 queries: where the square's area halves (Andriushchenko et al. 2020)."""


@dataclass(frozen=True)
class Found:
    """What came out, image by image."""

    images: NDArray[np.uint8]
    loss: NDArray[np.float64]
    """The lowest that was seen, that of `images`."""
    queries: NDArray[np.int64]


class _Counter:
    """Asks, counts and keeps the best; `left` are the images that are not broken and may still be asked about."""

    def __init__(self, query: Query, images: NDArray[np.uint8], budget: int) -> None:
        self._query, self._budget = query, budget
        self.best = images.copy()
        self.loss = np.full(len(images), np.inf)
        self.queries = np.zeros(len(images), np.int64)
        self.ask(images, np.arange(len(images))[: len(images) if budget else 0])

    def left(self, needed: int = 1) -> NDArray[np.intp]:
        return np.flatnonzero((self.loss > 0) & (self.queries + needed <= self._budget))

    def ask(self, images: NDArray[np.uint8], which: NDArray[np.intp], *, keep: bool = True) -> NDArray[np.float64]:
        if not len(which):
            return np.empty(0)
        loss = np.asarray(self._query(images, which), dtype=np.float64)
        np.add.at(self.queries, which, 1)
        if keep:
            lower = loss < self.loss[which]
            self.best[which[lower]], self.loss[which[lower]] = images[lower], loss[lower]
        return loss

    def found(self) -> Found:
        return Found(self.best, self.loss, self.queries)


def square(query: Query, images: NDArray[np.uint8], *, epsilon: float, queries: int, seed: int, share: float = 0.8) -> Found:
    """Square attack, L-infinity (Andriushchenko et al. 2020): try random squares of +-epsilon, keep what lowers the loss.

    At most `queries` an image, the clean image's own among them. `share` of the image is the first square's area.
    """
    rng = np.random.default_rng(seed)
    size = math.floor(epsilon)
    counter = _Counter(query, images, queries)
    height, width = images.shape[1:3]
    low, high = _ball(images, size)
    left = counter.left()
    stripes = rng.choice([-size, size], size=(len(images), 1, width, 3))
    counter.ask(_moved(images[left], stripes[left]), left)
    for number in range(2, queries):
        left = counter.left()
        if not len(left):
            break
        halvings = sum(number * 10_000 / queries > limit for limit in _SHRINKS)
        side = round(math.sqrt(share / 2**halvings * height * width))
        side = min(max(side, 1), height - 1 or 1, width - 1 or 1)
        candidates = counter.best[left].copy()
        for row, image in enumerate(left):
            top, start = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
            place = np.s_[top : top + side, start : start + side]
            signs = rng.choice([-size, size], size=3)
            candidates[row][place] = np.where(signs > 0, high[image][place], low[image][place])
        counter.ask(candidates, left)
    return counter.found()


def nes(
    query: Query,
    images: NDArray[np.uint8],
    *,
    epsilon: float,
    queries: int,
    seed: int,
    samples: int = 20,
    sigma: float = 2.0,
    step: float | None = None,
) -> Found:
    """Natural evolution strategies (Ilyas et al. 2018): a gradient from pairs of noisy images, then a step of its sign.

    `sigma` and `step` in 1/255; noise under one 8-bit value would be rounded away. Each step takes `samples` queries and one
    for the image that it leads to. The noisy images may leave the ball: they are questions, not results.
    """
    rng = np.random.default_rng(seed)
    counter = _Counter(query, images, queries)
    low, high = _ball(images, math.floor(epsilon))
    size = epsilon / 8 if step is None else step
    x = images.astype(np.float64)
    pairs = max(samples // 2, 1)
    while len(left := counter.left(2 * pairs + 1)):
        gradient = np.zeros_like(x[left])
        for _ in range(pairs):
            noise = rng.standard_normal(gradient.shape)
            above = counter.ask(_uint8(x[left] + sigma * noise), left, keep=False)
            below = counter.ask(_uint8(x[left] - sigma * noise), left, keep=False)
            gradient += (above - below)[:, None, None, None] * noise
        x[left] = np.clip(x[left] - size * np.sign(gradient), low[left], high[left])
        counter.ask(_uint8(x[left]), left)
    return counter.found()


def _ball(images: NDArray[np.uint8], size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return _moved(images, -size), _moved(images, size)


def _moved(images: NDArray[np.uint8], by: NDArray[np.int64] | int) -> NDArray[np.uint8]:
    return _uint8(images.astype(np.float64) + by)


def _uint8(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(np.rint(images), 0, 255), dtype=np.uint8)
