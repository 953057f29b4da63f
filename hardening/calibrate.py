"""Fit the detector and calibrate its score, on clean images only and before any attack is run.

Two disjoint sets that no encoder was tuned on: `fit` for heads, standardisation and evidence, `calibration` for the
quantile table of the score, which alone decides what is flagged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE, train_head
from hardening.compact import round_weights
from hardening.data import Dataset
from hardening.detectors import ConsistencyDetector, Detector, PaperDetector
from hardening.encoders import Encoder, as_input, fold_batch_norm, merge_gains
from hardening.gate import Gate, Views
from hardening.progress import Bars
from hardening.recipe import RecipeError
from model_store.calibration import Calibration

_BATCH = 16


@dataclass(frozen=True)
class Calibrated:
    """A gate ready for export, and the table of its score."""

    gate: Gate
    calibration: Calibration


def assemble(victim: Encoder, tuned: Mapping[str, Encoder], sample: NDArray[np.uint8]) -> Views:
    """Put the undefended victim and the three tuned encoders together, with the weights that will be shipped.

    `sample` [N, H, W, 3] uint8 proves that folding BatchNorm changes nothing.
    """
    encoders = {TRIPWIRE: victim, MPAE[0]: tuned["victim"], MPAE[1]: tuned["auxiliary"], BMP: tuned["bmp"]}
    for encoder in encoders.values():
        fold_batch_norm(encoder, as_input(sample))
        merge_gains(encoder)
        round_weights(encoder)
    return Views(encoders, *sample.shape[1:3]).requires_grad_(False).eval()


def calibrate(views: Views, dataset: Dataset, detector: str, device: str, bars: Bars) -> Calibrated:
    """Fit the detector on `fit`, then the score's table on `calibration`."""
    images, labels = dataset.take("fit")
    features = collect(views, images, ConsistencyDetector.views, device, bars, "features for the detector")
    if detector == "consistency":
        fitted: Detector = ConsistencyDetector.fit(features)
    elif dataset.labelled:
        fitted = PaperDetector({name: train_head(features[name], labels) for name in BRANCHES})
    else:
        raise RecipeError("the detector `paper` reads classifier heads and needs labelled images, train/<class>/*")
    gate = Gate(views, {name: features[name].mean(dim=0) for name in BRANCHES}, fitted)
    gate.requires_grad_(False).eval()
    clean, _ = dataset.take("calibration")
    _, _, score = run_gate(gate, clean, device, bars, "calibrate the score")
    own = any(dataset.paths[i].startswith("calibration/") for i in dataset.splits["calibration"][:1])
    source = "the data's folder calibration/" if own else "held out of train/"
    table = Calibration(source=f"{len(clean)} clean images, {source}", scores=tuple(np.sort(score.astype(float))))
    return Calibrated(gate, table)


@torch.no_grad()
def collect(
    views: Views, images: NDArray[np.uint8], wanted: tuple[str, ...], device: str, bars: Bars, what: str
) -> dict[str, Tensor]:
    """Features [N, d] on the CPU by view."""
    views.to(device)
    parts: dict[str, list[Tensor]] = {view: [] for view in wanted}
    with bars.task(what, len(images)) as task:
        for start in range(0, len(images), _BATCH):
            x = as_input(images[start : start + _BATCH], device)
            for view, found in views(x, wanted).items():
                parts[view].append(found.cpu())
            task.advance(len(x))
    return {view: torch.cat(found) for view, found in parts.items()}


@torch.no_grad()
def run_gate(
    gate: Gate, images: NDArray[np.uint8], device: str, bars: Bars, what: str
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Embedding [N, D], confidence [N, B] and score [N] of images [N, H, W, 3]."""
    gate.to(device)
    parts = []
    with bars.task(what, len(images)) as task:
        for start in range(0, len(images), _BATCH):
            chunk = torch.as_tensor(np.ascontiguousarray(images[start : start + _BATCH]), device=device)
            parts.append([output.cpu().numpy() for output in gate(chunk)])
            task.advance(len(chunk))
    embedding, confidence, score = (np.concatenate(column) for column in zip(*parts, strict=True))
    return embedding, confidence, score
