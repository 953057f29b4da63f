from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from model_store.errors import BundleError
from model_store.graph import check_self_contained
from tests.support.tiny_bundle import tiny_graph


def model_of(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = (), **more: object) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializers), **more)


def external(location: str = "weights.bin") -> TensorProto:
    tensor = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def inside_if(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = ()) -> onnx.NodeProto:
    y = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [4])
    branch = helper.make_graph(nodes, "branch", [], [y], initializers)
    return helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(BundleError) as refused:
        check_self_contained(model.SerializeToString())
    assert refused.value.file == "model.onnx"
    return refused.value.reason


ADD = helper.make_node("Add", ["x", "w"], ["y"])


def test_a_graph_with_its_weights_inside_passes() -> None:
    check_self_contained(tiny_graph().SerializeToString())
    weights = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    check_self_contained(model_of(ADD, initializers=(weights,)).SerializeToString())
    named = helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")
    check_self_contained(model_of(named).SerializeToString())
    check_self_contained(model_of(inside_if(helper.make_node("Relu", ["x"], ["inner"]))).SerializeToString())


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*"])
def test_weights_in_another_file_are_refused(location: str) -> None:
    assert "another file" in refusal(model_of(ADD, initializers=(external(location),)))


def test_either_sign_of_external_weights_is_enough() -> None:
    only_location = external()
    del only_location.external_data[:]
    only_entries = external()
    only_entries.ClearField("data_location")
    for tensor in (only_location, only_entries):
        assert "another file" in refusal(model_of(ADD, initializers=(tensor,)))


def test_external_weights_are_found_wherever_a_tensor_can_be() -> None:
    sparse = onnx.SparseTensorProto(values=external(), dims=[4])
    in_attribute = helper.make_node("Constant", [], ["y"], value=external())
    in_list = helper.make_node("Relu", ["x"], ["y"])
    in_list.attribute.append(onnx.AttributeProto(name="t", type=onnx.AttributeProto.TENSORS, tensors=[external()]))
    in_sparse_list = helper.make_node("Relu", ["x"], ["y"])
    in_sparse_list.attribute.append(
        onnx.AttributeProto(name="s", type=onnx.AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse])
    )
    in_graphs = helper.make_node("Relu", ["x"], ["y"])
    in_graphs.attribute.append(
        onnx.AttributeProto(name="g", type=onnx.AttributeProto.GRAPHS, graphs=[onnx.GraphProto(initializer=[external()])])
    )
    sparse_model = model_of(ADD)
    sparse_model.graph.sparse_initializer.append(sparse)
    training = model_of(ADD)
    training.training_info.add().initialization.initializer.append(external())
    for model in (
        model_of(in_attribute),
        model_of(helper.make_node("Constant", [], ["y"], sparse_value=sparse)),
        model_of(in_list),
        model_of(in_sparse_list),
        model_of(in_graphs),
        model_of(inside_if(ADD, initializers=(external(),))),
        model_of(inside_if(inside_if(in_attribute))),
        sparse_model,
        training,
    ):
        assert "another file" in refusal(model)


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "my.ops", "AI.ONNX"])
def test_operators_outside_standard_onnx_are_refused_by_name(domain: str) -> None:
    node = helper.make_node("Clever", ["x"], ["y"], domain=domain)
    assert f"'{domain}.Clever'" in refusal(model_of(node))
    assert "Clever" in refusal(model_of(inside_if(node)))


def test_functions_of_its_own_are_refused() -> None:
    body = helper.make_function(
        "my.ops", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    node = helper.make_node("Relu", ["x"], ["y"])
    assert "functions" in refusal(model_of(node, functions=[body]))


def test_two_domains_in_one_node_do_not_hide_the_odd_one() -> None:
    node = helper.make_node("Clever", ["x"], ["y"], domain="my.ops")
    # Protobuf lets a later value of the same field win; append an empty domain (field 7, length 0).
    wire = node.SerializeToString() + b"\x3a\x00"
    graph = b"\x0a" + bytes([len(wire)]) + wire
    with pytest.raises(BundleError, match="Clever"):
        check_self_contained(b"\x3a" + bytes([len(graph)]) + graph)


@pytest.mark.parametrize(
    "wire",
    [
        b"\x3a",  # a graph without a length
        b"\x3a\x05\x00",  # a graph longer than the file
        b"\x3a\x02\x0b\x0c",  # a group
        b"\x00\x00",  # field number zero
        b"\x38\x01",  # a number where the graph should be
        b"\xff" * 11,  # a number without an end
        b"\x18\x00\x00\x00ORTM" + bytes(32),  # ONNX Runtime's own format
    ],
)
def test_bytes_that_do_not_parse_are_refused(wire: bytes) -> None:
    with pytest.raises(BundleError, match="not an ONNX model"):
        check_self_contained(wire)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**31))
def test_no_bytes_make_it_fail_otherwise(noise: bytes, position: int) -> None:
    model = tiny_graph().SerializeToString()
    position %= len(model)
    for wire in (noise, model[:position] + noise + model[position + len(noise) :], model[:position]):
        with suppress(BundleError):
            check_self_contained(wire)


def test_deep_nesting_is_no_problem() -> None:
    node = helper.make_node("Clever", ["x"], ["inner"], domain="my.ops")
    wire = onnx.GraphProto(node=[node]).SerializeToString()

    def field(number: int, content: bytes) -> bytes:
        length, prefix = len(content), b""
        while length > 0x7F:
            prefix, length = prefix + bytes([length & 0x7F | 0x80]), length >> 7
        return bytes([number << 3 | 2]) + prefix + bytes([length]) + content

    for _ in range(2000):
        wire = field(1, field(5, field(6, wire)))  # graph > node > attribute > graph
    with pytest.raises(BundleError, match="Clever"):
        check_self_contained(field(7, wire))
