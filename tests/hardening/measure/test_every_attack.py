"""Every attack by its name, as `evaluate` and `attack` run it, on a real bundle: pictures within their budget come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hardening.branches import TRIPWIRE
from hardening.graph import Graph
from hardening.measure.knowing import KNOWING, attack_knowing, target_of
from hardening.measure.oblivious import UNIVERSAL, craft_universal, load_universal
from hardening.measure.sizes import SIZES
from hardening.measure.tasks import Task, load_task
from model_store.bundle import Bundle, load_bundle
from tests.hardening.conftest import QuietBars
from tests.support.patterns import patterns

Images = NDArray[np.uint8]
EPSILON, COUNT = 6, 4
PATCH = (11, 13)
"""Where a patch of 3 % lies in a picture of 16 x 16: 2 pixels, 7/32 in from the lower right (3 of 16)."""


@pytest.fixture(scope="module")
def bundle(toy_bundles: tuple[Path, Path]) -> Bundle:
    return load_bundle(toy_bundles[0])


@pytest.fixture(scope="module")
def graph(bundle: Bundle) -> Graph:
    return Graph(bundle.model)


@pytest.fixture(scope="module")
def task(bundle: Bundle, graph: Graph, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    into = tmp_path_factory.mktemp("data")
    return load_task("patterns", task_folder, graph, bundle.manifest, SIZES["smoke"], into, "cpu", QuietBars())


def check(name: str, images: Images, found: Images, patch: bool) -> None:
    assert found.dtype == np.uint8
    assert found.shape == images.shape
    moved = np.abs(found.astype(int) - images)
    assert moved.max() > 0, name
    if patch:
        first, behind = PATCH
        inside = moved[:, first:behind, first:behind]
        assert moved.sum() == inside.sum()
        assert inside.max() > EPSILON  # any colours
    else:
        assert moved.max() <= EPSILON


@pytest.mark.parametrize("name", UNIVERSAL)
def test_a_universal_attack_is_kept_and_applied(name: str, graph: Graph, task: Task, tmp_path: Path) -> None:
    file, victim = tmp_path / "attacks" / "made.npz", graph.encoder(TRIPWIRE)

    def make(seed: int) -> Callable[[Images], Images]:
        surrogate = patterns(8, seed=9)[0]
        craft_universal(name, victim, surrogate, EPSILON, seed, SIZES["smoke"], file, "cpu", QuietBars())
        return load_universal(file)

    images = task.images[:COUNT]
    found = make(0)(images)
    check(name, images, found, patch=name == "pat")
    # It is not made again, whatever is asked for; and it is one for all images, where nothing was clipped.
    np.testing.assert_array_equal(make(1)(images), found)
    if name == "pat":
        first, behind = PATCH
        assert (found[:, first:behind, first:behind] == found[:1, first:behind, first:behind]).all()
    else:
        moved = (found.astype(int) - images)[:, ((found > 0) & (found < 255)).all(axis=0)]
        assert np.ptp(moved, axis=0).max() <= 1  # halves are rounded to even values
        assert (np.ptp(moved, axis=0) == 0).mean() > 0.5


@pytest.mark.parametrize("name", [*KNOWING, "T5-selective@fpr0.2@1"])
def test_an_attack_by_who_knows_the_method_runs_on_the_graph(name: str, bundle: Bundle, graph: Graph, task: Task) -> None:
    target = target_of(graph, task, bundle.manifest, name)
    images = task.images[:COUNT]
    found = attack_knowing(
        name,
        target,
        images,
        task.labels[:COUNT],
        epsilon=EPSILON,
        steps=2,
        restarts=1,
        seed=0,
        device="cpu",
        bars=QuietBars(),
    )
    check(name, images, found, patch=name.startswith("T10"))
