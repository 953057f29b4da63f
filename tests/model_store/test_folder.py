from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model_store import folder as folder_module
from model_store.bundle import load_bundle
from model_store.folder import FolderError, answer_files, class_names, files_below
from model_store.pixels import PixelRule
from model_store.session import GateOutputs, GateSession
from tests.support.tiny_bundle import smooth_images

RULE = PixelRule(height=32, width=32)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    (place / "b" / ".hidden").mkdir(parents=True)
    for number, picture in enumerate(smooth_images(40, 32, seed=4)):
        Image.fromarray(picture).save(place / ("b" if number % 2 else ".") / f"{number:02}.png")
    (place / "b" / ".hidden" / "x.png").write_bytes(b"")
    (place / ".DS_Store").write_bytes(b"x")
    return place


def test_hidden_files_and_folders_are_not_meant(pictures: Path) -> None:
    found = [str(file.relative_to(pictures)) for file in files_below(pictures)]
    assert found == [f"{n:02}.png" for n in range(0, 40, 2)] + [f"b/{n:02}.png" for n in range(1, 40, 2)]


def test_a_folder_that_cannot_be_read_is_not_left_out(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read every folder, so the system's refusal is played."""

    def scandir(place: Any) -> Any:
        if Path(place) == pictures / "b":
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError) as refused:
        list(files_below(pictures))
    assert refused.value.filename == str(pictures / "b")
    assert list(files_below(pictures / "nowhere")) == []


@pytest.mark.parametrize("name", ["tab\there", "line\nbreak", "bad\udcff", "line\u2028break", "paragraph\u2029break"])
def test_a_name_that_breaks_lines_is_no_class(name: str) -> None:
    with pytest.raises(FolderError, match="cannot be a class"):
        class_names(["cat", name])


def test_names_of_all_scripts_are_classes() -> None:
    class_names(
        ["\u0645\u06cc\u200c\u0634\u0648\u062f", "\u0915\u094d\u200d\u0937", "\u5c71\u3000\u5ddd", "caf\u00e9", "cafe"]
    )


def test_two_names_that_look_the_same_are_refused() -> None:
    with pytest.raises(FolderError, match=r"'cafe\\u0301' and 'caf\\xe9' cannot be two classes"):
        class_names(["caf\u00e9", "cafe\u0301"])


def test_answers_come_in_the_order_of_the_files(tiny_bundle: Path, pictures: Path) -> None:
    session = GateSession(load_bundle(tiny_bundle), threads=1)
    files = list(files_below(pictures))
    files.insert(7, pictures / "gone.png")
    answers = answer_files(session, RULE, files, threads=3)
    order = [int(file.stem) for file in answers.paths]
    expected = session.run(smooth_images(40, 32, seed=4)[order])
    for name in ("embedding", "confidence", "score"):
        np.testing.assert_allclose(getattr(answers, name), getattr(expected, name), atol=1e-6)
    assert [(path.name, reason) for path, reason in answers.skipped] == [
        ("gone.png", "cannot be read (No such file or directory)")
    ]
    assert answer_files(session, RULE, files, embeddings=False).embedding.shape == (40, 0)


def test_a_huge_file_is_not_read(tiny_bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "huge.png").write_bytes(bytes(50_000))
    monkeypatch.setattr(folder_module, "MAX_FILE_BYTES", 40_000)
    answers = answer_files(GateSession(load_bundle(tiny_bundle)), RULE, list(files_below(pictures)))
    assert [(path.name, reason) for path, reason in answers.skipped] == [("huge.png", "the file has more than 40000 bytes")]


def test_an_answer_that_is_no_number_names_the_image(tiny_bundle: Path, pictures: Path) -> None:
    class Broken(GateSession):
        def __init__(self) -> None:
            pass

        def run(self, images: Any) -> GateOutputs:
            score = np.zeros(len(images), np.float32)
            score[3] = np.nan
            return GateOutputs(np.zeros((len(images), 2), np.float32), np.zeros((len(images), 1), np.float32), score)

    with pytest.raises(FolderError, match=r"06\.png: the graph's answer for this image is not finite"):
        answer_files(Broken(), RULE, list(files_below(pictures)))


def test_an_empty_list_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(FolderError, match="no image"):
        answer_files(GateSession(load_bundle(tiny_bundle)), RULE, [])
