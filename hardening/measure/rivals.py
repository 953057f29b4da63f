"""Other detectors beside the bundle's own, on the same attacked images, each calibrated on the same clean images of the task.

ZePAD's rule in its readings S1 to S5, the divergence of the branches, Mahalanobis and nearest-neighbour distance on the
victim's features, feature squeezing, BEYOND. `FORWARDS` is what a detector costs on top of an embedding: encoder passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hardening import encoders
from hardening.branches import BRANCHES, EARLY, train_head
from hardening.data import spread
from hardening.detectors.baselines import Beyond, BranchDivergence, Mahalanobis, Neighbours, PaperReading, Squeezing
from hardening.detectors.consistency import ConsistencyDetector
from hardening.measure.tasks import Task
from model_store.calibration import Calibration

Score = Callable[[NDArray[np.uint8], Mapping[str, Tensor]], NDArray[np.float64]]
"""Images [N, H, W, 3] and the graph's values on them -> [N], higher = more suspicious."""
PAPER = "paper, S1"
"""The paper's rule, literally."""
FORWARDS = {"feature squeezing": 3, "BEYOND": 51}
"""Encoder passes of the victim; the others read features of the pictures as they are."""
OWN_FORWARDS = len({view.replace(EARLY, "") for view in ConsistencyDetector.views} - set(BRANCHES))
"""Encoder passes of ours, beside the three of the embedding."""
_READINGS: tuple[Literal["S1", "S2", "S3", "S4", "S5"], ...] = ("S1", "S2", "S3", "S4", "S5")
RIVALS = (*(f"paper, {r}" for r in _READINGS), "branch divergence", "Mahalanobis", "nearest neighbours", *FORWARDS)
_WITH_HEADS = set(RIVALS[: len(_READINGS) + 1])
"""Read a classifier of each branch."""
_CLEAN = 1000
"""Calibration images at most: BEYOND takes 51 passes for each."""


@dataclass(frozen=True)
class Rival:
    """A detector and its table of clean scores."""

    name: str
    score: Score
    table: Calibration
    clean: NDArray[np.float64]
    """Of the clean test images."""


def fit_rivals(
    task: Task, before: Mapping[str, Tensor], victim: nn.Module, device: str, names: tuple[str, ...] = RIVALS
) -> list[Rival]:
    """Fit detectors on the task's clean images; tables from its calibration images, which nothing was fitted on.

    `before` holds the graph's values on the clean test images.
    """

    def features(images: NDArray[np.uint8]) -> Tensor:
        return encoders.features(victim, images, batch_size=256, device=device)

    victim_head = task.victim_head
    if victim_head is None or not names:
        return []
    some = spread(len(task.own_images), _CLEAN)
    # BEYOND ranks among clean images: every other one is kept from it for the table.
    for_table = some[::2] if "BEYOND" in names else some
    heads = (
        {name: train_head(task.gallery[name], task.gallery_labels) for name in BRANCHES} if _WITH_HEADS & set(names) else {}
    )
    makers: dict[str, Callable[[], Any]] = {
        **{f"paper, {r}": partial(PaperReading(r).fit, task.gallery, heads) for r in _READINGS},
        "branch divergence": partial(BranchDivergence().fit, task.gallery, heads),
        "Mahalanobis": partial(Mahalanobis().fit, task.gallery, task.gallery_labels),
        "nearest neighbours": partial(Neighbours().fit, task.gallery),
        "feature squeezing": lambda: Squeezing(lambda images: victim_head(features(images))),
        "BEYOND": lambda: Beyond(features, victim_head).fit(task.own_images[some[1::2]]),
    }
    scores: dict[str, Score] = {
        name: partial(_of_images if name in FORWARDS else _of_values, makers[name]()) for name in names
    }
    images, values = task.own_images[for_table], {name: v[for_table] for name, v in task.own_values.items()}
    return [
        Rival(
            name,
            score,
            Calibration.of(name, score(images, values)),
            score(task.images, before),
        )
        for name, score in scores.items()
    ]


def _of_values(detector: Any, images: NDArray[np.uint8], values: Mapping[str, Tensor]) -> NDArray[np.float64]:
    return np.asarray(detector.score(values))


def _of_images(detector: Any, images: NDArray[np.uint8], values: Mapping[str, Tensor]) -> NDArray[np.float64]:
    return np.asarray(detector.score(images))
