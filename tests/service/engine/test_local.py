from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from model_store.bundle import Bundle, load_bundle
from model_store.calibration import BudgetTooSmall
from model_store.errors import BundleError
from model_store.session import GateSession
from service.engine.local import LocalGate, ProviderError
from tests.support.tiny_bundle import make_tiny_bundle, smooth_images
from tests.support.tiny_head import add_tiny_head, with_graph


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


def test_it_classifies_what_it_judged(tiny_bundle: Path, tmp_path: Path, noise: NDArray[np.uint8]) -> None:
    gate = LocalGate(load_bundle(add_tiny_head(tiny_bundle, tmp_path)), threads=1)
    judged = gate.judge([*smooth_images(4, 32, seed=5), noise])
    together = gate.classify("animals", judged)
    assert together.shape == (5, 3)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)
    for answer, row in zip(judged, together, strict=True):
        np.testing.assert_allclose(gate.classify("animals", [answer])[0], row, atol=1e-6)
    assert gate.classify("animals", []).shape == (0, 3)
    with pytest.raises(KeyError):
        gate.classify("plants", judged)


def test_a_confidence_that_is_no_number_still_gets_probabilities(tiny_bundle: Path, tmp_path: Path) -> None:
    gate = LocalGate(load_bundle(add_tiny_head(tiny_bundle, tmp_path)), threads=1)
    (judged,) = gate.judge(smooth_images(1, 32, seed=5))
    broken = replace(judged.verdict, confidence={name: float("nan") for name in judged.verdict.confidence})
    assert np.isfinite(gate.classify("animals", [replace(judged, verdict=broken)])).all()


def test_a_head_that_answers_no_probabilities_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    constant = helper.make_tensor("nan", TensorProto.FLOAT, [3], [float("nan")] * 3)
    nodes = [
        helper.make_node("Constant", [], ["nan"], value=constant),
        helper.make_node("ReduceSum", ["embedding"], ["all"], keepdims=1),
        helper.make_node("ReduceSum", ["confidence", "axis"], ["each"], keepdims=1),
        helper.make_node("Add", ["all", "each"], ["some"]),
        helper.make_node("Mul", ["some", "nan"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "task",
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 24]),
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["N", 4]),
        ],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    place = with_graph(bundle, tmp_path, model.SerializeToString())
    with pytest.raises(BundleError, match="no probabilities"):
        LocalGate(load_bundle(place))
