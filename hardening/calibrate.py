"""Fit the detector and calibrate its score, on clean images only and before any attack is run.

Two disjoint sets that no encoder was tuned on: `fit` for heads, standardisation and evidence, `calibration` for the
quantile table of the score, which alone decides what is flagged. Where `calibration` is a folder of its own, it serves for
the evidence too, by cross-fitting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import KFold
from torch import Tensor

from hardening.branches import BMP, BRANCHES, MPAE, SENTINEL, TRIPWIRE, train_head
from hardening.compact import round_weights
from hardening.data import Dataset
from hardening.detectors import ConsistencyDetector, Detector, PaperDetector, SentinelDetector
from hardening.encoders import Encoder, as_input, fold_batch_norm, merge_gains
from hardening.gate import EMBEDDED, Gate, Views
from hardening.progress import Bars
from hardening.recipe import RecipeError
from model_store.calibration import Calibration
from model_store.honest import changed_at_random, changed_each_way, to_be_changed

OWN_FOLDER = "the data's folder calibration/"
"""How the words of such a calibration end."""
_BATCH = 16
_FOLDS = 5

_FITTED = {"consistency": ConsistencyDetector, "sentinel": SentinelDetector}
"""Those that are fitted on honestly changed images."""


@dataclass(frozen=True)
class Calibrated:
    """A gate ready for export, and the table of its score."""

    gate: Gate
    calibration: Calibration


def by_branch(victim: Encoder, tuned: Mapping[str, Encoder]) -> dict[str, Encoder]:
    """The undefended victim and the encoders that were tuned for each role, by the names that they have in a bundle."""
    return {TRIPWIRE: victim, MPAE[0]: tuned["victim"], MPAE[1]: tuned["auxiliary"], BMP: tuned["bmp"]}


def assemble(
    victim: Encoder, tuned: Mapping[str, Encoder], sample: NDArray[np.uint8], sentinel: Encoder | None = None
) -> Views:
    """Put the undefended victim, the three tuned encoders and a sentinel together, with the weights that will be shipped.

    `sample` [N, H, W, 3] uint8 proves that folding BatchNorm changes nothing.
    """
    encoders = by_branch(victim, tuned) | ({} if sentinel is None else {SENTINEL: sentinel})
    for encoder in encoders.values():
        fold_batch_norm(encoder, as_input(sample))
        merge_gains(encoder)
        round_weights(encoder)
    return Views(encoders, *sample.shape[1:3]).requires_grad_(False).eval()


def calibrate(
    views: Views, dataset: Dataset, detector: str, device: str, bars: Bars, *, quiet_on_changes: bool = False
) -> Calibrated:
    """Fit the detector on `fit`, each image after an honest change, then the score's table on `calibration`, unchanged, and
    with `quiet_on_changes` on copies of half of it after every honest change too.

    A folder calibration/ says what the gate will see, so the detector is fitted on it too: evidence that only
    knew the few classes of `fit` would take every other picture for strange. The table's scores then come from detectors that
    were fitted without the image that they judge (cross-conformal prediction, Vovk 2015).
    """
    images, labels = dataset.take("fit")
    values = collect(views, images, EMBEDDED, device, bars, "features for the embedding")
    clean, _ = dataset.take("calibration")
    some = to_be_changed(len(clean))
    copies = {}
    if quiet_on_changes:
        copies = dict(changed_each_way(dataset.small(dataset.splits["calibration"][some]), 2, dataset.rule))
    own = any(dataset.paths[i].startswith("calibration/") for i in dataset.splits["calibration"][:1])
    score: NDArray[np.float32] | None = None
    changed: dict[str, NDArray[np.float32]] = {}
    if detector in _FITTED:
        kind = _FITTED[detector]
        read = partial(collect, views, wanted=kind.views, device=device, bars=bars)
        known = read(changed_at_random(images, 0), what="features for the detector")
        if own:
            theirs = read(clean, what="features of calibration/")
            learned = read(changed_at_random(clean, 1), what="features of calibration/, changed")
            judged = [(np.arange(len(clean)), theirs)]
            judged += [(some, read(found, what=f"features of calibration/: {name}")) for name, found in copies.items()]
            score, *others = _scores_by_others(kind, known, learned, judged, bars)
            known, changed = _together(known, learned), dict(zip(copies, others, strict=True))
        fitted: Detector = kind.fit(known)
    elif dataset.labelled:
        fitted = PaperDetector({name: train_head(values[name], labels) for name in BRANCHES})
    else:
        raise RecipeError("the detector `paper` reads classifier heads and needs labelled images, train/<class>/*")
    gate = Gate(views, values, fitted)
    gate.requires_grad_(False).eval()
    if score is None:
        _, _, score = run_gate(gate, clean, device, bars, "calibrate the score")
        changed = {name: run_gate(gate, found, device, bars, f"the score after {name}")[2] for name, found in copies.items()}
    source = OWN_FOLDER if own else "held out of train/"
    return Calibrated(gate, Calibration.of(f"{len(clean)} clean images, {source}", score, changed))


def _together(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {view: torch.cat([first[view], second[view]]) for view in first}


def _scores_by_others(
    kind: type[ConsistencyDetector],
    known: Mapping[str, Tensor],
    learned: Mapping[str, Tensor],
    judged: Sequence[tuple[NDArray[np.int64], Mapping[str, Tensor]]],
    bars: Bars,
) -> list[NDArray[np.float32]]:
    """Scores [M] of each of `judged`, (which images [M] of calibration/, their features by view), from detectors that were
    fitted on `known` and on the folds of `learned`, features of calibration/, that the image is not in."""
    scores = [np.zeros(len(which), np.float32) for which, _ in judged]
    count = len(next(iter(learned.values())))
    with bars.task("calibrate the score", _FOLDS) as task:
        for rest, held in KFold(_FOLDS, shuffle=True, random_state=0).split(np.zeros(count)):
            detector = kind.fit(_together(known, {view: found[rest] for view, found in learned.items()}))
            for score, (which, features) in zip(scores, judged, strict=True):
                mine = np.isin(which, held)
                score[mine] = detector({view: found[mine] for view, found in features.items()})[1].numpy()
            task.advance()
    return scores


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
