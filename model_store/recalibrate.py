"""Another domain: the same graph, with the false-positive promise made anew on clean images of where it will be used.

Only the calibration changes. The promise holds for images like those of the folder, and for a folder of clean images that
nothing in the bundle was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_store.bundle import Bundle
from model_store.calibration import BudgetTooSmall, Calibration
from model_store.folder import Answers, FolderError, answer_files, files_below
from model_store.revise import revise
from model_store.session import GateSession

FEWEST_IMAGES = 19
"""Fewer cannot even promise that at most one clean image in twenty is flagged."""
USUAL_BUDGET = 0.01
"""The budget that serving asks for by default."""


@dataclass(frozen=True)
class Recalibrated:
    """What became of it."""

    place: Path
    """The folder of the new version."""
    calibration: Calibration
    answers: Answers


def recalibrate(
    bundle: Bundle,
    store: Path,
    folder: Path,
    *,
    allow_small: bool = False,
    threads: int = 1,
    begin: Callable[[int], None] = lambda files: None,
    advance: Callable[[], None] = lambda: None,
) -> Recalibrated:
    """Calibrate `bundle` on the clean images in `folder` and below, and publish that in `store` as a new version.

    `begin` is told the number of files, `advance` is called once for each. FolderError where there are fewer than 19
    images or more than a tenth of the files is none; BudgetTooSmall where there are too few for the usual max_fpr of 0.01,
    unless `allow_small`.
    """
    files = list(files_below(folder))
    if len(files) < FEWEST_IMAGES:
        raise FolderError(f"{folder} holds {len(files)} files; a calibration needs at least {FEWEST_IMAGES} images")
    begin(len(files))
    session = GateSession(bundle, threads=threads)
    answers = answer_files(session, bundle.manifest.pixels, files, threads=threads, embeddings=False, advance=advance)
    n, name = len(answers.score), folder.resolve().name
    if n < FEWEST_IMAGES:
        raise FolderError(f"{folder} holds {n} images; a calibration needs at least {FEWEST_IMAGES}")
    scores = tuple(np.sort(answers.score.astype(float)).tolist())
    calibration = Calibration(source=f"{n} clean images, the folder {name}", scores=scores)
    if not allow_small:
        try:
            calibration.require_budget(USUAL_BUDGET)
        except BudgetTooSmall as error:
            raise BudgetTooSmall(f"{error}; bring more clean images, or say --allow-small") from None
    before = bundle.manifest.calibration
    card = f"""## Recalibrated on {name}

From {bundle.label}, the same graph. {n} clean images replace the calibration of before ({before.source}); the smallest
max_fpr that they support is {calibration.smallest_budget:.2g}. Rates of false alarms that were measured above held for
the calibration of before.
"""
    record = {"recalibrated_on": name, "images": n, "skipped": len(answers.skipped), "sha256": answers.digest}
    return Recalibrated(
        revise(bundle, store, fields={"calibration": calibration}, card=card, record=record), calibration, answers
    )
