from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from hardening.heads import head_graph
from model_store.bundle import Bundle, load_bundle, verify_bundle
from model_store.errors import BundleError
from model_store.manifest import Manifest, Task, parse_manifest
from model_store.tasks import TaskHead, check_head
from tests.support.tiny_bundle import EMBEDDING_DIM, make_tiny_bundle
from tests.support.tiny_head import CLASSES, add_tiny_head, drawn_heads, with_graph


@pytest.fixture
def tiny(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture
def head(tiny: Bundle, tmp_path: Path) -> Path:
    return add_tiny_head(tiny, tmp_path)


def graph_of(nodes: list[Any], outputs: dict[str, list[Any]], opsets: tuple[str, ...] = ("",)) -> bytes:
    """A head's graph with these nodes; takes what a head takes."""
    graph = helper.make_graph(
        nodes,
        "task",
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", EMBEDDING_DIM]),
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["N", 4]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
    )
    ids = [helper.make_opsetid(domain, 17 if not domain else 1) for domain in opsets]
    return bytes(helper.make_model(graph, opset_imports=ids, ir_version=8).SerializeToString())


def test_a_bundle_with_a_head_verifies_and_answers(head: Path) -> None:
    assert "task animals: inputs and outputs as promised, probabilities of 3 classes" in verify_bundle(head)
    bundle = load_bundle(head)
    (task,) = bundle.manifest.tasks
    ready = TaskHead(bundle.manifest, task, bundle.heads["animals"])
    _, embedding, confidence, _ = bundle.manifest.golden.arrays()
    probabilities = ready.run(embedding, confidence)
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    # One image or many: the answer is the same.
    np.testing.assert_allclose(ready.run(embedding[1:2], confidence[1:2]), probabilities[1:2], atol=1e-6)


def test_a_confidence_that_is_no_number_is_no_vote(head: Path) -> None:
    bundle = load_bundle(head)
    ready = TaskHead(bundle.manifest, bundle.manifest.tasks[0], bundle.heads["animals"])
    _, embedding, confidence, _ = bundle.manifest.golden.arrays()
    broken, zero = confidence.copy(), confidence.copy()
    broken[:, 0], zero[:, 0] = np.nan, 0
    np.testing.assert_array_equal(ready.run(embedding, broken), ready.run(embedding, zero))


def test_without_heads_the_manifest_is_as_it_always_was(tiny_bundle: Path, head: Path) -> None:
    assert b'"tasks"' not in (tiny_bundle / "manifest.json").read_bytes()
    sealed = (head / "manifest.json").read_bytes()
    assert parse_manifest(sealed).sealed_bytes() == sealed


@pytest.mark.parametrize("at", [0, 0.5, -1])
def test_a_tampered_head_is_refused(head: Path, at: float) -> None:
    file = head / "tasks/animals.onnx"
    data = bytearray(file.read_bytes())
    data[int(at * len(data)) if at >= 0 else -1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"tasks/animals\.onnx: its sha256 is not the one"):
        load_bundle(head)


def test_a_missing_or_linked_head_is_refused(head: Path) -> None:
    file = head / "tasks/animals.onnx"
    file.rename(head.parent / "elsewhere.onnx")
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(head)
    file.symlink_to(head.parent / "elsewhere.onnx")
    with pytest.raises(BundleError, match="is a link"):
        load_bundle(head)


def test_a_head_is_self_contained_or_refused(tiny: Bundle, tmp_path: Path) -> None:
    nodes = [helper.make_node("Magic", ["embedding", "confidence"], ["probabilities"], domain="com.example")]
    graph = graph_of(nodes, {"probabilities": ["N", 3]}, ("", "com.example"))
    with pytest.raises(BundleError, match=r"tasks/animals\.onnx: uses the operator 'com\.example\.Magic'"):
        load_bundle(with_graph(tiny, tmp_path, graph))


def test_a_head_must_keep_the_promises_of_the_manifest(tiny: Bundle, tmp_path: Path) -> None:
    graph = head_graph(tiny.manifest, drawn_heads(4), "rfdm")
    with pytest.raises(BundleError, match=r"tasks/animals\.onnx: the graph's outputs are"):
        verify_bundle(with_graph(tiny, tmp_path, graph))
    with pytest.raises(BundleError, match=r"tasks/animals\.onnx: is not an ONNX model"):
        verify_bundle(with_graph(tiny, tmp_path, b"\xff\xff"))


def test_probabilities_must_be_probabilities(tiny: Bundle, tmp_path: Path) -> None:
    def cut(then: str) -> bytes:
        limits = [
            helper.make_node("Constant", [], [name], value_ints=[value])
            for name, value in (("start", 0), ("end", 3), ("axis", 1))
        ]
        nodes = [*limits, helper.make_node("Slice", ["embedding", "start", "end", "axis"], ["cut"])]
        if then == "Sqrt":  # of negative numbers: not a number
            nodes += [
                helper.make_node("Neg", ["positive"], ["below"]),
                helper.make_node("Sqrt", ["below"], ["probabilities"]),
            ]
            nodes.insert(-2, helper.make_node("Exp", ["cut"], ["positive"]))
        else:
            nodes.append(helper.make_node(then, ["cut"], ["probabilities"]))
        return graph_of(nodes, {"probabilities": ["N", 3]})

    for then in ("Sqrt", "Exp", "Identity"):
        with pytest.raises(BundleError, match=r"tasks/animals\.onnx: its answer for the golden vector is no probabilities"):
            verify_bundle(with_graph(tiny, tmp_path, cut(then)))
    verify_bundle(with_graph(tiny, tmp_path, cut("Softmax")))


def test_a_head_that_the_manifest_does_not_carry_is_refused(head: Path) -> None:
    manifest = load_bundle(head).manifest
    files = {name: sha for name, sha in manifest.files.items() if not name.startswith("tasks/")}
    (head / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).sealed_bytes())
    with pytest.raises(BundleError, match=r"names no tasks/animals\.onnx"):
        load_bundle(head)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../up"},
        {"name": "Animals"},
        {"file": "model.onnx"},
        {"file": "tasks/others.onnx"},
        {"classes": ("one",)},
        {"classes": ("one", "one")},
        {"classes": ("one", "")},
        {"fusion": "magic"},
        {"surprise": 1},
    ],
)
def test_a_task_must_make_sense(changes: dict[str, Any]) -> None:
    good = {"name": "animals", "classes": CLASSES, "file": "tasks/animals.onnx", "fusion": "rfdm", "trained_on": "x"}
    Task.model_validate(good)
    with pytest.raises(ValueError, match="validation error"):
        Task.model_validate({**good, **changes})


def test_two_heads_of_one_name_are_refused(head: Path) -> None:
    manifest = load_bundle(head).manifest
    with pytest.raises(ValueError, match="two tasks have the same name"):
        Manifest.model_validate({**manifest.model_dump(), "tasks": [manifest.tasks[0].model_dump()] * 2})


def test_a_second_head_joins_the_first(tiny: Bundle, tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path)
    first = add_tiny_head(tiny, tmp_path, "animals")
    second = load_bundle(add_tiny_head(first, tmp_path, "plants", fusion="rfdm"))
    assert [task.name for task in second.manifest.tasks] == ["animals", "plants"]
    for task in second.manifest.tasks:
        check_head(TaskHead(second.manifest, task, second.heads[task.name]), second.manifest)
