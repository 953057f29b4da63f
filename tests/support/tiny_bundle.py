"""A real bundle in a tenth of a second: an ONNX graph of a few operators that answers like a gate.

It has no learned weights. Its score is the energy of the finest detail, so that verdicts differ between smooth and
noisy pictures as a hardened bundle's differ between clean and attacked ones.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model_store.calibration import Calibration
from model_store.manifest import MODEL_FILE, Branch, Detector, Golden, Manifest
from model_store.pixels import PixelRule
from model_store.store import publishing

BRANCH_DIM = 8
BRANCHES = (
    Branch(name="victim", role="mpae", description="eight random projections", embedding_dim=BRANCH_DIM),
    Branch(name="auxiliary", role="mpae", description="eight others", embedding_dim=BRANCH_DIM),
    Branch(name="clean", role="bmp", description="and eight more", embedding_dim=BRANCH_DIM),
    Branch(name="tripwire", role="tripwire", description="watches fine detail", embedding_dim=0),
)
EMBEDDING_DIM = 3 * BRANCH_DIM
_CREATED = datetime(2025, 1, 1, tzinfo=UTC)


def make_tiny_bundle(
    store: Path,
    name: str = "tiny",
    *,
    size: int = 32,
    calibration_n: int = 1200,
    seed: int = 0,
    model: bytes | None = None,
    files: dict[str, bytes] | None = None,
    golden_images: int = 3,
) -> Path:
    """Publish a tiny bundle and return its folder, `<store>/<name>/<version>`. The same arguments give the same bytes.

    `model` replaces the graph's bytes after calibration and golden vector were computed with the real one; `files` are
    more files of the bundle, path -> content.
    """
    graph = tiny_graph(size, seed=seed).SerializeToString()
    run = _runner(graph)
    clean = smooth_images(calibration_n, size, seed=seed + 1)
    scores = np.concatenate([run(clean[start : start + 256])[2] for start in range(0, len(clean), 256)])
    golden = np.concatenate([smooth_images(golden_images - 1, size, seed=seed + 2), noisy_images(1, size, seed=seed + 3)])
    embedding, confidence, score = run(golden)
    table = tuple(np.sort(scores.astype(float)).tolist())
    manifest = Manifest(
        name=name,
        version=1,
        created=_CREATED,
        pixels=PixelRule(height=size, width=size),
        embedding_dim=EMBEDDING_DIM,
        branches=BRANCHES,
        detector=Detector(name="consistency", description="the energy of the finest detail", parameters={"seed": seed}),
        calibration=Calibration(source="generated smooth pictures", scores=table),
        files={},
        golden=Golden.of(golden, embedding, confidence, score),
        provenance={"made_by": "tests/support/tiny_bundle.py", "seed": seed},
    )
    with publishing(store, name) as publication:
        (publication.path / MODEL_FILE).write_bytes(graph if model is None else model)
        (publication.path / "card.md").write_text(f"# {name}\n\nA bundle for tests.\n", encoding="utf-8")
        for path, content in (files or {}).items():
            target = publication.path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return publication.seal(manifest)


def smooth_images(n: int, size: int, *, seed: int) -> NDArray[np.uint8]:
    """Pictures [n, size, size, 3] with as much fine detail as small photographs have: blobs, edges, a little noise."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(0, 1, size, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    picture = rng.uniform(0.2, 0.8, (n, 1, 1, 3)) * np.ones((n, size, size, 3))
    for _ in range(4):
        fx, fy = rng.uniform(-3, 3, (2, n, 1, 1))
        phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
        wave = np.sin(2 * np.pi * (fx * x + fy * y) + phase)
        # Half of the waves are hard edges, as objects have.
        hard = rng.random((n, 1, 1)) < 0.5
        wave = np.where(hard, np.sign(wave), wave)
        picture += rng.uniform(0, 0.15, (n, 1, 1, 3)) * wave[..., None]
    picture += rng.normal(0, 1, picture.shape) * rng.uniform(0, 0.02, (n, 1, 1, 1))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def noisy_images(n: int, size: int, *, seed: int) -> NDArray[np.uint8]:
    """Pictures [n, size, size, 3] of noise, which the tiny bundle always flags."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def tiny_graph(size: int = 32, *, seed: int = 0) -> onnx.ModelProto:
    """The graph: every output depends on the pixels."""
    rng = np.random.default_rng(seed)
    laplacian = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)
    constants = {
        "scale": np.float32(1 / 255),
        "laplacian": np.tile(laplacian, (3, 1, 1, 1)),
        "floor": np.float32(1e-4),
        "column": np.array([1], np.int64),
        "root": np.float32(1 / np.sqrt(3)),
        "slope": np.array([[4, 5, 6, 12]], np.float32),
        "offset": np.array([[3, 3, 3, 4]], np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["as_float", "scale"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["pooled"], kernel_shape=[size // 4] * 2, strides=[size // 4] * 2),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Conv", ["planes", "laplacian"], ["edges"], group=3, kernel_shape=[3, 3]),
        helper.make_node("Abs", ["edges"], ["detail"]),
        helper.make_node("ReduceMean", ["detail"], ["energy"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Add", ["energy", "floor"], ["floored"]),
        helper.make_node("Log", ["floored"], ["score"]),
        helper.make_node("Unsqueeze", ["energy", "column"], ["energy_column"]),
        helper.make_node("Mul", ["energy_column", "slope"], ["steep"]),
        helper.make_node("Sub", ["offset", "steep"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["confidence"]),
    ]
    features = 3 * 4 * 4
    for branch in BRANCHES[:3]:
        weight, bias = f"{branch.name}_weight", f"{branch.name}_bias"
        constants[weight] = rng.normal(0, 1, (features, BRANCH_DIM)).astype(np.float32)
        constants[bias] = rng.normal(0, 1, BRANCH_DIM).astype(np.float32)
        nodes += [
            helper.make_node("Gemm", ["features", weight, bias], [f"{branch.name}_raw"]),
            helper.make_node("LpNormalization", [f"{branch.name}_raw"], [f"{branch.name}_unit"], axis=1, p=2),
        ]
    nodes += [
        helper.make_node("Concat", [f"{b.name}_unit" for b in BRANCHES[:3]], ["joined"], axis=1),
        helper.make_node("Mul", ["joined", "root"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3])],
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", EMBEDDING_DIM]),
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["N", len(BRANCHES)]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
        ],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


_Answer = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def _runner(model: bytes) -> Callable[[NDArray[np.uint8]], _Answer]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> _Answer:
        embedding, confidence, score = session.run(["embedding", "confidence", "score"], {"images": images})
        return embedding, confidence, score

    return run
