from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hardening.compact import _pack, round_weights, store_int8


def test_weights_lie_on_a_grid_of_8_bits_per_channel() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 24, 3)
    with torch.no_grad():
        layer.weight[3] *= 100
        layer.weight[4] = 0
    before = layer.weight.detach().clone()
    round_weights(nn.Sequential(layer))
    after = layer.weight.detach()
    assert not torch.equal(before, after)
    for channel in range(24):
        scale = before[channel].abs().max() / 127
        # Half a step at most; a large channel does not coarsen its neighbours.
        assert (after[channel] - before[channel]).abs().max() <= scale / 2 + 1e-9
        steps = after[channel] / scale.clamp_min(1e-12)
        assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_rounding_twice_is_rounding_once() -> None:
    layer = nn.Linear(100, 60)
    round_weights(layer)
    once = layer.weight.detach().clone()
    round_weights(layer)
    assert torch.allclose(layer.weight, once, rtol=1e-6, atol=0)


def test_small_tensors_and_biases_are_untouched() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10), nn.Linear(64, 64))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    round_weights(module)
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["3.weight"]


def graph(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """y = x @ a @ b + c."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", weights["a"].shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", weights["b"].shape[1]])
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("MatMul", ["xa", "b"], ["xab"]),
        helper.make_node("Add", ["xab", "c"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )


def test_storing_in_8_bits_changes_the_size_and_not_the_answer() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(256, 128), nn.Linear(128, 64)
    round_weights(first)
    round_weights(second)
    weights = {
        "a": np.ascontiguousarray(first.weight.detach().numpy().T),  # channels in the second axis, as exporters do
        "b": second.weight.detach().numpy().T.copy(),
        "c": np.linspace(0, 1, 64, dtype=np.float32),
    }
    plain = graph(weights)
    packed = graph(weights)
    assert store_int8(packed) == 2
    onnx.checker.check_model(packed, full_check=True)
    before, after = plain.SerializeToString(), packed.SerializeToString()
    assert len(after) < 0.3 * len(before)
    stored = {tensor.name: tensor.data_type for tensor in packed.graph.initializer}
    assert stored["a.int8"] == stored["b.int8"] == TensorProto.INT8
    assert stored["c"] == TensorProto.FLOAT
    x = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    answers = [
        ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0] for model in (before, after)
    ]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-6 * np.abs(answers[0]).max())


def test_the_round_trip_is_exact() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 24, 3)
    round_weights(layer)
    array = layer.weight.detach().numpy()
    found = _pack(array)
    assert found is not None
    integers, scale = found
    assert integers.dtype == np.int8
    assert scale.shape == (24, 1, 1, 1)
    np.testing.assert_allclose(integers * scale, array, atol=1e-6, rtol=0)


def test_what_lies_on_no_grid_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    assert _pack(rng.normal(size=(64, 64)).astype(np.float32)) is None
    assert _pack(np.ones((10, 10), np.float32)) is None
    weights = {"a": rng.normal(size=(80, 80)).astype(np.float32), "b": rng.normal(size=(80, 80)).astype(np.float32)}
    model = graph({**weights, "c": np.zeros(80, np.float32)})
    before = model.SerializeToString()
    assert store_int8(model) == 0
    assert model.SerializeToString() == before
