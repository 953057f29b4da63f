"""In what two bundles differ, for people: by their manifests, which have the hash of everything else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from model_store.calibration import Calibration
from model_store.manifest import Branch, Manifest, Task

NOTHING = "-"


@dataclass(frozen=True)
class Difference:
    """One thing that differs, and what each bundle says about it; `NOTHING` where one does not have it."""

    what: str
    before: str
    after: str


def differences(before: Manifest, after: Manifest) -> list[Difference]:
    """All differences but name, version, time and provenance."""
    found = [
        *_each("file", before.files, after.files, lambda digest: digest[:12]),
        *_each("pixels", before.pixels.model_dump(), after.pixels.model_dump(), str),
        *_each("embedding_dim", {"": before.embedding_dim}, {"": after.embedding_dim}, str),
        *_each("branch", _named(before.branches), _named(after.branches), _branch),
    ]
    old, new = ([branch.name for branch in one.branches] for one in (before, after))
    if old != new and sorted(old) == sorted(new):
        found.append(Difference("order of branches", ", ".join(old), ", ".join(new)))
    found += [
        *_each("detector", {"": before.detector.name}, {"": after.detector.name}, str),
        *_each("detector", {"description": before.detector.description}, {"description": after.detector.description}, str),
        *_each("detector", before.detector.parameters, after.detector.parameters, _json),
        *_each("calibration", {"": before.calibration}, {"": after.calibration}, _calibration),
        *_each("task", _named(before.tasks), _named(after.tasks), _task),
    ]
    if before.golden != after.golden:
        same = before.golden.images == after.golden.images
        found.append(Difference("golden vector", "", "other answers for the same images" if same else "other images"))
    return found


def _each(what: str, before: Mapping[str, Any], after: Mapping[str, Any], words: Any) -> Iterator[Difference]:
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old != new:
            told = [NOTHING if value is None else words(value) for value in (old, new)]
            yield Difference(f"{what} {name}".strip(), *told)


def _named(items: tuple[Any, ...]) -> dict[str, Any]:
    return {item.name: item for item in items}


def _branch(branch: Branch) -> str:
    return f"{branch.role}, {branch.embedding_dim}, {branch.description}"


def _task(task: Task) -> str:
    metrics = "".join(f", {name} {value:.3f}" for name, value in task.metrics.items())
    return f"{len(task.classes)} classes, {task.fusion}, {task.trained_on}{metrics}"


def _calibration(calibration: Calibration) -> str:
    middle, top = (calibration.scores[int(share * (calibration.n - 1))] for share in (0.5, 0.99))
    return (
        f"{calibration.n} scores ({calibration.words}), half below {middle:.4g}, 99% below {top:.4g}, "
        f"smallest max_fpr {calibration.smallest_budget:.2g}"
    )


def _json(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
