from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from hardening.attacks.features import pgd_features
from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE, Head, Standard
from hardening.detectors.baselines import (
    READINGS,
    Beyond,
    BranchDivergence,
    Mahalanobis,
    Neighbours,
    PaperReading,
    Scores,
    Squeezing,
    fewer_bits,
    median_filter,
)
from hardening.encoders import Encoder, features
from tests.hardening.conftest import QuietBars
from tests.support.patterns import patterns

CLASSES, DIM = 3, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identity_heads() -> dict[str, Head]:
    """Logits are the first three features."""
    weight = torch.eye(CLASSES, DIM)
    return {name: Head(Standard(torch.zeros(DIM), torch.ones(DIM)), weight, torch.zeros(CLASSES)) for name in BRANCHES}


def found(n: int, seed: int, *, attacked: bool = False) -> tuple[dict[str, Tensor], np.ndarray]:
    """Branches that agree on a class, BMP most certain; in attacked images MPAE is certain, of something else than BMP."""
    labels = torch.randint(CLASSES, (n,), generator=generator(seed))
    one_hot = F.one_hot(labels, DIM).float()
    values = {}
    for number, name in enumerate((*BRANCHES, TRIPWIRE)):
        size = 4.0 if name == BMP else 2.5
        values[name] = size * one_hot + torch.randn(n, DIM, generator=generator(100 * seed + number))
    if attacked:
        for name in MPAE:
            values[name] = values[name] + 3 * one_hot
        values[BMP] = values[BMP].roll(1, dims=1) / 2
        values[TRIPWIRE] = values[TRIPWIRE] + 4 * torch.randn(n, DIM, generator=generator(seed + 7))
    return values, labels.numpy()


def auroc(clean: Scores, attacked: Scores) -> float:
    truth = np.repeat([0, 1], [len(clean), len(attacked)])
    return float(roc_auc_score(truth, np.concatenate([clean, attacked])))


def test_each_separates_what_is_obviously_shifted() -> None:
    known, labels = found(200, 1)
    clean, attacked = found(150, 2)[0], found(150, 3, attacked=True)[0]
    detectors = [
        *(PaperReading(reading).fit(known, identity_heads()) for reading in READINGS),  # type: ignore[arg-type]
        BranchDivergence().fit(known, identity_heads()),
        Mahalanobis().fit(known),
        Mahalanobis().fit(known, labels),
        Neighbours().fit(known),
    ]
    for detector in detectors:
        scores = detector.score(clean), detector.score(attacked)
        assert scores[0].shape == (150,)
        assert auroc(*scores) > 0.6, detector.name


def test_readings_of_the_paper_by_hand() -> None:
    values, _ = found(6, 4)
    heads = identity_heads()
    scores = {reading: PaperReading(reading).fit(values, heads).score(values) for reading in READINGS}  # type: ignore[arg-type]
    divergence = BranchDivergence().fit(values, heads).score(values)
    for image in range(6):
        p = [[float(v) for v in values[name][image, :CLASSES].double().softmax(dim=0)] for name in BRANCHES]
        m = [max(row) for row in p]
        c = [v * math.exp(3 * (v - 0.5)) for v in m]
        w = [v / sum(c) for v in c]
        said = [row.index(max(row)) for row in p]

        def entropy(row: list[float]) -> float:
            return -sum(v * math.log(v) for v in row)

        def mixed(*rows: list[float]) -> list[float]:
            return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

        robust = mixed(p[0], p[1])
        expected = {
            "S1": (m[0] + m[1]) / 2 - m[2],
            "S2": max(m[0], m[1]) - m[2],
            "S3": math.log((c[0] + c[1]) / 2) - math.log(c[2]),
            "S4": (w[0] + w[1]) / 2 - w[2],
            "S5": float(said[0] == said[1] != said[2]),
            "S5 soft": entropy(mixed(robust, p[2])) - (entropy(robust) + entropy(p[2])) / 2,
        }
        for reading, value in expected.items():
            assert scores[reading][image] == pytest.approx(value, abs=1e-5), reading
        assert divergence[image] == pytest.approx(entropy(mixed(*p)) - sum(map(entropy, p)) / 3, abs=1e-5)


def test_mahalanobis_by_hand() -> None:
    known, labels = found(60, 5)
    fresh = found(4, 6)[0]
    scores = Mahalanobis().fit(known, labels).score(fresh)
    x = known[TRIPWIRE].double().numpy()
    means = {label: x[labels == label].mean(axis=0) for label in set(labels.tolist())}
    residuals = np.array([row - means[label] for row, label in zip(x, labels.tolist(), strict=True)])
    inverse = np.linalg.inv(ledoit_wolf(residuals, assume_centered=True)[0])
    for image, row in enumerate(fresh[TRIPWIRE].double().numpy()):
        assert scores[image] == pytest.approx(min((row - m) @ inverse @ (row - m) for m in means.values()), rel=1e-4)


def test_more_channels_than_images_are_no_trouble() -> None:
    wide = {TRIPWIRE: torch.randn(20, 50, generator=generator(0))}
    assert np.isfinite(Mahalanobis().fit(wide).score(wide)).all()
    assert np.isfinite(Neighbours(k=30).fit(wide).score(wide)).all()


def test_the_distance_of_neighbours_by_hand() -> None:
    known, fresh = found(30, 7)[0], found(3, 8)[0]
    scores = Neighbours(k=5).fit(known).score(fresh)
    gallery = known[TRIPWIRE].double().numpy()
    centre = gallery.mean(axis=0)
    unit = [(row - centre) / np.linalg.norm(row - centre) for row in gallery]
    for image, row in enumerate(fresh[TRIPWIRE].double().numpy()):
        own = (row - centre) / np.linalg.norm(row - centre)
        assert scores[image] == pytest.approx(sorted(float(np.linalg.norm(own - other)) for other in unit)[4], abs=1e-4)


def test_squeezers_by_hand() -> None:
    images = np.array([0, 3, 5, 128, 250, 255], np.uint8).reshape(1, 2, 3, 1)
    expected = [round(round(v / 255 * 31) / 31 * 255) for v in images.ravel().tolist()]
    assert fewer_bits(images).ravel().tolist() == expected
    assert len(np.unique(fewer_bits(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)))) == 32
    picture = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    for n, r, c, k in np.ndindex(*picture.shape):
        rows, columns = (max(r - 1, 0), r), (max(c - 1, 0), c)
        assert median_filter(picture)[n, r, c, k] == sorted(picture[n, i, j, k] for i in rows for j in columns)[2]


def test_squeezing_takes_the_larger_change_of_the_softmax() -> None:
    images = patterns(2, seed=1)[0]

    def logits(pixels: np.ndarray) -> Tensor:
        values = torch.as_tensor(pixels).float().flatten(1)
        return torch.stack([values.mean(dim=1), values[:, 7], values.std(dim=1)], dim=1) / 20

    scores = Squeezing(logits).fit(images).score(images)
    plain, *others = (logits(x).softmax(dim=1) for x in (images, fewer_bits(images), median_filter(images)))
    for image in range(len(images)):
        changes = [float((other[image] - plain[image]).abs().sum()) for other in others]
        assert scores[image] == pytest.approx(max(changes), abs=1e-6)


def test_squeezing_sees_fine_noise(toy_encoder: Encoder) -> None:
    images, labels = patterns(12, seed=3)
    with torch.no_grad():
        known = features(toy_encoder, images)
    weights = torch.linalg.lstsq(known - known.mean(dim=0), F.one_hot(torch.as_tensor(labels), 4).float()).solution

    @torch.no_grad()
    def logits(pixels: np.ndarray) -> Tensor:
        return 5 * (features(toy_encoder, pixels) - known.mean(dim=0)) @ weights

    smooth = np.repeat(np.repeat(images[:, ::4, ::4], 4, axis=1), 4, axis=2)
    noise = np.random.default_rng(0).choice([-40, 40], images.shape)
    noisy = np.clip(smooth.astype(int) + noise, 0, 255).astype(np.uint8)
    detector = Squeezing(logits).fit(images)
    assert auroc(detector.score(smooth), detector.score(noisy)) > 0.6


def steps_of(factors: list[float]) -> tuple[list[Tensor], object]:
    """An augmentation that scales by each factor in turn."""
    seen: list[Tensor] = []

    def augment(images: Tensor) -> Tensor:
        seen.append(images)
        return images * factors[(len(seen) - 1) % len(factors)]

    return seen, augment


def test_beyond_by_hand() -> None:
    """Features: mean of the left and of the right half; the class is the brighter half."""
    forwards = 0

    def encode(pixels: np.ndarray) -> Tensor:
        nonlocal forwards
        forwards += len(pixels)
        x = torch.as_tensor(pixels).double()
        return torch.stack([x[:, :, :2].mean(dim=(1, 2, 3)), x[:, :, 2:].mean(dim=(1, 2, 3))], dim=1) - 100

    factors = [1.0, 0.8, 0.5, 0.2]
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[:, :, :2], images[:, :, 2:] = 200, 160
    _, augment = steps_of(factors)
    detector = Beyond(encode, lambda f: f * torch.tensor([1.0, -1.0]), neighbours=4, k=3, augment=augment)  # type: ignore[arg-type]
    consistency, similarity = detector.figures(images)
    assert forwards == 1 + 4
    own = np.array([100.0, 60.0])
    others = [np.array([round(200 * f) - 100.0, round(160 * f) - 100.0]) for f in factors]

    def says(feature: np.ndarray) -> bool:
        return bool(feature[0] >= -feature[1])

    assert consistency[0] == pytest.approx(np.mean([says(other) == says(own) for other in others]))
    cosines = sorted((float(own @ o / np.linalg.norm(own) / np.linalg.norm(o)) for o in others), reverse=True)
    assert similarity[0] == pytest.approx(cosines[2], abs=1e-6)


def test_beyonds_score_is_the_rarer_of_the_two() -> None:
    detector = Beyond(lambda x: torch.zeros(1), lambda x: x)
    figures = {"clean": (np.array([0.2, 0.6, 0.8, 1.0]), np.array([0.1, 0.5, 0.7, 0.9]))}
    figures["fresh"] = (np.array([1.0, 0.5, 0.7]), np.array([0.95, 0.8, 0.05]))
    detector.figures = lambda images: figures[images]  # type: ignore[assignment, method-assign, index]
    scores = detector.fit("clean").score("fresh")  # type: ignore[arg-type]
    assert scores.tolist() == pytest.approx([0.0, -math.log(2 / 5), -math.log(1 / 5)])
    assert all(a < b for a, b in pairwise(scores))


def test_beyond_tells_attacked_from_clean_and_judges_an_image_alone(toy_encoder: Encoder) -> None:
    @torch.no_grad()
    def encode(pixels: np.ndarray) -> Tensor:
        return features(toy_encoder, pixels)

    images, labels = patterns(10, seed=3)
    known = encode(images)
    weights = torch.linalg.lstsq(known, F.one_hot(torch.as_tensor(labels), 4).float()).solution

    def augment(pictures: Tensor) -> Tensor:
        """The toy's classes are places and textures, which crops and flips would change: noise does not."""
        return (pictures + 0.06 * torch.randn(pictures.shape[1:])).clamp(0, 1)

    detector = Beyond(encode, lambda f: f @ weights, neighbours=8, k=4, augment=augment).fit(images)
    fresh = patterns(5, seed=4)[0]
    odd = pgd_features(toy_encoder, fresh, epsilon=6, steps=6, restarts=1, seed=0, device="cpu", bars=QuietBars())
    scores = detector.score(fresh)
    assert auroc(scores, detector.score(odd)) > 0.6
    np.testing.assert_allclose(detector.score(fresh[3:4]), scores[3:4], atol=1e-5)


def test_beyonds_own_augmentations_keep_size_and_range(toy_encoder: Encoder) -> None:
    images = patterns(2, seed=3)[0]
    shapes = set()

    @torch.no_grad()
    def encode(pixels: np.ndarray) -> Tensor:
        shapes.add((pixels.shape, pixels.dtype))
        return features(toy_encoder, pixels)

    before = torch.random.get_rng_state()
    one, again = (Beyond(encode, lambda f: f, neighbours=6, k=3).figures(images) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert shapes == {(images.shape, images.dtype)}
    np.testing.assert_array_equal(one, again)
    assert len(np.unique(one[1])) == len(images)
