from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from model_store.bundle import Bundle
from model_store.calibration import BudgetTooSmall
from model_store.errors import BundleError
from model_store.session import GateSession
from service.engine.local import LocalGate, ProviderError
from tests.support.tiny_bundle import make_tiny_bundle, smooth_images


def test_it_answers_as_the_plain_session_does(bundle: Bundle, photo: bytes, noise: NDArray[np.uint8]) -> None:
    gate = LocalGate(bundle, 0.01, 1)
    pictures = [gate.decode(photo), noise]
    clean, noisy = gate.judge(pictures)
    expected = GateSession(bundle).run(np.stack(pictures))
    np.testing.assert_allclose(clean.embedding, expected.embedding[0], atol=1e-6)
    np.testing.assert_allclose(noisy.embedding, expected.embedding[1], atol=1e-6)
    assert clean.verdict.score == pytest.approx(float(expected.score[0]), abs=1e-6)
    assert (clean.verdict.flagged, noisy.verdict.flagged) == (False, True)
    assert gate.judge([]) == []


def test_neighbours_never_change_an_embedding(bundle: Bundle) -> None:
    gate = LocalGate(bundle)
    pictures = smooth_images(8, 32, seed=5)
    together = gate.judge(pictures)
    for picture, answer in zip(pictures, together, strict=True):
        alone = gate.judge([picture])[0]
        assert np.abs(alone.embedding - answer.embedding).max() <= 1e-5
        assert alone.verdict.flagged == answer.verdict.flagged


def test_open_finds_the_newest_version(tiny_bundle: Path) -> None:
    assert LocalGate.open(tiny_bundle.parents[1], "tiny").label == "tiny/1"


def test_a_budget_that_the_calibration_cannot_support_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BudgetTooSmall, match="needs at least 9999 calibration images"):
        LocalGate(bundle, 0.0001)


def test_a_graph_that_answers_otherwise_than_promised_is_refused(tmp_path: Path) -> None:
    from tests.support.tiny_bundle import tiny_graph

    other = make_tiny_bundle(tmp_path, model=tiny_graph(32, seed=1).SerializeToString())
    with pytest.raises(BundleError, match="golden"):
        LocalGate.open(other.parents[1], "tiny")


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine can do it")
def test_a_provider_that_cannot_be_had_is_refused_unless_fallback_is_allowed(bundle: Bundle) -> None:
    with pytest.raises(ProviderError, match="allow_fallback"):
        LocalGate(bundle, provider="cuda")
    assert LocalGate(bundle, provider="cuda", allow_fallback=True).provider == "CPUExecutionProvider"
