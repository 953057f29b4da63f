"""Run a task head: the main graph's embedding and confidence in, the probability of every class out.

A head is a graph of its own, `tasks/<name>.onnx`, with the inputs `embedding` float32 [N, D] and `confidence` float32 [N, B],
exactly the main graph's outputs, and the output `probabilities` float32 [N, C]. So a bundle gets a head, or another one,
without a byte of `model.onnx` changed, and stored embeddings stay comparable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model_store.errors import BundleError
from model_store.manifest import MANIFEST_FILE, Manifest, Task
from model_store.session import check_signature, open_session

SUM_TOLERANCE = 1e-4
"""How far the probabilities of one image may be from 1 in sum; float32 over many classes."""


class TaskHead:
    """A task's head, ready to classify. `run` may be called from several threads.

    It runs on the calling thread alone: three small matrix products take less than the hand-over to a pool, and a second
    pool would fight with the main graph's for the cores. BundleError where the graph cannot be loaded or is not the one
    that the manifest describes.
    """

    def __init__(self, manifest: Manifest, task: Task, graph: bytes) -> None:
        self.task = task
        self._session = open_session(graph, threads=1, file=task.file)
        check_signature(
            self._session,
            {
                "embedding": ("tensor(float)", [None, manifest.embedding_dim]),
                "confidence": ("tensor(float)", [None, len(manifest.branches)]),
            },
            {"probabilities": ("tensor(float)", [None, len(task.classes)])},
            task.file,
        )

    def run(self, embedding: NDArray[np.float32], confidence: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities [N, C] for embeddings [N, D] and confidences [N, B] of the main graph.

        A confidence that is no number counts as none, which halves that branch's vote where the fusion is guarded.
        """
        sound = np.where(np.isfinite(confidence), confidence, np.float32(0)).astype(np.float32, copy=False)
        (probabilities,) = self._session.run(["probabilities"], {"embedding": embedding, "confidence": sound})
        return np.asarray(probabilities)


def check_head(head: TaskHead, manifest: Manifest) -> None:
    """Raise BundleError unless the head answers the golden vector with probabilities."""
    try:
        _, embedding, confidence, _ = manifest.golden.arrays()
    except ValueError as error:
        raise BundleError(MANIFEST_FILE, f"the golden vector cannot be read ({error})") from None
    try:
        found = head.run(embedding, confidence)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise BundleError(head.task.file, f"cannot answer the golden vector ({type(error).__name__})") from error
    if found.shape != (len(embedding), len(head.task.classes)):
        raise BundleError(head.task.file, f"answers with shape {found.shape}")
    if not np.isfinite(found).all() or (found < 0).any() or np.abs(found.sum(axis=1) - 1).max() > SUM_TOLERANCE:
        raise BundleError(head.task.file, "its answer for the golden vector is no probabilities that sum to 1")
