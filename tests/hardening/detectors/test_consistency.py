from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hardening.branches import BMP, BRANCHES, EARLY, MPAE, TRIPWIRE
from hardening.detectors.consistency import BLUR, MIRROR, MOVE, ZOOM, ConsistencyDetector

DIM = 12
EVIDENCE, COLUMNS = 12, 4


def clean_features(n: int, seed: int) -> dict[str, Tensor]:
    """Four encoders that see the same hidden scene, each in its own way, and their changed views."""
    rng = torch.Generator().manual_seed(0)
    ways = {name: torch.randn(8, DIM, generator=rng) for name in (*BRANCHES, TRIPWIRE)}
    chance = torch.Generator().manual_seed(seed)
    scene = torch.randn(n, 8, generator=chance)
    found = {name: scene @ way + 0.3 * torch.randn(n, DIM, generator=chance) for name, way in ways.items()}
    # Early stages see less of the scene.
    found |= {name + EARLY: scene @ way[:, :5] + torch.randn(n, 5, generator=chance) for name, way in ways.items()}
    for name in (TRIPWIRE, BMP):
        for view in (name, name + EARLY):
            for how in (BLUR, ZOOM, MOVE, MIRROR):
                found[view + how] = found[view] + 0.3 * torch.randn(found[view].shape, generator=chance)
    return found


@pytest.fixture(scope="module")
def detector() -> ConsistencyDetector:
    return ConsistencyDetector.fit(clean_features(1000, 1))


def test_p_values_of_fresh_clean_features_are_about_uniform(detector: ConsistencyDetector) -> None:
    surprise = detector.minus_log_p(detector.evidence(clean_features(2000, 2)))
    assert surprise.shape == (2000, COLUMNS)
    p = torch.exp(-surprise)
    for share in (0.05, 0.1, 0.25, 0.5, 0.75):
        below = (p <= share).float().mean(0)
        # Four standard errors of both samples, and a little for the interpolation.
        slack = 4 * math.sqrt(share * (1 - share) * (1 / 2000 + 1 / 1000)) + 0.01
        assert ((below - share).abs() < slack).all(), (share, below)


def test_it_is_monotone_and_has_no_ceiling(detector: ConsistencyDetector) -> None:
    start = detector.evidence(clean_features(1, 2))
    for column in range(EVIDENCE):
        evidence = start.repeat(2001, 1)
        evidence[:, column] = torch.linspace(0, 40, 2001)
        surprise = detector.minus_log_p(evidence)
        assert (surprise.diff(dim=0) >= 0).all()
        moved = surprise.diff(dim=0).abs().sum(dim=0) > 0
        assert moved.sum() == 1, "an evidence speaks against one branch"
        beyond = surprise[-500:, moved]
        assert (beyond.diff(dim=0) > 0).all()
        assert beyond[-1] > -math.log(0.01)


@pytest.mark.parametrize("view", [TRIPWIRE, BMP, *MPAE])
def test_a_branch_that_leaves_the_others_loses_confidence(detector: ConsistencyDetector, view: str) -> None:
    found = clean_features(300, 3)
    clean_confidence, clean_score = detector(found)
    moved = dict(found)
    for name in found:
        if name.startswith(view):
            moved[name] = found[name].flip(0)  # what it says of another image
    confidence, score = detector(moved)
    branch = detector.branches.index(view)
    assert clean_confidence[:, branch].median() > 0.3
    assert confidence[:, branch].median() < 0.05
    if view in (TRIPWIRE, BMP):
        assert score.median() > clean_score.median() + 2


def test_an_attack_that_only_early_stages_of_the_tripwire_see_is_seen(detector: ConsistencyDetector) -> None:
    found = clean_features(300, 3)
    confidence, before = detector(found)
    found[TRIPWIRE + EARLY] = found[TRIPWIRE + EARLY] + 3
    after, score = detector(found)
    column = detector.branches.index(TRIPWIRE)
    assert after[:, column].median() < 0.05 < confidence[:, column].median()
    assert score.median() > before.median() + 2


def test_encoders_without_early_stages_are_judged_by_their_features() -> None:
    def features(n: int, seed: int) -> dict[str, Tensor]:
        return {view: value for view, value in clean_features(n, seed).items() if EARLY not in view}

    detector = ConsistencyDetector.fit(features(500, 1))
    found = features(200, 2)
    _, before = detector(found)
    found[TRIPWIRE] = found[TRIPWIRE].flip(0)
    assert detector(found)[1].median() > before.median() + 2


@pytest.mark.parametrize("view", [TRIPWIRE, BMP])
def test_a_blur_that_changes_much_is_suspicious(detector: ConsistencyDetector, view: str) -> None:
    found = clean_features(300, 3)
    _, before = detector(found)
    found[view + BLUR] = found[view + BLUR].flip(0)
    confidence, after = detector(found)
    assert after.median() > before.median() + 2
    assert confidence[:, detector.branches.index(view)].median() < 0.05


def test_confidence_is_a_share_and_the_score_the_largest_surprise(detector: ConsistencyDetector) -> None:
    found = clean_features(200, 4)
    found[TRIPWIRE][:50] *= -3
    confidence, score = detector(found)
    assert confidence.shape == (200, 4)
    assert confidence.min() >= 0
    assert confidence.max() <= 1
    surprise = detector.minus_log_p(detector.evidence(found))
    assert torch.equal(confidence, torch.exp(-surprise))
    tripwire, bmp = (surprise[:, detector.branches.index(name)] for name in (TRIPWIRE, BMP))
    # Nine tenths of the false alarms are the tripwire's.
    assert torch.allclose(score, torch.maximum(tripwire + np.log(0.9), bmp + np.log(0.1)))


def test_many_small_signs_add_up(detector: ConsistencyDetector) -> None:
    """Each of the tripwire's four at a level that 5% of clean images exceed: seldom all at once."""
    evidence = detector.evidence(clean_features(4000, 6))
    usual = evidence.median(dim=0).values.expand(5, -1).clone()
    own = range(4)
    for row, column in enumerate(own):
        usual[[row, 4], column] = evidence[:, column].quantile(0.95)
    surprise = detector.minus_log_p(usual)[:, detector.branches.index(TRIPWIRE)]
    assert surprise[4] > -math.log(0.01)
    assert (surprise[:4] < -math.log(0.05)).all()


def test_a_small_push_where_clean_features_never_go_is_seen() -> None:
    """What whitening is for: the cosine does not notice it."""
    rng = torch.Generator().manual_seed(0)
    way, blind = torch.randn(8, DIM, generator=rng), torch.zeros(DIM)
    blind[0] = 1
    way[:, 0] = 0.2

    def features(n: int, seed: int) -> dict[str, Tensor]:
        chance = torch.Generator().manual_seed(seed)
        scene = torch.randn(n, 8, generator=chance)
        noise = torch.ones(DIM)
        noise[0] = 0.02
        found = {name: scene @ way + noise * torch.randn(n, DIM, generator=chance) for name in (*BRANCHES, TRIPWIRE)}
        for name in (TRIPWIRE, BMP):
            for view in (BLUR, ZOOM, MOVE, MIRROR):
                found[name + view] = found[name] + noise * torch.randn(n, DIM, generator=chance)
        return found

    detector, clean = ConsistencyDetector.fit(features(1500, 1)), features(400, 2)
    before = detector.evidence(clean)
    pushed = dict(clean) | {TRIPWIRE: clean[TRIPWIRE] + 0.15 * blind}
    after = detector.evidence(pushed)
    limit = before.quantile(0.95, dim=0)
    share = (after > limit).float().mean(dim=0)
    assert share[3] > 0.5, "whitened residual"
    assert share[0] < 0.2, "blur shift by its angle"


def test_a_plain_picture_that_shifts_like_a_busy_one_is_suspicious() -> None:
    """The tripwire's evidence counts beside what is usual for a picture that the MPAE branches see so."""

    def features(n: int, seed: int, busy: Tensor) -> dict[str, Tensor]:
        found = clean_features(n, seed)
        for name in MPAE:
            found[name][:, 0] = 3 * busy
        for part in ("", EARLY):
            for how in (BLUR, ZOOM, MOVE, MIRROR):
                shift = found[TRIPWIRE + part + how] - found[TRIPWIRE + part]
                found[TRIPWIRE + part + how] = found[TRIPWIRE + part] + shift * (1 + busy[:, None])
        return found

    busy = torch.rand(1500, generator=torch.Generator().manual_seed(7)) * 2
    detector = ConsistencyDetector.fit(features(1500, 1, busy))
    tripwire = detector.branches.index(TRIPWIRE)

    def surprise(busy_for_mpae: float, busy_for_tripwire: float) -> Tensor:
        found = features(400, 2, torch.full((400,), busy_for_tripwire))
        for name in MPAE:
            found[name][:, 0] = 3 * busy_for_mpae
        return detector.minus_log_p(detector.evidence(found))[:, tripwire].median()

    assert surprise(0.2, 1.8) > surprise(1.8, 1.8) + 0.4
    assert surprise(1.8, 1.8) < -math.log(0.2)


def test_an_image_is_judged_alone(detector: ConsistencyDetector) -> None:
    found = clean_features(20, 5)
    confidence, score = detector(found)
    alone_confidence, alone_score = detector({name: value[3:4] for name, value in found.items()})
    assert torch.allclose(alone_score, score[3:4], atol=1e-5)
    assert torch.allclose(alone_confidence, confidence[3:4], atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", ["constant", "tied", "constant branch"])
def test_features_that_do_not_differ_give_no_nan(kind: str) -> None:
    def flattened(found: dict[str, Tensor]) -> dict[str, Tensor]:
        if kind == "constant":
            return {name: torch.full_like(value, 0.7) for name, value in found.items()}
        if kind == "tied":
            rows = torch.arange(len(found[BMP])) % 3
            return {name: value[rows] for name, value in clean_features(3, 1).items()} | {}
        return {**found, BMP: torch.zeros_like(found[BMP]), BMP + BLUR: torch.zeros_like(found[BMP])}

    fitted = ConsistencyDetector.fit(flattened(clean_features(100, 1)))
    for found in (flattened(clean_features(50, 2)), clean_features(50, 3)):
        confidence, score = fitted(found)
        assert torch.isfinite(score).all()
        assert torch.isfinite(confidence).all()
        assert confidence.min() >= 0
        assert confidence.max() <= 1


def test_few_clean_images_promise_no_fine_levels() -> None:
    few = ConsistencyDetector.fit(clean_features(24, 1))
    confidence, score = few(clean_features(200, 2))
    assert torch.isfinite(score).all()
    assert few.parameters_for_people()["fitted_on"] == 24
    assert np.isfinite(confidence.numpy()).all()
