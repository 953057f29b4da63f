from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from hardening.branches import BRANCHES
from hardening.calibrate import Calibrated
from hardening.data import Dataset
from hardening.encoders import Encoder
from hardening.evaluate import (
    ATTACKS,
    CLEAN,
    NOISE,
    PGD,
    RETURNED,
    SINGLE,
    UAP,
    UNDEFENDED,
    Evaluation,
    Record,
    _accuracy,
    _detection,
    evaluate,
)
from hardening.recipe import Evaluate
from model_store.calibration import Calibration
from tests.hardening.conftest import QuietBars

RECIPE = Evaluate(images=40, epsilon=10, pgd_steps=4, pgd_restarts=1, uap_epochs=2, neighbours=5)


def test_accuracy_and_fooling_rate_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    predictions = {
        # Two are wrong before any attack: the 4th and the 5th.
        CLEAN: {"system": np.array([0, 0, 1, 0, 0])},
        # The 1st falls; the 4th is changed into the truth; the 5th from one mistake into another.
        PGD: {"system": np.array([1, 0, 1, 1, 1])},
    }
    found = {(r.metric, r.condition): (r.value, r.images) for r in _accuracy(predictions, labels)}
    assert found == {
        ("clean_acc", CLEAN): (0.6, 5),
        ("robust_acc", PGD): (0.6, 5),
        # Every changed prediction counts, also of images that were wrong before: it is not 1 - robust_acc.
        ("fooling_rate", PGD): (0.6, 5),
    }


def test_detection_by_hand() -> None:
    table = Calibration(source="x", scores=tuple(float(i) for i in range(1, 100)))  # p = (1 + #{>= s}) / 100
    scores = {
        CLEAN: np.array([1, 50, 97, 100], np.float32),
        PGD: np.array([96, 98, 100, 101], np.float32),
        UAP: np.array([0, 0, 0, 100], np.float32),
    }
    fooled = {PGD: np.array([True, False, False, True]), UAP: np.array([False] * 4)}
    found = {(r.metric, r.condition): r.value for r in _detection("d", table, scores, fooled)}
    # p <= 0.05 from 96 on, p <= 0.01 above 99; 99 images promise no 0.001.
    assert found["fpr@0.05", CLEAN] == 0.5
    assert found["fpr@0.01", CLEAN] == 0.25
    assert found["tpr@0.05", PGD] == 1
    assert found["tpr@0.01", PGD] == 0.5
    assert found["tpr_fooled@0.01", PGD] == 0.5
    assert found["auroc", PGD] == pytest.approx((2 + 3 + 3.5 + 4) / 16)
    assert not any("0.001" in metric for metric, _ in found)
    assert ("tpr_fooled@0.05", UAP) not in found


def run(calibrated: Calibrated, victim: Encoder, dataset: Dataset, seed: int = 0) -> Evaluation:
    return evaluate(calibrated, copy.deepcopy(victim), dataset, RECIPE, seed, "cpu", QuietBars())


@pytest.fixture(scope="module")
def evaluation(toy_calibrated: Calibrated, trained_toy: Encoder, toy_dataset: Dataset) -> Evaluation:
    torch.set_num_threads(1)
    return run(toy_calibrated, trained_toy, toy_dataset)


def value(evaluation: Evaluation, metric: str, subject: str, condition: str) -> float:
    found = evaluation.value(metric, subject, condition)
    assert found is not None
    return found


def test_every_number_is_a_share_of_the_images_that_were_asked_for(evaluation: Evaluation) -> None:
    assert len(evaluation.records) == len({(r.metric, r.subject, r.condition) for r in evaluation.records})
    for record in evaluation.records:
        assert 0 <= record.value <= 1, record
        whole = record.value * record.images
        if record.metric != "auroc":
            assert whole == pytest.approx(round(whole)), record
        if not record.metric.startswith(("auroc", "tpr_fooled")):
            assert record.images == 40
    assert {name: len(score) for name, score in evaluation.scores.items()} == dict.fromkeys((CLEAN, NOISE, *ATTACKS), 40)


def test_everything_is_measured(evaluation: Evaluation) -> None:
    for attack in (NOISE, *ATTACKS):
        for system in (UNDEFENDED, SINGLE, "BMP alone", "three branches, RFDM", "three branches, guarded RFDM"):
            assert value(evaluation, "clean_acc", system, CLEAN) > 0.9
            value(evaluation, "robust_acc", system, attack)
            value(evaluation, "fooling_rate", system, attack)
        for subject in (UNDEFENDED, RETURNED):
            value(evaluation, "knn_acc", subject, attack)
    for detector in ("consistency", "paper"):
        for attack in ATTACKS:
            for metric in ("auroc", "tpr@0.01", "tpr@0.05"):
                value(evaluation, metric, detector, attack)
    assert evaluation.value("tpr@0.001", "consistency", PGD) is None  # 112 calibration images cannot promise it


def test_attacks_on_the_victim_are_felt_by_the_victim(evaluation: Evaluation) -> None:
    clean = value(evaluation, "clean_acc", UNDEFENDED, CLEAN)
    assert value(evaluation, "robust_acc", UNDEFENDED, PGD) < clean - 0.3
    assert value(evaluation, "fooling_rate", UNDEFENDED, PGD) > value(evaluation, "fooling_rate", UNDEFENDED, NOISE)
    assert value(evaluation, "knn_acc", UNDEFENDED, PGD) < clean - 0.3


def test_the_calibration_is_not_touched(
    evaluation: Evaluation, toy_calibrated: Calibrated, trained_toy: Encoder, toy_dataset: Dataset
) -> None:
    """Other test images, other numbers; the thresholds stay where clean images put them."""
    before = toy_calibrated.calibration.scores
    images = np.array(toy_dataset.images)
    images[toy_dataset.splits["test"]] = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3))
    other = run(toy_calibrated, trained_toy, dataclasses.replace(toy_dataset, images=images))
    assert toy_calibrated.calibration.scores == before
    assert value(other, "fpr@0.05", "consistency", CLEAN) > 0.5  # noise is no clean photograph, and nothing adapts to it
    assert value(evaluation, "fpr@0.05", "consistency", CLEAN) < 0.2


def test_it_is_repeatable(
    evaluation: Evaluation, toy_calibrated: Calibrated, trained_toy: Encoder, toy_dataset: Dataset
) -> None:
    again = run(toy_calibrated, trained_toy, toy_dataset)
    assert again.records == evaluation.records


def test_without_labels_detection_is_still_measured(
    toy_calibrated: Calibrated, trained_toy: Encoder, toy_dataset: Dataset
) -> None:
    dataset = dataclasses.replace(toy_dataset, labels=np.full_like(toy_dataset.labels, -1), classes=())
    found = run(dataclasses.replace(toy_calibrated, heads={}), trained_toy, dataset)
    metrics = {record.metric.split("@")[0] for record in found.records}
    assert metrics == {"auroc", "tpr", "fpr"}
    assert {record.subject for record in found.records} == {"consistency"}


def test_the_guard_reads_each_branchs_own_confidence(toy_calibrated: Calibrated) -> None:
    # The columns of confidence begin with the branches, in the order of the weights.
    assert toy_calibrated.gate.detector.branches[: len(BRANCHES)] == BRANCHES


def test_records_go_into_json_as_they_are(evaluation: Evaluation) -> None:
    content = evaluation.as_json()
    assert content["settings"]["epsilon"] == 10
    assert [Record(**record) for record in content["records"]] == list(evaluation.records)
