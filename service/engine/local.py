"""A gate without a server: pictures in, answers out, in this thread. `twogate embed` and the service share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model_store.bundle import Bundle, check_golden, load_bundle
from model_store.errors import TwogateError
from model_store.pixels import decode
from model_store.session import GateSession, keep_little_freed_memory
from model_store.store import resolve
from model_store.tasks import TaskHead, check_head
from service.choices import Provider
from service.cores import usable_cores
from service.engine.verdict import BrokenOutput, Judged, judge_outputs

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ProviderError(TwogateError):
    """The graph cannot run where the operator wants it to."""


class LocalGate:
    """A bundle, ready to judge, and to classify for the tasks that it has heads for.

    `judge` and `classify` may be called from several threads.

    `max_fpr` is the share of clean images that may be flagged; `threads` the cores that one forward uses, by default
    all that this process may. Raises BundleError where the graph is not the manifest's or fails its golden vector,
    BudgetTooSmall where the calibration cannot support `max_fpr`, and ProviderError.
    """

    def __init__(
        self,
        bundle: Bundle,
        max_fpr: float = 0.01,
        threads: int | None = None,
        *,
        provider: Provider = "cpu",
        allow_fallback: bool = False,
    ) -> None:
        bundle.manifest.calibration.require_budget(max_fpr)
        self.manifest = bundle.manifest
        self.label = bundle.label
        self.model_sha256 = bundle.model_sha256
        self.max_fpr = max_fpr
        self.threads = threads or usable_cores()
        keep_little_freed_memory()
        self._session = GateSession(bundle, threads=self.threads, providers=_providers(provider, allow_fallback))
        self.provider = self._session.providers[0]
        if self.provider != _PROVIDERS[provider] and not allow_fallback:
            raise ProviderError(_cannot(provider))
        check_golden(self._session, bundle.manifest)
        self._heads = {task.name: TaskHead(bundle.manifest, task, bundle.heads[task.name]) for task in bundle.manifest.tasks}
        for head in self._heads.values():
            check_head(head, bundle.manifest)  # which also warms it up

    @classmethod
    def open(cls, store: Path, wanted: str, max_fpr: float = 0.01, threads: int | None = None) -> LocalGate:
        """Load and check `wanted` (`name` or `name/version`) from a store; raises as the class does."""
        return cls(load_bundle(resolve(store, wanted)), max_fpr, threads)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """An encoded image as the graph wants it, uint8 [H, W, 3]; ImageError where it is refused."""
        return decode(data, self.manifest.pixels)

    def judge(self, pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[Judged]:
        """Answer for N decoded pictures, each uint8 [H, W, 3], in one forward."""
        if len(pictures) == 0:
            return []
        return judge_outputs(self._session.run(np.stack(list(pictures))), self.manifest, self.max_fpr)

    def classify(self, task: str, judged: Sequence[Judged]) -> NDArray[np.float32]:
        """Probabilities [N, C] of a task's classes for N answers of this gate, in `manifest.tasks`' order of classes.

        KeyError where the bundle has no head for `task`. In this thread and on one core, so call it from a worker thread
        where an event loop waits: usually it takes less than a millisecond, but not for thousands of classes.
        """
        head = self._heads[task]
        if len(judged) == 0:
            return np.zeros((0, len(head.task.classes)), np.float32)
        confidence = np.array([list(answer.verdict.confidence.values()) for answer in judged], np.float32)
        probabilities = head.run(np.stack([answer.embedding for answer in judged]), confidence)
        if not np.isfinite(probabilities).all():
            raise BrokenOutput(f"a probability of task {task} is not finite")
        return probabilities


def _providers(provider: Provider, allow_fallback: bool) -> tuple[str, ...]:
    """What to ask ONNX Runtime for. It falls back silently, so what it cannot do is refused here."""
    wanted, cpu = _PROVIDERS[provider], _PROVIDERS["cpu"]
    if wanted not in ort.get_available_providers():
        if not allow_fallback:
            raise ProviderError(_cannot(provider))
        wanted = cpu
    return (wanted,) if wanted == cpu else (wanted, cpu)


def _cannot(provider: str) -> str:
    return (
        f"provider {provider!r} cannot be had here (for cuda: the package onnxruntime-gpu, its CUDA libraries and a "
        "device); choose provider cpu, or set allow_fallback to be served by the CPU instead"
    )
