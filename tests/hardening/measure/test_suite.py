"""What a cell measures: by hand, without labels, without a tripwire, and on images that were read before."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardening.branches import BRANCHES
from hardening.calibrate import Calibrated, calibrate
from hardening.data import Dataset
from hardening.encoders import Encoder
from hardening.export import export
from hardening.graph import Graph, GraphError
from hardening.heads import Linear
from hardening.measure import rivals
from hardening.measure.oblivious import code_of, fingerprint
from hardening.measure.records import Origin, Record, read
from hardening.measure.sizes import SIZES
from hardening.measure.suite import Plan, _Room, attack_file, baseline_file, craft_perturbations, measure_task
from hardening.measure.tasks import GUARDED, UNDEFENDED, Task
from model_store.bundle import load_bundle
from model_store.calibration import Calibration
from model_store.manifest import MODEL_FILE, Detector
from model_store.store import publishing
from tests.hardening.conftest import QuietBars

ORIGIN = Origin("toy", "f" * 64, "smoke", "", "abc")
TABLE = Calibration(source="x", scores=tuple(float(i) for i in range(1, 100)))  # p = (1 + #{>= s}) / 100


def judged(
    labels: list[int],
    before: dict[str, list[int]],
    after: dict[str, list[int]],
    clean: list[float],
    attacked: list[float],
) -> dict[tuple[str, str], tuple[float, int]]:
    """(metric, subject) -> (value, images) of a made-up attack."""
    task = SimpleNamespace(
        name="t",
        labels=np.array(labels),
        victim_head=object(),
        own_calibration=TABLE,
        predictions=lambda values, manifest: {name: np.array(found) for name, found in after.items()},
    )
    room = SimpleNamespace(
        plan=SimpleNamespace(origin=ORIGIN),
        task=task,
        manifest=SimpleNamespace(calibration=TABLE),
        predicted={name: np.array(found) for name, found in before.items()},
        before={"score": torch.tensor(clean)},
        values=lambda images, what: {"score": torch.tensor(attacked)},
        neighbours=lambda values, labels: {},
    )
    records = _Room.judged(room, "pgd", 10, 0, np.zeros(0, np.uint8), np.arange(len(labels)))  # type: ignore[arg-type]
    return {(r.metric, r.subject): (r.value, r.images) for r in records if isinstance(r.value, float)}


def test_accuracy_and_fooling_rate_by_hand() -> None:
    # Two are wrong before any attack: the 4th and the 5th. The 1st falls; the 4th is changed into the truth; the 5th from
    # one mistake into another.
    before, after = [0, 0, 1, 0, 0], [1, 0, 1, 1, 1]
    found = judged([0, 0, 1, 1, 2], {GUARDED: before}, {GUARDED: after}, [1.0] * 5, [96, 1, 1, 1, 1])
    assert found["robust_acc", GUARDED] == (0.6, 5)
    # Every changed prediction counts, also of images that were wrong before: it is not 1 - robust_acc.
    assert found["fooling_rate", GUARDED] == (0.6, 5)
    assert found["robust/clean", GUARDED] == (1, 5)
    # Of the three that were right the 1st is wrong now: it passes at 0.01, and is caught at 0.05, its very
    # p-value.
    assert found["success@0.01", "bundle's calibration"] == (pytest.approx(1 / 3), 3)
    assert found["success@0.05", "bundle's calibration"] == (0, 3)


def test_detection_by_hand() -> None:
    systems = {UNDEFENDED: [0] * 4, GUARDED: [0] * 4}
    fooled = {**systems, UNDEFENDED: [1, 0, 0, 1]}
    found = judged([0] * 4, systems, fooled, [1, 50, 97, 100], [96, 98, 100, 101])
    for table in ("bundle's calibration", "recalibrated"):
        # p <= 0.05 from 96 on, p <= 0.01 above 99; 99 images promise no 0.001.
        assert found["tpr@0.05", table] == (1, 4)
        assert found["tpr@0.01", table] == (0.5, 4)
        assert found["tpr_fooled@0.01", table] == (0.5, 2)
    assert found["auroc", "detector"] == (pytest.approx((2 + 3 + 3.5 + 4) / 16), 8)
    assert not any("0.001" in metric for metric, _ in found)
    nobody = judged([0] * 4, systems, systems, [1, 50, 97, 100], [0, 0, 0, 100])
    assert ("tpr_fooled@0.05", "bundle's calibration") not in nobody


def test_the_guard_reads_each_branchs_own_confidence() -> None:
    logits_of = {"mpae_victim": (2.0, 0.0), "mpae_auxiliary": (2.0, 0.0), "bmp": (0.0, 3.0)}
    ours = [Linear(name, 0, np.zeros((1, 2)), np.array(logits)) for name, logits in logits_of.items()]
    values = {"embedding": torch.zeros(1, 1)}
    for order in (BRANCHES, BRANCHES[::-1]):
        manifest = SimpleNamespace(branches=[SimpleNamespace(name=name) for name in order])
        for doubted, expected in (("bmp", 0), ("mpae_victim", 1)):
            confidence = torch.tensor([[0.0 if name[:4] == doubted[:4] else 1.0 for name in order]])
            # The served heads come in the order of the manifest.
            served = tuple(sorted(ours, key=lambda one: order.index(one.branch)))
            task: Task = SimpleNamespace(victim_head=None, served=served)  # type: ignore[assignment]
            task.served_logits = partial(Task.served_logits, task)  # type: ignore[method-assign]
            logits = Task.system_logits(task, {**values, "confidence": confidence}, manifest)  # type: ignore[arg-type]
            assert int(logits[GUARDED].argmax()) == expected


def plan(place: Path, out: Path, **changed: object) -> Plan:
    given = {
        "bundle": place,
        "surrogates": (),
        "size": SIZES["smoke"],
        "attacks": ("noise", "pgd", "uap"),
        "knowing": (),
        "rivals": (),
        "baselines": (),
        "convergence": False,
        "epsilons": (10.0,),
        "seeds": (0,),
        "attackers": "",
        "out": out,
        "origin": ORIGIN,
        "device": "cpu",
    }
    return Plan(**{**given, **changed})  # type: ignore[arg-type]


def measured(plan: Plan, dataset: Dataset, victim: Encoder | None = None) -> list[Record]:
    craft_perturbations(plan, "toy", dataset, "uap", victim, bars=QuietBars())
    measure_task(plan, "toy", dataset, victim, bars=QuietBars())
    return read(plan.out / "records")


def test_without_labels_detection_is_still_measured(
    toy_bundles: tuple[Path, Path], toy_dataset: Dataset, tmp_path: Path
) -> None:
    dataset = dataclasses.replace(toy_dataset, labels=np.full_like(toy_dataset.labels, -1), classes=())
    found = measured(plan(toy_bundles[0], tmp_path), dataset)
    assert {r.metric.split("@")[0] for r in found} == {"auroc", "tpr", "fpr", "scores"}
    assert {r.subject for r in found} == {"detector", "bundle's calibration", "recalibrated"}
    assert {r.attack for r in found} >= {"clean", "noise", "pgd", "uap", "change: blur, sigma 1"}


def test_the_calibration_is_not_touched(toy_bundles: tuple[Path, Path], toy_dataset: Dataset, tmp_path: Path) -> None:
    """Other test images, other numbers; the thresholds stay where clean images put them."""

    def alarms(images: NDArray[np.uint8], out: Path) -> float:
        found = measured(plan(toy_bundles[0], out), dataclasses.replace(toy_dataset, images=images))
        clean = [r for r in found if (r.metric, r.attack) == ("fpr@0.05", "clean")]
        (value,) = [r.value for r in clean if r.subject == "bundle's calibration"]
        assert isinstance(value, float)
        return value

    images = np.array(toy_dataset.images)
    assert alarms(images, tmp_path / "clean") < 0.2
    images[toy_dataset.splits["test"]] = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3))
    assert alarms(images, tmp_path / "noise") > 0.5  # noise is no clean photograph, and nothing adapts to it


def test_an_attack_on_some_images_is_on_some_of_every_class(
    toy_bundles: tuple[Path, Path], toy_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images lie class by class, and the first ones are of the first classes."""
    seen = []

    def attack(_: object, __: object, images: NDArray[np.uint8], labels: NDArray[np.int64], **options: object) -> object:
        seen.append(labels)
        return images

    monkeypatch.setattr("hardening.measure.suite.attack_knowing", attack)
    size = dataclasses.replace(SIZES["smoke"], adaptive_images=8)
    found = measured(plan(toy_bundles[0], tmp_path, attacks=("noise", "uap"), knowing=("T2",), size=size), toy_dataset)
    (labels,) = seen
    assert len(labels) == 8
    assert set(labels.tolist()) == set(range(len(toy_dataset.classes)))
    (success,) = [
        r for r in found if (r.metric, r.subject, r.attack) == ("success@0.05", "bundle's calibration", "white box T2")
    ]
    assert success.value == 0  # unchanged images, judged against their own labels


def test_the_tables_of_other_detectors_know_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Detector:
        def fit(self, *_: object) -> Detector:
            return self

        def score(self, values: dict[str, Tensor]) -> NDArray[np.float64]:
            return values["place"].double().numpy()

    place = torch.arange(100)
    task: Any = SimpleNamespace(
        own_images=np.zeros((100, 1, 1, 3), np.uint8),
        own_values={"place": place},
        gallery={"tripwire": place},
        gallery_labels=place,
        victim_head=object(),
        images=np.zeros((100, 1, 1, 3), np.uint8),
    )
    monkeypatch.setattr(rivals, "Neighbours", Detector)
    monkeypatch.setattr(rivals, "_CLEAN", 12)
    (rival,) = rivals.fit_rivals(task, {"place": place}, torch.nn.Identity(), "cpu", ("nearest neighbours",))
    np.testing.assert_array_equal(rival.table.scores, np.arange(0, 100, 9))


def test_bundles_of_one_public_victim_share_its_attacks(
    toy_bundles: tuple[Path, Path], toy_dataset: Dataset, tmp_path: Path
) -> None:
    def kept() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "attacks").rglob("*.npz")}

    measured(plan(toy_bundles[0], tmp_path, attacks=("pgd", "uap")), toy_dataset)
    made = kept()
    assert len(made) == 2
    other = dataclasses.replace(ORIGIN, bundle="toy/2")
    found = measured(plan(toy_bundles[1], tmp_path, attacks=("pgd", "uap"), origin=other), toy_dataset)
    assert kept() == made
    assert {r.bundle for r in found if r.attack == "pgd"} == {"toy", "toy/2"}
    other_images = dataclasses.replace(toy_dataset, images=255 - np.array(toy_dataset.images))
    measured(plan(toy_bundles[0], tmp_path, attacks=("pgd",), origin=dataclasses.replace(ORIGIN, bundle="x")), other_images)
    assert len(kept()) == 3  # other images, other attacks on them


def test_attacks_are_of_one_public_victim_and_its_normalisation(toy_bundles: tuple[Path, Path]) -> None:
    graph = Graph(load_bundle(toy_bundles[0]).model)
    victim = graph.encoder("tripwire")
    before = fingerprint(victim)
    assert fingerprint(graph.encoder("tripwire")) == before
    read = [id(value) for value in victim.constants if value.is_floating_point()]
    constant = next(name for name, value in graph.constants.items() if id(value) in read)
    graph.constants[constant] = graph.constants[constant] * 1.5 + 1
    assert fingerprint(victim) != before


def test_the_victims_weights_count_once(toy_bundles: tuple[Path, Path]) -> None:
    victim = Graph(load_bundle(toy_bundles[0]).model).encoder("tripwire")
    weights = [value for value in victim.state_dict().values() if value.ndim == 4]
    assert weights
    assert not [c for c in victim.constants if any(c.shape == w.shape and torch.equal(c, w) for w in weights)]


def test_another_bundles_baselines_are_not_taken_for_this_ones(toy_bundles: tuple[Path, Path], tmp_path: Path) -> None:
    files = {
        baseline_file(
            plan(toy_bundles[0], tmp_path, origin=dataclasses.replace(ORIGIN, digest=digest), attackers=images), "mart"
        )
        for digest in ("a" * 64, "b" * 64)
        for images in ("c" * 16, "d" * 16)
    }
    assert len(files) == 4


def test_what_other_code_made_is_made_anew(
    toy_bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = Graph(load_bundle(toy_bundles[0]).model).encoder("tripwire")
    mine = plan(toy_bundles[0], tmp_path)

    def files() -> tuple[Path, Path]:
        return attack_file(mine, "uap", 8, 0, victim), baseline_file(mine, "mart")

    before = files()
    assert files() == before
    package = tmp_path / "another"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    codes = [code_of(name) for name in ("hardening.attacks", "hardening.baselines", "another")]
    assert len(set(codes)) == 3

    def code(text: str) -> str:
        (package / "one.py").write_text(text)
        code_of.cache_clear()
        return code_of("another")

    assert code("STEPS = 1\n") not in (codes[2], code("STEPS = 2\n"))
    assert code("STEPS = 1\n") == code('"""Words."""\n\nSTEPS = 1  # more words\n"""And of it."""\n')
    assert code_of("hardening.attacks") == codes[0]
    monkeypatch.setattr("hardening.measure.suite.code_of", lambda package: {"hardening.attacks": "new"}.get(package, "old"))
    assert files()[0] != before[0]
    assert files()[1] != before[1]


def test_a_bundle_without_a_tripwire_needs_the_public_victim(
    toy_bundles: tuple[Path, Path], toy_calibrated: Calibrated, toy_dataset: Dataset, toy_encoder: Encoder, tmp_path: Path
) -> None:
    paper = calibrate(toy_calibrated.gate.views, toy_dataset, "paper", "cpu", QuietBars())
    manifest = load_bundle(toy_bundles[0]).manifest.model_copy(
        update={
            "branches": load_bundle(toy_bundles[0]).manifest.branches[:3],
            "detector": Detector(name="paper", description=""),
            "calibration": paper.calibration,
        }
    )
    with publishing(tmp_path, "toy") as publication:
        (publication.path / MODEL_FILE).write_bytes(export(copy.deepcopy(paper.gate), toy_dataset.images[:2]))
        place = publication.seal(manifest)
    with pytest.raises(GraphError, match="tripwire"):
        measured(plan(place, tmp_path / "none"), toy_dataset)
    found = measured(plan(place, tmp_path / "out"), toy_dataset, toy_encoder)
    value = {(r.metric, r.subject, r.attack): r.value for r in found if isinstance(r.value, float)}
    assert value["clean_acc", UNDEFENDED, "clean"] > 0.9
    assert value["robust_acc", UNDEFENDED, "pgd"] < value["clean_acc", UNDEFENDED, "clean"] - 0.3
    assert ("knn_acc", UNDEFENDED, "uap") in value
