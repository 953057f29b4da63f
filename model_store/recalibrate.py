"""Another domain: the same graph, with the false-positive promise made anew on clean images of where it will be used.

Only the calibration changes. The promise holds for images like those of the folder, and for a folder of clean images that
nothing in the bundle was trained on. Where the bundle promises to be quiet on honest changes too, so does the new version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_store.bundle import Bundle
from model_store.calibration import BudgetTooSmall, Calibration, images_for
from model_store.folder import Answers, FolderError, answer_files, files_below, name_of, read_small
from model_store.honest import KINDS, changed_each_way, to_be_changed
from model_store.pixels import PixelRule
from model_store.revise import OWN_STORE, revise
from model_store.session import GateSession
from model_store.store import try_store

FEWEST_IMAGES = 19
"""Fewer cannot even promise that at most one clean image in twenty is flagged.
"""
USUAL_BUDGET = 0.01
"""The budget that serving asks for by default."""


_BATCH = 16
_QUIET = """
Half of them, 500 at most, were scored after each honest change too, so that of such pictures at most twice max_fpr are
flagged: after each change from a max_fpr of {:.2g} on, below that after all of them together.
"""


@dataclass(frozen=True)
class Recalibrated:
    """What became of it."""

    place: Path
    """The folder of the new version."""
    calibration: Calibration
    answers: Answers

    score: NDArray[np.float32]
    """[N], of the different images."""

    copies: int
    """Files that were left out, being the same as another one."""

    @property
    def quiet(self) -> float:
        """The share of the images themselves that a max_fpr of 0.01 flags: less, the more changes raised the table."""
        return float((self.calibration.p_value(self.score) <= USUAL_BUDGET).mean())


def recalibrate(
    bundle: Bundle,
    store: Path,
    folder: Path,
    *,
    allow_small: bool = False,
    only_newest: bool = False,
    threads: int = 1,
    begin: Callable[[int], None] = lambda steps: None,
    advance: Callable[[], None] = lambda: None,
) -> Recalibrated:
    """Calibrate `bundle` on the clean images in `folder` and below, and publish that in `store` as a new version.

    `begin` is told how many pictures will be scored, `advance` is called once for each. FolderError where there are fewer
    than 19 images or more than a tenth of the files is none; BudgetTooSmall where there are too few for the usual max_fpr of
    0.01, unless `allow_small`. Copies of a file count as one image. StoreError as in `revise`, which knows `only_newest`.
    """
    files = list(files_below(folder))
    _require(folder, len(files), "files", allow_small)  # before all are scored, which tells how many are images
    try_store(store, bundle.manifest.name, OWN_STORE)
    before = bundle.manifest.calibration
    begin(len(files) + (len(KINDS) * len(to_be_changed(len(files))) if before.changes else 0))
    session = GateSession(bundle, threads=threads)
    answers = answer_files(session, bundle.manifest.pixels, files, threads=threads, embeddings=False, advance=advance)
    # One picture under many names says no more than it does under one.
    different = np.sort(np.unique(answers.files, return_index=True)[1])
    n, name, score = len(different), name_of(folder), answers.score[different]
    _require(folder, n, "different images", allow_small)
    source = f"{n} clean images, the folder {name}"
    calibration = Calibration.of(source, score)
    if before.changes:
        some = [answers.paths[different[number]] for number in to_be_changed(n)]
        changed = _scores_after_changes(session, bundle.manifest.pixels, some, threads, advance)
        calibration = Calibration.of(source, score, changed)
    card = f"""## Recalibrated on {name}

From {bundle.label}, the same graph. {n} clean images replace the calibration of before ({before.source}); the smallest
max_fpr that they support is {calibration.smallest_budget:.2g}. Rates of false alarms and of
detected attacks that were measured above held for the calibration of before.
{_QUIET.format(calibration.each_alone_from) if calibration.changes else ""}"""
    record = {"recalibrated_on": name, "images": n, "skipped": len(answers.skipped), "sha256": answers.digest}
    fields = {"calibration": calibration}
    place = revise(bundle, store, fields=fields, card=card, record=record, only_newest=only_newest)
    return Recalibrated(place, calibration, answers, score, len(answers.files) - n)


def _require(folder: Path, n: int, what: str, allow_small: bool) -> None:
    """FolderError or BudgetTooSmall where so many images are too few."""
    if n < FEWEST_IMAGES:
        raise FolderError(f"{folder} holds {n} {what}; a calibration needs at least {FEWEST_IMAGES} images")
    needed = images_for(USUAL_BUDGET)
    if n < needed and not allow_small:
        raise BudgetTooSmall(
            f"{folder} holds {n} {what}, and a max_fpr of {USUAL_BUDGET:g} needs {needed}: bring more clean images, or say "
            "--allow-small"
        )


def _scores_after_changes(
    session: GateSession, rule: PixelRule, files: Sequence[Path], threads: int, advance: Callable[[], None]
) -> dict[str, NDArray[np.float32]]:
    """Scores [M] of the pictures in M files after each kind of honest change, made before a small one is enlarged."""
    scores: dict[str, list[NDArray[np.float32]]] = {kind: [] for kind in KINDS}
    with ThreadPoolExecutor(threads, thread_name_prefix="twogate-decode") as pool:
        for start in range(0, len(files), _BATCH):
            pictures = read_small(pool, files[start : start + _BATCH], rule)
            for kind, changed in changed_each_way(pictures, start, rule):
                scores[kind].append(session.run(changed).score)
                for _ in changed:
                    advance()
    return {kind: np.concatenate(found) for kind, found in scores.items()}
