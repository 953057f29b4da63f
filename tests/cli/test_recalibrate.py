from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from model_store import recalibrate as module
from model_store.bundle import load_bundle, verify_bundle
from model_store.calibration import Calibration
from model_store.honest import KINDS
from model_store.revise import revise
from model_store.store import versions
from tests.cli.conftest import Process, Twogate
from tests.conftest import REPOSITORY
from tests.support.tiny_bundle import make_tiny_bundle, smooth_images


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """120 clean images, in two levels."""
    folder = tmp_path / "scans"
    (folder / "below").mkdir(parents=True)
    for number, picture in enumerate(smooth_images(120, 32, seed=7)):
        Image.fromarray(picture).save(folder / ("below" if number % 2 else ".") / f"{number:03}.png")
    return folder


def test_it_publishes_and_says_what_is_promised(twogate: Twogate, own_store: Path, scans: Path) -> None:
    (scans / "note.txt").write_text("no image")
    result = twogate("recalibrate", "tiny/1", "--data", scans, "--store", own_store)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{own_store / 'tiny/3'}\n"
    skipped, note, calibrated, *budgets = result.stderr.splitlines()
    assert skipped.startswith(f"skipped {scans / 'note.txt'}: accepted are")
    assert note == "note: made from tiny/1, though there is tiny/2, whose tasks and calibration are not in it"
    assert calibrated == "calibrated on 120 clean images; the smallest max_fpr is 0.0083"
    assert [line.strip() for line in budgets] == [
        "max_fpr 0.001 needs 999 images",
        "max_fpr 0.01 is supported",
        "max_fpr 0.05 is supported",
    ]
    verify_bundle(own_store / "tiny/3")
    manifest = load_bundle(own_store / "tiny/3").manifest
    assert (manifest.calibration.n, manifest.calibration.source) == (120, "120 clean images, the folder scans")


def test_what_was_published_meanwhile_is_not_lost(
    twogate: Twogate, own_store: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: object, **options: object) -> object:
        make_tiny_bundle(own_store)
        return answer(*arguments, **options)  # type: ignore[arg-type]

    answer = module.answer_files
    monkeypatch.setattr(module, "answer_files", slow)
    result = twogate("recalibrate", "tiny", "--data", scans, "--store", own_store)
    assert result.exit_code == 1
    assert result.stderr.startswith("twogate: tiny/3 was published meanwhile")
    assert versions(own_store, "tiny") == [1, 2, 3]


def test_it_says_what_being_quiet_on_changes_leaves(twogate: Twogate, own_store: Path, scans: Path) -> None:
    bundle = load_bundle(own_store / "tiny/2")
    table = Calibration.of("few", bundle.manifest.calibration.scores, dict.fromkeys(KINDS, (0.0,)))
    revise(bundle, own_store, fields={"calibration": table}, card="", record={})
    result = twogate("recalibrate", "tiny/3", "--data", scans, "--store", own_store)
    assert result.exit_code == 0, result.stderr
    changes, alone, left = result.stderr.splitlines()[-3:]
    assert changes == f"  twice that at most after each of {', '.join(KINDS)}"
    assert alone == "  (from 0.041 on; below, after all of them together: bring more images for less)"
    assert re.fullmatch(r"  of the images themselves, unchanged, 0\.[08]% are flagged at 0\.01", left)


def test_too_few_images_are_refused_unless_allowed(process: Process, own_store: Path, scans: Path) -> None:
    for file in sorted(scans.rglob("*.png"))[50:]:
        file.unlink()
    result = process("recalibrate", "tiny", "--data", scans, "--store", own_store)
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"{scans} holds 50 files, and a max_fpr of 0.01 needs 99" in result.stderr
    assert result.stderr.count("\n") == 1
    assert versions(own_store, "tiny") == [1, 2]
    result = process("recalibrate", "tiny", "--data", scans, "--store", own_store, "--allow-small")
    assert result.returncode == 0
    assert "max_fpr 0.01 needs 99 images" in result.stderr
    for file in sorted(scans.rglob("*.png"))[18:]:
        file.unlink()
    result = process("recalibrate", "tiny", "--data", scans, "--store", own_store, "--allow-small")
    assert result.returncode == 1
    assert "at least 19 images" in result.stderr
    assert versions(own_store, "tiny") == [1, 2, 3]


def test_a_folder_of_other_things_is_refused(twogate: Twogate, own_store: Path, scans: Path) -> None:
    for number in range(20):
        (scans / f"note-{number}.txt").write_text("no image")
    result = twogate("recalibrate", "tiny", "--data", scans, "--store", own_store)
    assert result.exit_code == 1
    assert "20 of 140 files are no usable images" in result.stderr
    assert versions(own_store, "tiny") == [1, 2]


def test_an_unknown_bundle_is_one_line(twogate: Twogate, own_store: Path, scans: Path) -> None:
    result = twogate("recalibrate", "huge", "--data", scans, "--store", own_store)
    assert result.exit_code == 1
    assert result.stderr == "twogate: huge: there is no bundle of this name; the store holds tiny\n"


BLOCKED = """
import sys
for name in ("torch", "sklearn", "onnx", "scipy", "pyarrow", "hardening"):
    sys.modules[name] = None
from cli.main import app
app(prog_name="twogate")
"""


def test_the_serving_installation_suffices(own_store: Path, scans: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, "recalibrate", "tiny", "--data", str(scans), "--store", str(own_store)]
    result = subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert versions(own_store, "tiny") == [1, 2, 3]
