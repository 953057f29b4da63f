"""The verdict on one image: the graph's score against the operator's false-positive budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import Manifest
from model_store.session import GateOutputs


@dataclass(frozen=True)
class Verdict:
    """Is this image an adversarial example?"""

    flagged: bool
    p_value: float
    """Share of clean images that look at least as suspicious, in (0, 1]; flagged if it is at most `max_fpr`."""
    score: float
    """The graph's score, higher = more suspicious; comparable within one version of one bundle only."""
    detector: str
    """The name of the rule that made the score."""
    confidence: dict[str, float]
    """Branch name -> [0, 1]: how far this branch can be trusted on this image."""


@dataclass(frozen=True)
class Judged:
    """One image's answer."""

    embedding: NDArray[np.float32]
    """[D], unit length."""
    verdict: Verdict


class BrokenOutput(ArithmeticError):
    """The graph's embedding is not a number: the forward counts as failed."""


def judge_outputs(outputs: GateOutputs, manifest: Manifest, max_fpr: float) -> list[Judged]:
    """Turn the graph's outputs for N images into N answers.

    A score or confidence that is not finite is flagged: who can break the arithmetic must not pass for clean.
    BrokenOutput where an embedding is not finite, since there is nothing to give out.
    """
    if not np.isfinite(outputs.embedding).all():
        raise BrokenOutput("an embedding is not finite")
    calibration = manifest.calibration
    names = [branch.name for branch in manifest.branches]
    p_values = calibration.p_value(outputs.score)
    judged = []
    for embedding, confidence, score, p_value in zip(
        outputs.embedding, outputs.confidence, outputs.score, p_values, strict=True
    ):
        sound = math.isfinite(score) and bool(np.isfinite(confidence).all())
        p = float(p_value) if sound else calibration.smallest_budget
        verdict = Verdict(
            flagged=not sound or p <= max_fpr,
            p_value=p,
            score=float(score),
            detector=manifest.detector.name,
            confidence=dict(zip(names, confidence.tolist(), strict=True)),
        )
        # A copy: a view would keep the whole batch alive as long as one answer of it.
        judged.append(Judged(embedding.copy(), verdict))
    return judged
