"""Run a bundle's graph: uint8 pictures in; embedding, confidence and score out."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model_store.errors import BundleError
from model_store.manifest import MODEL_FILE

if TYPE_CHECKING:
    from model_store.bundle import Bundle

_M_TRIM_THRESHOLD = -1
"""The number of this option in glibc's malloc.h."""

OUTPUTS = ("embedding", "confidence", "score")
Signature = dict[str, tuple[str, list[int | None]]]
"""A graph's inputs or outputs: name -> type and shape, where a free dimension is None."""


@dataclass(frozen=True)
class GateOutputs:
    """What the graph answers for N pictures."""

    embedding: NDArray[np.float32]
    """[N, D], unit length."""
    confidence: NDArray[np.float32]
    """[N, B] in [0, 1], in the manifest's order of branches."""
    score: NDArray[np.float32]
    """[N], higher = more suspicious."""


class GateSession:
    """An ONNX Runtime session over a bundle. `run` may be called from several threads.

    `threads` is the number of cores that one run uses; 0 leaves it to ONNX Runtime, which does not see a container's
    CPU limit. BundleError where the graph cannot be loaded or is not the one that the manifest describes.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> None:
        self._session = open_session(bundle.model, threads, providers)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        rule, branches = bundle.manifest.pixels, len(bundle.manifest.branches)
        check_signature(
            self._session,
            {"images": ("tensor(uint8)", [None, rule.height, rule.width, 3])},
            {
                "embedding": ("tensor(float)", [None, bundle.manifest.embedding_dim]),
                "confidence": ("tensor(float)", [None, branches]),
                "score": ("tensor(float)", [None]),
            },
        )

    def run(self, images: NDArray[np.uint8]) -> GateOutputs:
        """Answer for uint8 pictures [N, H, W, 3], RGB, made by the bundle's pixel rule."""
        embedding, confidence, score = self._session.run(list(OUTPUTS), {"images": images})
        return GateOutputs(np.asarray(embedding), np.asarray(confidence), np.asarray(score))


def open_session(
    model: bytes, threads: int = 0, providers: tuple[str, ...] = ("CPUExecutionProvider",), file: str = MODEL_FILE
) -> ort.InferenceSession:
    """An ONNX Runtime session that keeps no more memory than it needs. BundleError names `file` where it cannot be loaded."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # An idle server must not spin; and memory taken for one large batch must go back.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    # Never let the bytes choose another format: what was checked is an ONNX model.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = ort.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise BundleError(file, f"ONNX Runtime cannot load it ({type(error).__name__})") from error
    _give_back_freed_memory()
    return session


def keep_little_freed_memory() -> None:
    """Let glibc keep no more than 16 MiB of freed memory at the end of its heap, for the whole process: for one that serves.

    Otherwise it raises that bound by itself to twice the largest block it saw freed, and what each batch's activations
    leave behind stays: about 75 MB at a batch of six with the default bundle. It is no slower.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 16 * 2**20)


def _give_back_freed_memory() -> None:
    """Unpacking a graph's weights leaves holes in the heap, which glibc gives back only when asked."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def check_signature(session: ort.InferenceSession, inputs: Signature, outputs: Signature, file: str = MODEL_FILE) -> None:
    """Raise BundleError, which names `file`, unless the graph's inputs and outputs are those promised."""
    for kind, found, promised in (("inputs", session.get_inputs(), inputs), ("outputs", session.get_outputs(), outputs)):
        described = {node.name: (node.type, [d if isinstance(d, int) else None for d in node.shape]) for node in found}
        if described != promised:
            raise BundleError(file, f"the graph's {kind} are {described}, the manifest promises {promised}")
