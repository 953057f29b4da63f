from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from hardening.calibrate import Calibrated
from hardening.data import Dataset
from hardening.export import ParityError, check_parity, export, golden, made_up_images
from model_store.graph import check_self_contained
from model_store.pixels import PixelRule
from tests.conftest import REPOSITORY
from tests.support.patterns import patterns

OUTPUTS = ["embedding", "confidence", "score"]


@pytest.fixture(scope="module")
def model(toy_calibrated: Calibrated, toy_dataset: Dataset) -> bytes:
    return export(copy.deepcopy(toy_calibrated.gate), toy_dataset.take("fit")[0][:2])


@pytest.fixture(scope="module")
def session(model: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def images(toy_dataset: Dataset) -> NDArray[np.uint8]:
    return toy_dataset.take("test")[0]


@pytest.mark.parametrize("size", [1, 7, 33])
def test_it_answers_like_torch_at_every_batch_size(
    toy_calibrated: Calibrated, session: ort.InferenceSession, images: NDArray[np.uint8], size: int
) -> None:
    with torch.no_grad():
        expected = [output.numpy() for output in toy_calibrated.gate(torch.from_numpy(images[:size]))]
    found = session.run(OUTPUTS, {"images": images[:size]})
    assert [f.shape for f in found] == [(size, 408), (size, 4), (size,)]
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-3)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-3)


def test_parity_is_measured_and_refused_beyond_the_tolerance(
    toy_calibrated: Calibrated, model: bytes, images: NDArray[np.uint8]
) -> None:
    worst = check_parity(toy_calibrated.gate, model, images[:7])
    assert 0 <= worst["embedding"] <= 1e-4
    other = copy.deepcopy(toy_calibrated.gate)
    with torch.no_grad():
        next(p for p in other.views.encoders["bmp"].parameters() if p.dim() == 4).mul_(1.01)
    with pytest.raises(ParityError, match="differs from torch"):
        check_parity(other, model, images[:7])
    with torch.no_grad():
        next(p for p in other.views.encoders["bmp"].parameters() if p.dim() == 4).fill_(torch.nan)
    with pytest.raises(ParityError, match="differs from torch"):
        check_parity(other, model, images[:7])


def test_neighbours_in_a_batch_do_not_change_an_answer(session: ort.InferenceSession, images: NDArray[np.uint8]) -> None:
    alone = session.run(OUTPUTS, {"images": images[4:5]})
    for neighbours in (patterns(4, seed=77)[0], np.full((16, 16, 16, 3), 255, np.uint8)):
        batch = neighbours.copy()
        batch[9] = images[4]
        for one, among, tolerance in zip(alone, session.run(OUTPUTS, {"images": batch}), (1e-5, 1e-3, 1e-3), strict=True):
            np.testing.assert_allclose(among[9], one[0], rtol=0, atol=tolerance)


def test_the_contract_of_the_graph(model: bytes, session: ort.InferenceSession) -> None:
    check_self_contained(model)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [16, 16, 3])
    assert isinstance(given.shape[0], str)
    assert [output.name for output in session.get_outputs()] == OUTPUTS
    content = onnx.load_from_string(model)
    assert not content.functions
    assert {node.domain for node in content.graph.node} <= {"", "ai.onnx"}


def test_nothing_of_this_machine_is_inside(model: bytes) -> None:
    for path in (REPOSITORY, Path.home(), Path.cwd(), Path(torch.__file__).parent):
        # The root folder alone is a slash, which proves nothing.
        if len(path.parts) > 1:
            assert str(path).encode() not in model
    assert b".py" not in model
    assert b"hardening" not in model


def test_weights_are_stored_in_8_bits(model: bytes, toy_calibrated: Calibrated) -> None:
    stored = [
        tensor for tensor in onnx.load_from_string(model).graph.initializer if tensor.data_type == onnx.TensorProto.INT8
    ]
    large = [p for p in toy_calibrated.gate.parameters() if p.dim() > 1 and p.numel() >= 4096]
    assert len(stored) == len(large) > 0


def test_the_golden_vector_is_what_the_graph_answers(model: bytes, session: ort.InferenceSession) -> None:
    pictures, *expected = golden(model, PixelRule(height=16, width=16)).arrays()
    np.testing.assert_array_equal(pictures, made_up_images(16, 16))
    for want, got in zip(expected, session.run(OUTPUTS, {"images": pictures}), strict=True):
        np.testing.assert_allclose(want, got, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40)])
def test_made_up_images_are_pictures_and_always_the_same(height: int, width: int) -> None:
    first = made_up_images(height, width)
    assert first.shape == (3, height, width, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, made_up_images(height, width))
    assert all(picture.std() > 20 for picture in first)
