from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hardening import heads
from model_store.bundle import load_bundle, verify_bundle
from model_store.store import versions
from tests.cli.conftest import Process, Twogate
from tests.support.tiny_bundle import make_tiny_bundle
from tests.support.toy_images import write_digits


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "digits", train=20, test=5, classes=3)


def test_train_publishes_and_prints_the_folder(twogate: Twogate, own_store: Path, digits: Path) -> None:
    (digits / "train/0/note.txt").write_text("no image")
    shutil.copy(next((digits / "train/0").glob("*.png")), digits / "train/0/copy.png")
    result = twogate("head", "train", "tiny/1", "--task", "digits", "--data", digits, "--store", own_store)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{own_store / 'tiny/3'}\n"
    for words in (
        "skipped",
        "left out 1 files that are copies of others",
        "note: made from tiny/1, though there is tiny/2, whose tasks and calibration are not in it",
        "note.txt",
        "task digits: 3 classes, guarded fusion",
        "validation_clean_acc: ",
        "test_clean_acc: ",
    ):
        assert words in result.stderr
    verify_bundle(own_store / "tiny/3")
    assert load_bundle(own_store / "tiny/3").model == load_bundle(own_store / "tiny/1").model
    shown = twogate("bundle", "show", "tiny", "--store", own_store).stdout
    assert "digits" in shown
    assert "3 classes, guarded, 51 images of 3 classes, the folder digits, validation_clean_acc" in shown
    assert "ok  task digits" in twogate("bundle", "verify", "tiny", "--store", own_store).stdout


def test_the_fusion_can_be_chosen(twogate: Twogate, own_store: Path, digits: Path) -> None:
    arguments = ("head", "train", "tiny", "--task", "d", "--data", digits, "--store", own_store, "--fusion")
    assert twogate(*arguments, "rfdm").exit_code == 0
    assert load_bundle(own_store / "tiny/3").manifest.tasks[0].fusion == "rfdm"
    assert twogate(*arguments, "magic").exit_code == 2


def test_what_was_published_meanwhile_is_not_lost(
    twogate: Twogate, own_store: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "check_head", lambda *_: make_tiny_bundle(own_store))
    result = twogate("head", "train", "tiny", "--task", "d", "--data", digits, "--store", own_store)
    assert result.exit_code == 1
    assert result.stderr.startswith("twogate: tiny/3 was published meanwhile")
    assert "note:" not in result.stderr
    assert versions(own_store, "tiny") == [1, 2, 3]


@pytest.mark.parametrize(
    ("bundle", "task", "message"),
    [
        ("huge", "digits", "twogate: huge: there is no bundle of this name; the store holds tiny"),
        ("tiny/9", "digits", "twogate: tiny/9: there is no version '9'"),
        ("tiny", "My Digits", "twogate: 'My Digits' cannot be a task's name"),
    ],
)
def test_what_was_asked_for_wrongly_is_one_line(
    twogate: Twogate, own_store: Path, digits: Path, bundle: str, task: str, message: str
) -> None:
    result = twogate("head", "train", bundle, "--task", task, "--data", digits, "--store", own_store)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert versions(own_store, "tiny") == [1, 2]


def test_too_few_classes_or_images_are_one_line(process: Process, own_store: Path, digits: Path) -> None:
    for file in sorted((digits / "train/2").iterdir())[4:]:
        file.unlink()
    result = process("head", "train", "tiny", "--task", "d", "--data", digits, "--store", own_store)
    assert result.returncode == 1
    assert result.stderr == "twogate: the class '2' has 4 files and needs at least 5\n"
    for name in ("1", "2"):
        shutil.rmtree(digits / "train" / name)
    result = process("head", "train", "tiny", "--task", "d", "--data", digits, "--store", own_store)
    assert result.returncode == 1
    assert result.stderr.startswith("twogate: ")
    assert "it has only 0" in result.stderr
    assert versions(own_store, "tiny") == [1, 2]


def test_a_damaged_bundle_is_refused(twogate: Twogate, own_store: Path, digits: Path) -> None:
    (own_store / "tiny/2/card.md").write_text("changed")
    result = twogate("head", "train", "tiny", "--task", "d", "--data", digits, "--store", own_store)
    assert result.exit_code == 1
    assert result.stderr.startswith("twogate: tiny/2: card.md: ")
