"""A tiny bundle with a task head whose weights are drawn, not trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hardening.heads import Linear, head_graph
from model_store.bundle import Bundle, load_bundle
from model_store.choices import Fusion
from model_store.manifest import Task, task_file
from model_store.revise import revise
from tests.support.tiny_bundle import BRANCH_DIM, BRANCHES

CLASSES = ("cat", "dog", "fox")


def drawn_heads(classes: int = len(CLASSES), *, seed: int = 0) -> list[Linear]:
    """A head for each branch of the tiny bundle's embedding."""
    rng = np.random.default_rng(seed)
    return [
        Linear(
            branch.name,
            number * BRANCH_DIM,
            rng.normal(0, 6, (BRANCH_DIM, classes)),
            rng.normal(0, 1, classes),
            scale=0.7 + 0.4 * number,
        )
        for number, branch in enumerate(BRANCHES[:3])
    ]


def add_tiny_head(bundle: Path | Bundle, store: Path, name: str = "animals", *, fusion: Fusion = "guarded") -> Path:
    """Publish a tiny bundle with a head for CLASSES; returns the new version's folder."""
    old = load_bundle(bundle) if isinstance(bundle, Path) else bundle
    graph = head_graph(old.manifest, drawn_heads(), fusion)
    return with_graph(old, store, graph, name, fusion=fusion)


def with_graph(
    bundle: Bundle,
    store: Path,
    graph: bytes,
    name: str = "animals",
    *,
    classes: tuple[str, ...] = CLASSES,
    fusion: Fusion = "guarded",
) -> Path:
    """Publish a bundle with any bytes for a head."""
    task = Task(name=name, classes=classes, file=task_file(name), fusion=fusion, trained_on="nothing", metrics={"luck": 0.5})
    others = tuple(one for one in bundle.manifest.tasks if one.name != name)
    return revise(
        bundle, store, fields={"tasks": (*others, task)}, files={task.file: graph}, card=f"## Task {name}", record={}
    )
