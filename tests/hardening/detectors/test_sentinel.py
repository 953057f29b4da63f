from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hardening.branches import BMP, SENTINEL, TRIPWIRE
from hardening.detectors import ConsistencyDetector, SentinelDetector
from tests.hardening.detectors.test_consistency import clean_features


def features(n: int, seed: int) -> dict[str, Tensor]:
    """Those of clean pictures, about whose logits a sentinel that is often wrong has an opinion of its own."""
    logits = 3 * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed + 1000)) - 4
    return {**clean_features(n, seed), SENTINEL: logits}


@pytest.fixture(scope="module")
def detector() -> SentinelDetector:
    return SentinelDetector.fit(features(1000, 1))


def test_p_values_of_fresh_clean_features_are_about_uniform(detector: SentinelDetector) -> None:
    p = torch.exp(-detector.minus_log_p(detector.evidence(features(2000, 2))))
    assert p.shape == (2000, 5)
    for share in (0.05, 0.1, 0.25, 0.5, 0.75):
        slack = 4 * math.sqrt(share * (1 - share) * (1 / 2000 + 1 / 1000)) + 0.01
        assert (((p <= share).float().mean(0) - share).abs() < slack).all(), share


def test_its_alarm_raises_the_score_and_speaks_against_no_branch(detector: SentinelDetector) -> None:
    found = features(300, 3)
    before, quiet = detector(found)
    after, loud = detector({**found, SENTINEL: found[SENTINEL] + 20})
    column = detector.branches.index(SENTINEL)
    assert before[:, column].median() > 0.3
    assert after[:, column].median() < 0.01
    assert loud.median() > quiet.median() + 2
    others = [number for number in range(len(detector.branches)) if number != column]
    assert torch.equal(before[:, others], after[:, others])


def test_a_high_logit_that_clean_pictures_have_too_is_no_alarm() -> None:
    """Only its rank among clean ones counts, not the network's own threshold."""
    shifted = {**features(1000, 1), SENTINEL: features(1000, 1)[SENTINEL] + 50}
    fresh = {**features(300, 3), SENTINEL: features(300, 3)[SENTINEL] + 50}
    confidence, _ = SentinelDetector.fit(shifted)(fresh)
    assert confidence[:, SentinelDetector.branches.index(SENTINEL)].median() == pytest.approx(0.5, abs=0.1)


def test_each_voice_has_its_share_of_the_false_alarms(detector: SentinelDetector) -> None:
    found, shares = features(200, 4), {TRIPWIRE: 0.85, BMP: 0.1, SENTINEL: 0.05}
    surprise = detector.minus_log_p(detector.evidence(found))
    voices = [surprise[:, detector.branches.index(name)] + math.log(share) for name, share in shares.items()]
    assert torch.allclose(detector(found)[1], torch.stack(voices, dim=1).amax(dim=1))
    assert detector.parameters_for_people()["scored"] == shares


def test_the_others_say_what_they_say_without_it(detector: SentinelDetector) -> None:
    alone = ConsistencyDetector.fit(clean_features(1000, 1))
    confidence, _ = alone(clean_features(200, 5))
    assert torch.allclose(detector(features(200, 5))[0][:, :4], confidence, atol=1e-5)
