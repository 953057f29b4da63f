"""From the torch gate to the ONNX graph of the contract, and the proof that both give the same answers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from hardening.compact import store_int8
from hardening.gate import Gate
from model_store.errors import TwogateError
from model_store.manifest import Golden
from model_store.pixels import PixelRule
from model_store.session import OUTPUTS

OPSET = 18
EMBEDDING_TOLERANCE = 1e-4
SCORE_TOLERANCE = 1e-3


class ParityError(TwogateError):
    """The exported graph does not answer like the module that it was exported from."""


def export(gate: Gate, sample: NDArray[np.uint8]) -> bytes:
    """Export a gate to a self-contained ONNX model; `sample` [N, H, W, 3] uint8, N >= 2, traces it."""
    model = to_onnx(gate.to("cpu").eval(), sample, OUTPUTS)
    store_int8(model)
    for node in model.graph.node:
        # Stack traces of the exporter: paths of the machine that it ran on.
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    del model.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def to_onnx(module: nn.Module, sample: NDArray[np.uint8], outputs: Sequence[str]) -> onnx.ModelProto:
    """A module on the CPU, uint8 images [N, H, W, 3] -> `outputs`, as a graph whose input is called `images`."""
    with warnings.catch_warnings():
        # The exporter warns about its own future; nothing in it concerns the graph.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.as_tensor(np.ascontiguousarray(sample)),),
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def check_parity(gate: Gate, model: bytes, images: NDArray[np.uint8]) -> dict[str, float]:
    """Compare torch and ONNX Runtime on real images [7.., H, W, 3], in batches of 1 and 7; returns the largest differences.

    ParityError beyond 1e-4 in the embedding or 1e-3 in confidence or score.
    """
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    worst = {"embedding": 0.0, "confidence": 0.0, "score": 0.0}
    for size in (1, 7):
        batch = np.ascontiguousarray(images[:size])
        with torch.no_grad():
            expected = [output.numpy() for output in gate(torch.as_tensor(batch))]
        for name, want, got in zip(worst, expected, session.run(list(worst), {"images": batch}), strict=True):
            # Not Python's `max`, which passes over what is no number.
            worst[name] = float(np.maximum(worst[name], np.abs(want - got).max()))
    if not (worst["embedding"] <= EMBEDDING_TOLERANCE and np.max([worst["confidence"], worst["score"]]) <= SCORE_TOLERANCE):
        raise ParityError(f"the ONNX graph differs from torch: {worst}")
    return worst


def golden(model: bytes, rule: PixelRule) -> Golden:
    """A golden vector from three made-up pictures: a bundle must carry no photograph of somebody else's."""
    images = made_up_images(rule.height, rule.width)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return Golden.of(images, *session.run(["embedding", "confidence", "score"], {"images": images}))


def made_up_images(height: int, width: int) -> NDArray[np.uint8]:
    """Three pictures [3, H, W, 3]: a gradient with a disc, slow waves, and noise."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    disc = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06)[..., None]
    gradient = np.stack([x, y, 1 - x], axis=2)
    waves = np.stack([np.sin(k * x + (9 - k) * y) for k in (5, 7, 11)], axis=2) / 2 + 0.5
    noise = np.random.default_rng(0).random((height, width, 3))
    pictures: list[Any] = [np.where(disc, 0.9, gradient), waves, noise]
    return np.stack([np.rint(picture * 255) for picture in pictures]).astype(np.uint8)
