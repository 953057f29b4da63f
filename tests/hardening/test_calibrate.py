from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE, train_head
from hardening.calibrate import Calibrated, assemble, calibrate, collect, run_gate
from hardening.data import Dataset
from hardening.detectors import ConsistencyDetector
from hardening.encoders import Encoder, ScaledConv2d, features
from hardening.recipe import RecipeError
from model_store.honest import KINDS, changed_each_way
from tests.hardening.conftest import QuietBars


def test_the_table_is_the_score_of_the_calibration_split(
    toy_calibrated: Calibrated, toy_dataset: Dataset, bars: QuietBars
) -> None:
    images, _ = toy_dataset.take("calibration")
    _, _, score = run_gate(toy_calibrated.gate, images, "cpu", bars, "again")
    assert toy_calibrated.calibration.scores == tuple(np.sort(score.astype(float)).tolist())
    assert toy_calibrated.calibration.n == len(toy_dataset.splits["calibration"]) == 112
    assert toy_calibrated.calibration.source == "112 clean images, held out of train/"


def test_fresh_clean_images_get_the_promised_false_positives(
    toy_calibrated: Calibrated, toy_dataset: Dataset, bars: QuietBars
) -> None:
    fresh = np.concatenate([toy_dataset.take(name)[0] for name in ("test", "local")])
    _, _, score = run_gate(toy_calibrated.gate, fresh, "cpu", bars, "fresh")
    p = toy_calibrated.calibration.p_value(score)
    assert (p <= 0.05).mean() < 0.15
    assert (p <= 0.5).mean() == pytest.approx(0.5, abs=0.2)


def test_test_images_and_their_labels_change_nothing(toy_calibrated: Calibrated, toy_dataset: Dataset) -> None:
    """The threshold is fixed before any test image, clean or attacked, is seen."""
    images = np.array(toy_dataset.images)
    images[toy_dataset.splits["test"]] = 0
    labels = toy_dataset.labels.copy()
    labels[toy_dataset.splits["test"]] = 0
    other = dataclasses.replace(toy_dataset, images=images, labels=labels)
    again = calibrate(toy_calibrated.gate.views, other, "consistency", "cpu", QuietBars())
    assert again.calibration.scores == toy_calibrated.calibration.scores


def test_a_calibration_folder_is_named_as_the_source(toy_calibrated: Calibrated, toy_dataset: Dataset) -> None:
    def source(prefix: str) -> str:
        paths = list(toy_dataset.paths)
        for index in toy_dataset.splits["calibration"]:
            paths[index] = f"{prefix}{index}.png"
        other = dataclasses.replace(toy_dataset, paths=tuple(paths))
        return calibrate(toy_calibrated.gate.views, other, "consistency", "cpu", QuietBars()).calibration.source

    assert source("calibration/") == "112 clean images, the data's folder calibration/"
    assert source("calibration-") == "112 clean images, held out of train/"


def test_heads_on_what_is_collected_know_the_classes(
    toy_calibrated: Calibrated, toy_dataset: Dataset, bars: QuietBars
) -> None:
    (fit, labels), (test, truth) = toy_dataset.take("fit"), toy_dataset.take("test")
    known, found = (collect(toy_calibrated.gate.views, x, BRANCHES, "cpu", bars, "heads") for x in (fit, test))
    for name in BRANCHES:
        assert (train_head(known[name], labels)(found[name]).argmax(1).numpy() == truth).mean() > 0.9


def unlabelled(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, labels=np.full_like(dataset.labels, -1), classes=())


def test_without_labels_there_is_no_papers_rule(toy_calibrated: Calibrated, toy_dataset: Dataset) -> None:
    views = toy_calibrated.gate.views
    found = calibrate(views, unlabelled(toy_dataset), "consistency", "cpu", QuietBars())
    assert found.calibration.scores == toy_calibrated.calibration.scores
    with pytest.raises(RecipeError, match="needs labelled images"):
        calibrate(views, unlabelled(toy_dataset), "paper", "cpu", QuietBars())


def test_the_papers_rule(toy_calibrated: Calibrated, toy_dataset: Dataset, bars: QuietBars) -> None:
    found = calibrate(toy_calibrated.gate.views, toy_dataset, "paper", "cpu", bars)
    assert found.gate.detector.name == "paper"
    assert -1 <= found.calibration.scores[0] <= found.calibration.scores[-1] <= 1
    _, confidence, score = run_gate(found.gate, toy_dataset.take("test")[0], "cpu", bars, "test")
    assert confidence.shape == (60, 3)
    np.testing.assert_allclose(score, confidence[:, :2].mean(1) - confidence[:, 2], atol=1e-5)


def test_assembly_ships_folded_rounded_weights_and_keeps_each_in_its_place(
    toy_encoder: Encoder, toy_dataset: Dataset
) -> None:
    tuned = {role: copy.deepcopy(toy_encoder) for role in ("victim", "auxiliary", "bmp")}
    with torch.no_grad():
        for factor, encoder in enumerate(tuned.values(), start=2):
            encoder.network.get_submodule("bn1").weight.mul_(factor)  # type: ignore[operator]
    images, _ = toy_dataset.take("fit")
    expected = {role: features(encoder, images) for role, encoder in tuned.items()}
    views = assemble(toy_encoder, tuned, images[:8])
    for branch, role in ((MPAE[0], "victim"), (MPAE[1], "auxiliary"), (BMP, "bmp")):
        found = features(views.encoders[branch], images)
        assert ((found - expected[role]).norm() / expected[role].norm()) < 0.05
    kinds = {type(module) for module in views.modules()}
    assert not kinds & {torch.nn.BatchNorm2d, ScaledConv2d}
    assert not any(p.requires_grad for p in views.parameters())
    assert not views.training


def test_a_calibration_folder_teaches_the_evidence_and_keeps_the_promise(
    toy_calibrated: Calibrated, toy_dataset: Dataset, bars: QuietBars
) -> None:
    paths = list(toy_dataset.paths)
    for index in toy_dataset.splits["calibration"]:
        paths[index] = f"calibration/{index}.png"
    other = dataclasses.replace(toy_dataset, paths=tuple(paths))
    again = calibrate(toy_calibrated.gate.views, other, "consistency", "cpu", bars)
    count = len(toy_dataset.splits["fit"]) + len(toy_dataset.splits["calibration"])
    assert again.gate.detector.parameters_for_people()["fitted_on"] == count
    fresh = np.concatenate([toy_dataset.take(name)[0] for name in ("test", "local")])
    _, _, score = run_gate(again.gate, fresh, "cpu", bars, "fresh")
    assert (again.calibration.p_value(score) <= 0.05).mean() < 0.15
    assert (again.calibration.p_value(score) <= 0.5).mean() == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("folder", ["calibration/", "train/"])
def test_a_calibration_on_changes_is_quiet_on_each_of_them(
    toy_calibrated: Calibrated, toy_dataset: Dataset, bars: QuietBars, folder: str, tmp_path: Path
) -> None:
    paths = list(toy_dataset.paths)
    (tmp_path / folder).mkdir()
    for index in toy_dataset.splits["calibration"]:
        paths[index] = f"{folder}{index}.png"
        Image.fromarray(toy_dataset.images[index]).save(tmp_path / paths[index])
    other = dataclasses.replace(toy_dataset, paths=tuple(paths), root=tmp_path)
    loud, quiet = (
        calibrate(toy_calibrated.gate.views, other, "consistency", "cpu", bars, quiet_on_changes=on) for on in (False, True)
    )
    assert (loud.calibration.changes, quiet.calibration.changes) == ((), KINDS)
    assert quiet.calibration.source == loud.calibration.source
    assert (np.array(quiet.calibration.scores) >= loud.calibration.scores).all()
    fresh = np.concatenate([toy_dataset.take(name)[0] for name in ("test", "local")])
    flagged = {}
    for kind, changed in changed_each_way(list(fresh), 1, toy_dataset.rule):
        score = run_gate(quiet.gate, changed, "cpu", bars, kind)[2]
        flagged[kind] = [(table.calibration.p_value(score) <= 0.05).mean() for table in (loud, quiet)]
    before, after = np.array(list(flagged.values())).T
    assert before.max() > 0.2, flagged
    # Twice 0.05, and three standard errors of what 56 copies and the fresh ones can tell.
    assert after.max() <= 0.1 + 3 * np.sqrt(0.1 * 0.9 * (1 / 56 + 1 / len(fresh))), flagged


def test_each_image_of_a_calibration_folder_is_judged_by_those_who_learned_changed_copies_of_others(
    toy_calibrated: Calibrated, toy_dataset: Dataset, bars: QuietBars, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Tensor] = []
    real = ConsistencyDetector.fit.__func__  # type: ignore[attr-defined]

    def fit(cls: type[ConsistencyDetector], found: dict[str, Tensor]) -> ConsistencyDetector:
        fits.append(found[TRIPWIRE])
        fitted: ConsistencyDetector = real(cls, found)
        return fitted

    monkeypatch.setattr(ConsistencyDetector, "fit", classmethod(fit))
    paths = list(toy_dataset.paths)
    for index in toy_dataset.splits["calibration"]:
        paths[index] = f"calibration/{index}.png"
    views = toy_calibrated.gate.views
    calibrate(views, dataclasses.replace(toy_dataset, paths=tuple(paths)), "consistency", "cpu", bars)
    own, theirs = (
        collect(views, toy_dataset.take(split)[0], (TRIPWIRE,), "cpu", bars, "as they are")[TRIPWIRE]
        for split in ("fit", "calibration")
    )
    *folds, last = fits
    assert len(last) == len(own) + len(theirs)
    # Nearly every honest change moves the features; none is fitted as it is.
    assert (last != torch.cat([own, theirs])).any(dim=1).float().mean() > 0.9
    learned = last[len(own) :]
    fitted_on = torch.stack([(learned[:, None] == fold[None, len(own) :]).all(dim=2).any(dim=1) for fold in folds])
    assert [len(fold) - len(own) for fold in folds] == fitted_on.sum(dim=1).tolist()
    assert fitted_on.sum(dim=0).tolist() == [4] * len(theirs)  # of five
