"""The graph in torch answers as ONNX Runtime does, and its gradients are those of what it computes."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE
from hardening.calibrate import Calibrated, assemble, calibrate
from hardening.data import Dataset
from hardening.encoders import Encoder, as_input, draw_key
from hardening.export import check_parity, export
from hardening.graph import Graph, GraphError, _Step, run_torch, run_uint8
from model_store.session import OUTPUTS
from tests.hardening.conftest import QuietBars
from tests.support.patterns import trained_encoder


@pytest.fixture(scope="module")
def pictures(toy_dataset: Dataset) -> NDArray[np.uint8]:
    return toy_dataset.take("test")[0][:9]


@pytest.fixture(scope="module")
def model(toy_calibrated: Calibrated, pictures: NDArray[np.uint8]) -> bytes:
    return export(copy.deepcopy(toy_calibrated.gate), pictures[:2])


def test_answers_as_onnx_runtime(model: bytes, pictures: NDArray[np.uint8]) -> None:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = session.run(list(OUTPUTS), {"images": pictures})
    found = run_torch(Graph(model), pictures, OUTPUTS, batch=3)
    for name, want in zip(OUTPUTS, expected, strict=True):
        np.testing.assert_allclose(found[name].numpy(), want, rtol=0, atol=1e-4 if name == "embedding" else 1e-3)


def test_is_measured_as_it_is_served(model: bytes, pictures: NDArray[np.uint8]) -> None:
    """Values from within the graph too, and those of a victim that it was shipped without; also of a copy."""
    graph = Graph(model)
    wanted = (*graph.feature_names.values(), *OUTPUTS)
    victim = graph.encoder(TRIPWIRE)
    for one, names in ((graph, wanted), (Graph(model, victim), (TRIPWIRE, "score")), (Graph(model, victim), (TRIPWIRE,))):
        expected = run_torch(one, pictures, names)
        for answering in (one, copy.deepcopy(one)):
            found = run_uint8(answering, pictures, names)
            assert found.keys() == set(names)
            for name in names:
                np.testing.assert_allclose(found[name].numpy(), expected[name].numpy(), rtol=0, atol=1e-3)


def test_what_no_later_step_reads_does_not_stay_in_memory(
    model: bytes, pictures: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 photographs once took 12.8 GB, nearly all of it for values that had been used up."""
    graph, made, most, call = Graph(model), [], [0], _Step.__call__

    def watched(step: _Step, arguments: list[Any]) -> Any:
        values = call(step, arguments)
        made.extend(weakref.ref(value) for value in values)
        most[0] = max(most[0], sum(value() is not None for value in made))
        return values

    monkeypatch.setattr(_Step, "__call__", watched)
    run_torch(graph, pictures[:2], OUTPUTS)
    assert most[0] < 0.25 * len(made)


def test_a_victim_that_was_not_tuned_is_its_own_tripwire(
    toy_dataset: Dataset, trained_toy: Encoder, pictures: NDArray[np.uint8]
) -> None:
    """The exporter merges what is the same, names too; `epochs: 0` in a recipe means this."""
    others = {"auxiliary": trained_encoder(seed=2), "bmp": trained_encoder(seed=3)}
    views = assemble(copy.deepcopy(trained_toy), {"victim": copy.deepcopy(trained_toy), **others}, pictures)
    gate = calibrate(views, toy_dataset, "consistency", "cpu", QuietBars()).gate
    graph = Graph(export(gate, pictures[:2]))
    found = graph.encoder(TRIPWIRE)(as_input(pictures))
    torch.testing.assert_close(found, graph.encoder(MPAE[0])(as_input(pictures)))


def test_a_keyed_branch_answers_as_onnx_runtime(toy_calibrated: Calibrated, pictures: NDArray[np.uint8]) -> None:
    gate = copy.deepcopy(toy_calibrated.gate)
    keyed = gate.views.encoders[BMP]
    assert isinstance(keyed, Encoder)
    keyed.key = draw_key()
    model = export(gate, pictures[:2])
    check_parity(gate, model, pictures)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (expected,) = session.run(["score"], {"images": pictures})
    found = run_torch(Graph(model), pictures, ("score",))["score"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
    plain = run_torch(Graph(export(copy.deepcopy(toy_calibrated.gate), pictures[:2])), pictures, ("score",))["score"]
    assert not np.allclose(found.numpy(), plain.numpy(), atol=1e-3)


def test_gradient_is_that_of_the_score(model: bytes, pictures: NDArray[np.uint8]) -> None:
    graph = Graph(model)
    x = as_input(pictures)
    # Of the most unusual ones: of the plainest the score is at its floor, which is flat.
    x = x[graph(x, ("score",))["score"].topk(2).indices].requires_grad_()
    (gradient,) = torch.autograd.grad(graph(x, ("score",))["score"].sum(), x)
    assert gradient.abs().sum() > 0
    direction = gradient / gradient.norm()
    step = 2e-3
    with torch.no_grad():
        up, down = (graph(x + sign * step * direction, ("score",))["score"].sum() for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.3)


def test_encoders_are_the_gates_own(model: bytes, toy_calibrated: Calibrated, pictures: NDArray[np.uint8]) -> None:
    graph = Graph(model)
    x = as_input(pictures)
    with torch.no_grad():
        expected = toy_calibrated.gate.views(x, (*BRANCHES, TRIPWIRE))
        for branch, features in expected.items():
            torch.testing.assert_close(graph.encoder(branch)(x), features, atol=1e-4, rtol=1e-3)


def test_an_encoder_holds_its_own_convolutions_only(model: bytes) -> None:
    graph = Graph(model)
    encoder = graph.encoder(TRIPWIRE)
    seen: list[object] = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    encoder(torch.zeros(1, 3, 16, 16))
    convolutions = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    assert 0 < len(set(seen)) == len(convolutions) < len(graph.convolutions)


def test_a_victim_from_outside_stands_in_for_the_tripwire(
    toy_calibrated: Calibrated, toy_dataset: Dataset, toy_encoder: Encoder, pictures: NDArray[np.uint8]
) -> None:
    """As with the paper's detector, whose graph has none."""
    paper = calibrate(toy_calibrated.gate.views, toy_dataset, "paper", "cpu", QuietBars())
    model = export(copy.deepcopy(paper.gate), pictures[:2])
    assert set(Graph(model).feature_names) == set(BRANCHES)
    graph = Graph(model, toy_encoder)
    assert graph.encoder(TRIPWIRE) is toy_encoder
    x = as_input(pictures).requires_grad_()
    found = graph(x, [graph.feature_names[TRIPWIRE], "score"])
    torch.testing.assert_close(found[TRIPWIRE], toy_encoder(x))
    torch.testing.assert_close(found["score"], Graph(model)(x, ["score"])["score"])


def test_a_trainable_copy_answers_alike_and_learns_alone(model: bytes, pictures: NDArray[np.uint8]) -> None:
    graph = Graph(model)
    x = as_input(pictures)
    copied = graph.encoder(TRIPWIRE).trainable()
    before = graph.encoder(TRIPWIRE)(x)
    torch.testing.assert_close(copied(x), before, atol=1e-5, rtol=1e-4)
    parameters = dict(copied.named_parameters())
    filters = [value for name, value in parameters.items() if name.endswith(".weight")]
    assert filters
    for weight in filters:
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.full((len(weight),), 2**0.5))
    optimiser = torch.optim.SGD(parameters.values(), lr=0.1)
    copied(x).square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in parameters.values())
    optimiser.step()
    assert (copied(x) - before).abs().max() > 1e-3
    assert torch.equal(graph.encoder(TRIPWIRE)(x), before)


def test_moving_a_graph_moves_its_constants(model: bytes) -> None:
    graph = Graph(model).double()
    assert {value.dtype for value in graph.constants.values() if value.is_floating_point()} == {torch.float64}
    assert any(value.dtype == torch.int64 for value in graph.constants.values())
    copied = Graph(model).encoder(TRIPWIRE).trainable().double()
    assert copied(torch.zeros(1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64


def test_unknown_operator_is_named() -> None:
    node = helper.make_node("NonZero", ["images"], ["score"])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [info("images", TensorProto.UINT8, None)], [info("score", TensorProto.INT64, None)]
    )
    with pytest.raises(GraphError, match="NonZero"):
        Graph(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 0)])
def test_max_pooling_answers_as_onnx_runtime(pads: tuple[int, ...]) -> None:
    """Networks with an ImageNet stem, ResNet-18 for one, have it."""
    attributes = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": pads}
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["planes"], perm=(0, 3, 1, 2)),
        helper.make_node("Neg", ["planes"], ["below zero"]),
        helper.make_node("MaxPool", ["below zero"], ["score"], **attributes),
    ]
    info = helper.make_tensor_value_info
    shape = [None, None, None, None]
    graph = helper.make_graph(
        nodes, "g", [info("images", TensorProto.UINT8, shape)], [info("score", TensorProto.FLOAT, shape)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 10, 3), dtype=np.uint8)
    (expected,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(["score"], {"images": images})
    np.testing.assert_allclose(run_torch(Graph(model), images, ("score",))["score"].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Erf", {}),
        ("Tanh", {}),
        ("HardSigmoid", {}),
        ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
        ("HardSwish", {}),
        ("LayerNormalization", {"axis": -1, "epsilon": 1e-6}),
        ("AveragePool", {"kernel_shape": (2, 2), "strides": (2, 2)}),
        ("AveragePool", {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
        ("AveragePool", {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "count_include_pad": 1}),
        ("AveragePool", {"kernel_shape": (2, 2), "strides": (2, 2), "ceil_mode": 1}),
        ("Where", {}),
    ],
)
def test_operators_of_other_families_answer_as_onnx_runtime(operator: str, attributes: dict[str, Any]) -> None:
    """On both sides of zero, and beyond where hard activations bend."""
    rng = np.random.default_rng(0)
    extra = {
        "LayerNormalization": [rng.normal(size=9).astype(np.float32), rng.normal(size=9).astype(np.float32)],
        "Where": [np.full((3, 1, 9), -2.0, np.float32)],
    }.get(operator, [])
    constants = [numpy_helper.from_array(value, f"c{n}") for n, value in enumerate(extra)]
    names = [constant.name for constant in constants]
    inputs = ["positive", "x", *names] if operator == "Where" else ["x", *names]
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["planes"], perm=(0, 3, 1, 2)),
        helper.make_node("Mul", ["planes", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["x"]),
        helper.make_node("Relu", ["x"], ["above"]),
        helper.make_node("Cast", ["above"], ["positive"], to=TensorProto.BOOL),
        helper.make_node(operator, inputs, ["score"], **attributes),
    ]
    constants += [numpy_helper.from_array(np.float32(v), n) for n, v in (("scale", 10 / 255), ("shift", -5.0))]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "operator",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ("N", 9, 9, 3))],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    pictures = rng.integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(["score"], {"images": pictures})
    found = Graph(model.SerializeToString())(as_input(pictures), ["score"])["score"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


def test_unknown_branch_says_what_there_is(model: bytes) -> None:
    with pytest.raises(GraphError, match="bmp"):
        Graph(model).encoder("nobody")


def test_constants_are_computed_once(model: bytes) -> None:
    kinds = {node.op_type for node in onnx.load_from_string(model).graph.node}
    assert "Conv" in kinds
    assert all(name not in step.outputs for step in Graph(model).steps for name in Graph(model).constants)
