from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import kstest

from model_store import recalibrate as recalibrating
from model_store.bundle import load_bundle, verify_bundle
from model_store.calibration import BudgetTooSmall, Calibration
from model_store.folder import FolderError
from model_store.honest import KINDS, changed_each_way
from model_store.pixels import PixelRule, to_input
from model_store.recalibrate import recalibrate
from model_store.revise import revise
from model_store.session import GateSession
from model_store.store import StoreError, versions
from tests.support.tiny_bundle import make_tiny_bundle, noisy_images, smooth_images

RULE = PixelRule(height=32, width=32)


def domain(n: int, seed: int) -> NDArray[np.uint8]:
    """Clean pictures of another kind: with much more grain than those that the tiny bundle was calibrated on."""
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 1, (n, 32, 32, 3)) * rng.uniform(8, 40, (n, 1, 1, 1))
    return (smooth_images(n, 32, seed=seed) + grain).clip(0, 255).astype(np.uint8)


def write(pictures: NDArray[np.uint8], folder: Path) -> Path:
    for number, picture in enumerate(pictures):
        place = folder / str(number % 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number}.png")
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "store")


def test_p_values_of_fresh_clean_images_are_uniform(old: Path, tmp_path: Path) -> None:
    was = {file.name: file.read_bytes() for file in old.iterdir()}
    done = recalibrate(load_bundle(old), old.parents[1], write(domain(400, 1), tmp_path / "scans"))
    verify_bundle(done.place)
    before, after = load_bundle(old), load_bundle(done.place)
    assert after.model == before.model
    assert after.manifest.calibration.source == "400 clean images, the folder scans"
    assert after.manifest.calibration.n == 400
    fresh = GateSession(after).run(domain(600, 2)).score
    p_before, p_after = (bundle.manifest.calibration.p_value(fresh) for bundle in (before, after))
    assert kstest(p_before, "uniform").pvalue < 1e-6
    assert kstest(p_after, "uniform").pvalue > 0.05
    for budget in (0.01, 0.05):
        assert (p_before <= budget).mean() > 0.5
        assert (p_after <= budget).mean() <= budget + 3 * np.sqrt(budget * (1 - budget) * (1 / 600 + 1 / 400))
    # What the detector sees is still seen.
    noise = GateSession(after).run(noisy_images(20, 32, seed=3)).score
    assert (after.manifest.calibration.p_value(noise) <= 0.01).all()
    assert {file.name: file.read_bytes() for file in old.iterdir()} == was


@pytest.fixture
def quiet(old: Path, tmp_path: Path) -> Path:
    """A bundle that promises to be quiet on honest changes."""
    bundle = load_bundle(old)
    table = Calibration.of("few", bundle.manifest.calibration.scores, dict.fromkeys(KINDS, (0.0,)))
    return revise(bundle, tmp_path / "quiet", fields={"calibration": table}, card="", record={})


def test_who_promised_to_be_quiet_on_changes_promises_it_of_the_new_domain(old: Path, quiet: Path, tmp_path: Path) -> None:
    folder, steps = write(smooth_images(301, 32, seed=5), tmp_path / "scans"), list[int]()
    loud = recalibrate(load_bundle(old), old.parents[1], folder)
    done = recalibrate(
        load_bundle(quiet), quiet.parents[1], folder, threads=2, begin=steps.append, advance=lambda: steps.append(1)
    )
    assert steps[0] == sum(steps[1:]) == 301 + len(KINDS) * 151
    table = load_bundle(done.place).manifest.calibration
    assert (table.n, table.changes, loud.calibration.changes) == (301, KINDS, ())
    assert "after each honest change too" in (done.place / "card.md").read_text()
    session, budget = GateSession(load_bundle(done.place)), 0.05
    fresh = smooth_images(400, 32, seed=6)
    allowed = 2 * budget + 3 * np.sqrt(2 * budget * (1 / 400 + 1 / 151))
    flagged = {kind: session.run(changed).score for kind, changed in changed_each_way(fresh, 7, RULE)}
    assert max((loud.calibration.p_value(score) <= budget).mean() for score in flagged.values()) > 0.5
    assert max((table.p_value(score) <= budget).mean() for score in flagged.values()) <= allowed


def test_small_pictures_are_changed_before_they_are_enlarged(quiet: Path, tmp_path: Path) -> None:
    """Crisp letters on a picture that was enlarged come from nowhere, and a table raised to them lets attacks pass."""
    small = smooth_images(199, 16, seed=5)
    large = np.stack([to_input(Image.fromarray(picture), RULE) for picture in small])
    of_small, of_large = (
        recalibrate(load_bundle(quiet), tmp_path / name, write(pictures, tmp_path / "pictures" / name)).calibration
        for name, pictures in (("small", small), ("large", large))
    )
    session, budget = GateSession(load_bundle(quiet)), 0.05
    clean = session.run(large).score
    assert of_small.smallest_budget == of_large.smallest_budget
    assert (np.array(of_small.scores) >= np.sort(clean)).all()
    assert of_small.p_value(np.quantile(of_large.scores, 1 - budget)) < budget
    fresh = list(smooth_images(200, 16, seed=6))
    for kind, changed in changed_each_way(fresh, 7, RULE):
        flagged = (of_small.p_value(session.run(changed).score) <= budget).mean()
        assert flagged <= 2 * budget + 3 * np.sqrt(2 * budget * (1 / 200 + 1 / 100)), kind


def test_a_file_that_is_gone_before_its_changes_are_scored_is_named(quiet: Path, tmp_path: Path) -> None:
    folder = write(smooth_images(99, 32, seed=5), tmp_path / "scans")
    first, left = folder / "0" / "0.png", iter(range(98, -1, -1))

    def advance() -> None:
        if next(left, 1) == 0:
            first.unlink()

    with pytest.raises(FolderError, match=r"0\.png has changed meanwhile: cannot be read"):
        recalibrate(load_bundle(quiet), quiet.parents[1], folder, advance=advance)
    assert versions(quiet.parents[1], "tiny") == [1]


def test_the_card_and_the_record_say_so(old: Path, tmp_path: Path) -> None:
    done = recalibrate(load_bundle(old), old.parents[1], write(domain(120, 1), tmp_path / "scans"))
    card = (done.place / "card.md").read_text()
    assert "## Recalibrated on scans" in card
    assert "From tiny/1" in card
    assert (
        "Rates of false alarms and of\ndetected attacks that were measured above held for the calibration of before." in card
    )
    assert "smallest\nmax_fpr that they support is 0.0083" in card
    (revision,) = load_bundle(done.place).manifest.provenance["revisions"]
    assert (revision["recalibrated_on"], revision["images"], revision["skipped"]) == ("scans", 120, 0)
    assert len(revision["sha256"]) == 64


def test_the_same_folder_gives_the_same_table(old: Path, tmp_path: Path) -> None:
    folder = write(domain(110, 1), tmp_path / "scans")
    one, two = (recalibrate(load_bundle(old), old.parents[1], folder, threads=threads) for threads in (1, 3))
    np.testing.assert_allclose(one.calibration.scores, two.calibration.scores, atol=1e-6)
    assert one.answers.digest == two.answers.digest
    assert one.answers.paths == two.answers.paths


def test_too_few_images_are_refused(old: Path, tmp_path: Path) -> None:
    bundle, store = load_bundle(old), old.parents[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match="at least 19 images"):
        recalibrate(bundle, store, tmp_path / "empty")
    with pytest.raises(FolderError, match="at least 19 images"):
        recalibrate(bundle, store, write(domain(18, 1), tmp_path / "few"), allow_small=True)
    small = write(domain(98, 1), tmp_path / "small")
    with pytest.raises(BudgetTooSmall, match=r"small holds 98 files, and a max_fpr of 0\.01 needs 99: .* --allow-small"):
        recalibrate(bundle, store, small)
    assert versions(store, "tiny") == [1]
    assert recalibrate(bundle, store, small, allow_small=True).calibration.n == 98
    assert recalibrate(bundle, store, write(domain(99, 1), tmp_path / "enough")).place.name == "3"


def test_a_store_that_takes_nothing_is_refused_before_anything_is_scored(old: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    folder, begun = write(domain(99, 1), tmp_path / "scans"), list[int]()
    with pytest.raises(StoreError, match=r"cannot be written \(.*\); copy the bundle's folder"):
        recalibrate(load_bundle(old), tmp_path / "file", folder, begin=begun.append)
    assert not begun


def test_copies_of_a_picture_say_no_more_than_it_does(old: Path, tmp_path: Path) -> None:
    pictures = domain(60, 1)
    bundle, store = load_bundle(old), old.parents[1]
    folder = write(pictures.repeat(2, axis=0), tmp_path / "copies")
    with pytest.raises(BudgetTooSmall, match="holds 60 different images"):
        recalibrate(bundle, store, folder)
    done = recalibrate(bundle, store, folder, allow_small=True)
    assert (done.calibration.n, done.copies) == (60, 60)
    once = recalibrate(bundle, store, write(pictures, tmp_path / "once"), allow_small=True)
    assert done.calibration.scores == once.calibration.scores
    assert len(done.score) == 60


def test_changes_are_made_to_one_of_each_pictures_copies(
    quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = write(domain(99, 1), tmp_path / "scans"), list[bytes]()
    for number in range(50):
        shutil.copy(folder / "0" / "0.png", folder / "0" / f"!{number}.png")
    real = recalibrating.read_small

    def read_small(pool: ThreadPoolExecutor, files: Sequence[Path], rule: PixelRule) -> list[NDArray[np.uint8]]:
        read.extend(file.read_bytes() for file in files)
        return real(pool, files, rule)

    monkeypatch.setattr(recalibrating, "read_small", read_small)
    done = recalibrate(load_bundle(quiet), quiet.parents[1], folder)
    assert (done.calibration.n, done.copies) == (99, 50)
    assert len(set(read)) == len(read) == 50


def test_a_folder_of_any_name_is_named(old: Path, tmp_path: Path) -> None:
    folder = write(domain(99, 1), Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff")))
    done = recalibrate(load_bundle(old), old.parents[1], folder)
    assert done.calibration.source == "99 clean images, the folder bad\\xff"


def test_files_that_are_no_images_are_listed_or_too_many(old: Path, tmp_path: Path) -> None:
    folder = write(domain(99, 1), tmp_path / "scans")
    for number in range(11):
        (folder / f"note-{number}.txt").write_text("no image")
    (folder / ".hidden.txt").write_text("not even counted")
    steps: list[int] = []
    done = recalibrate(
        load_bundle(old), old.parents[1], folder, begin=lambda files: steps.append(files), advance=lambda: steps.append(1)
    )
    assert steps[0] == 110
    assert sum(steps[1:]) == 110
    assert done.calibration.n == 99
    assert len(done.answers.skipped) == 11
    (folder / "note-11.txt").write_text("one too many")
    with pytest.raises(
        FolderError, match=r"12 of 111 files are no usable images, and at most a tenth may be; the first is .*note-0\.txt"
    ):
        recalibrate(load_bundle(old), old.parents[1], folder)
    assert versions(old.parents[1], "tiny") == [1, 2]


def test_many_unreadable_files_among_few_are_refused(old: Path, tmp_path: Path) -> None:
    folder = write(domain(18, 1), tmp_path / "scans")
    (folder / "note.txt").write_text("no image")
    with pytest.raises(FolderError, match="holds 18 different images"):
        recalibrate(load_bundle(old), old.parents[1], folder, allow_small=True)
