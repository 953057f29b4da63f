"""Records: one number each, with all that is needed to measure it again. JSON lines, one file per cell of the plan.

A cell is what is computed in one go (one bundle, task, attack, budget and seed). Its file appears whole or not at all, so an
evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hardening.files import write_atomically
from model_store.errors import TwogateError

CLEAN = "clean"


class RecordsError(TwogateError):
    """Records that do not belong together."""


@dataclass(frozen=True)
class Record:
    """One number: what was measured (`metric`), of what (`subject`), on what, under which attack."""

    metric: str
    subject: str
    task: str
    attack: str
    """`clean`, an attack's name, or `change: ...` for an honest change."""
    epsilon: float
    """L-infinity budget in 1/255; 0 where there is none."""
    seed: int
    value: float | list[float]
    """A list only for `scores`, one per image."""
    images: int
    bundle: str = ""
    digest: str = ""
    """The manifest's: which bundle it really was. In records that are part of a bundle, the sha256 of its graph."""
    size: str = ""
    command: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Origin:
    """What all records of an evaluation share."""

    bundle: str
    digest: str
    size: str
    command: str
    commit: str

    @property
    def folder(self) -> str:
        """Where its records lie below `records/`."""
        return self.bundle.replace("/", "-")

    def record(
        self,
        metric: str,
        subject: str,
        task: str,
        attack: str,
        value: float | list[float],
        images: int,
        epsilon: float = 0.0,
        seed: int = 0,
    ) -> Record:
        """A record of this evaluation."""
        return Record(metric, subject, task, attack, epsilon, seed, value, images, **asdict(self))


def check_same(folder: Path, origin: Origin) -> None:
    """RecordsError where a folder holds records that a report would mix with those of `origin`: of another size, of a bundle
    of another name, or of another one under the same label, which would not be measured again."""
    for file in sorted(folder.rglob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            found = Record(**json.loads(next(lines)))
        facts = [("size", found.size, origin.size), ("bundle", _name(found.bundle), _name(origin.bundle))]
        if found.bundle == origin.bundle:
            facts.append(("digest", found.digest[:12], origin.digest[:12]))
        for what, theirs, ours in facts:
            if theirs != ours:
                raise RecordsError(
                    f"{folder} holds records of {found.bundle} of {what} {theirs}, and this is {what} {ours}: one report has "
                    "one size, and bundles of one recipe. Measure into another --out, or move them away"
                )


def check_attacker(folder: Path, images: str) -> None:
    """Note in the folder of records of which training images, by their digest, attackers make universal perturbations and
    baselines are trained; RecordsError where its records are of others, with which a report would mix these."""
    file = folder / "attacker"
    if not file.exists():
        write_atomically(file, images.encode())
    elif (found := file.read_text(encoding="utf-8").strip()) != images:
        raise RecordsError(
            f"{folder} holds records of an attacker with the training images {found}, and the first task's are {images}: "
            "name the same task first, or measure into another --out"
        )


def _name(label: str) -> str:
    return label.partition("/")[0]


def once(file: Path, measure: Callable[[], Iterable[Record]]) -> None:
    """Measure a cell and write its file, unless it is there already."""
    if not file.exists():
        lines = [json.dumps(asdict(record)) for record in measure()]
        write_atomically(file, ("\n".join(lines) + "\n").encode())


def read(folder: Path) -> list[Record]:
    """All records below a folder."""
    return [
        Record(**json.loads(line))
        for file in sorted(folder.rglob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """(mean, standard deviation over runs; 0 for a single run)."""
    found = list(values)
    mean = math.fsum(found) / len(found)
    if len(found) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1))
