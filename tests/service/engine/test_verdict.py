from __future__ import annotations

import numpy as np
import pytest

from model_store.bundle import Bundle
from model_store.session import GateOutputs
from service.engine.verdict import BrokenOutput, judge_outputs


def _outputs(score: float, confidence: float = 0.5, embedding: float = 0.1) -> GateOutputs:
    return GateOutputs(
        np.full((1, 24), embedding, np.float32), np.full((1, 4), confidence, np.float32), np.array([score], np.float32)
    )


def _verdict(bundle: Bundle, score: float, max_fpr: float = 0.01, confidence: float = 0.5):  # type: ignore[no-untyped-def]
    return judge_outputs(_outputs(score, confidence), bundle.manifest, max_fpr)[0].verdict


def test_the_most_suspicious_score_is_flagged_and_the_median_is_not(bundle: Bundle) -> None:
    scores = bundle.manifest.calibration.scores
    above = _verdict(bundle, scores[-1] + 1)
    assert above.flagged
    assert above.p_value == pytest.approx(1 / (len(scores) + 1))
    middle = _verdict(bundle, scores[len(scores) // 2])
    assert not middle.flagged
    assert middle.p_value == pytest.approx(0.5, abs=0.01)


def test_the_budget_is_kept_on_clean_images_and_its_edge_is_flagged(bundle: Bundle) -> None:
    calibration = bundle.manifest.calibration
    for budget in (0.01, 0.05, 0.2):
        flagged = [_verdict(bundle, score, budget).flagged for score in calibration.scores]
        assert budget - 2 / calibration.n <= np.mean(flagged) <= budget
    edge = _verdict(bundle, calibration.scores[-20])
    assert _verdict(bundle, calibration.scores[-20], edge.p_value).flagged
    assert not _verdict(bundle, calibration.scores[-20], edge.p_value * 0.999).flagged


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_flagged(bundle: Bundle, score: float) -> None:
    verdict = _verdict(bundle, score, 0.001)
    assert verdict.flagged
    assert verdict.p_value == bundle.manifest.calibration.smallest_budget


def test_a_confidence_that_is_not_finite_is_flagged(bundle: Bundle) -> None:
    assert _verdict(bundle, bundle.manifest.calibration.scores[0], confidence=np.nan).flagged


def test_an_embedding_that_is_not_finite_is_not_given_out(bundle: Bundle) -> None:
    with pytest.raises(BrokenOutput):
        judge_outputs(_outputs(0, embedding=np.nan), bundle.manifest, 0.01)


def test_confidences_are_named_in_the_manifests_order(bundle: Bundle) -> None:
    outputs = GateOutputs(
        np.zeros((1, 24), np.float32), np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), np.zeros(1, np.float32)
    )
    verdict = judge_outputs(outputs, bundle.manifest, 0.01)[0].verdict
    assert verdict.confidence == pytest.approx({"victim": 0.1, "auxiliary": 0.2, "clean": 0.3, "tripwire": 0.4})
