"""A real service on a loopback port, attacked from outside at toy size."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hardening.attacks.blackbox import square
from hardening.measure.live import LiveService, ServiceError
from hardening.measure.photographs import FORMATS, RETURNED, SERVICE, photograph
from hardening.measure.probe import probe_blackbox, probe_photographs, write_page
from hardening.measure.querying import QUERIES, SUCCESS, Attacker
from hardening.measure.records import Record, read
from hardening.measure.tasks import UNDEFENDED
from hardening.process import DeviceError
from model_store.bundle import load_bundle
from model_store.errors import TwogateError
from model_store.session import GateSession
from service.settings import Settings
from tests.hardening.conftest import QuietBars
from tests.service.support import ThreadServer, png, thread_server
from tests.support.patterns import patterns, write_pictures

SIDES = (60, 150)


@pytest.fixture(scope="module")
def served(toy_bundles: tuple[Path, Path]) -> Iterator[ThreadServer]:
    place = toy_bundles[0]
    # So small that one photograph's files need several requests.
    settings = Settings(store=place.parent.parent, bundle=f"toy/{place.name}", max_fpr=0.05, max_images=3, threads=1)
    with thread_server(settings) as server:
        yield server


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(patterns(2, 32)[0][:6]):
        Image.fromarray(image[: 32 if number else 24]).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not a photograph")
    return folder


@pytest.fixture(scope="module")
def out(
    served: ThreadServer, toy_bundles: tuple[Path, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    probe_photographs(
        toy_bundles[0],
        served.url,
        pictures,
        folder,
        sides=SIDES,
        epsilon=24,
        size="smoke",
        command=["twogate", "probe"],
        bars=QuietBars(),
    )
    return folder


def value(records: list[Record], metric: str, subject: str, task: str, attack: str) -> float:
    (found,) = [r for r in records if (r.metric, r.subject, r.task, r.attack) == (metric, subject, task, attack)]
    assert isinstance(found.value, float)
    return found.value


def test_every_cell_of_photographs(out: Path, pictures: Path) -> None:
    records = read(out / "photographs")
    (folder,) = {r.task.split(", ")[0] for r in records}
    assert folder.startswith(f"{pictures.name}-")
    for side in SIDES:
        for name in FORMATS:
            task = f"{folder}, {side} px, {name}"
            assert 0 <= value(records, "fpr@0.05", SERVICE, task, "clean") < 0.5
            for attack in ("input size", "resize rule"):
                assert 0.5 < value(records, "tpr@0.05", SERVICE, task, attack) <= 1
                # In every format it is still an attack, on the undefended victim and on what is returned.
                assert value(records, "cosine", UNDEFENDED, task, attack) < 0.6
                assert value(records, "cosine", RETURNED, task, attack) < 0.6
        lossless = f"{folder}, {side} px, PNG"
        rule = value(records, "cosine", UNDEFENDED, lossless, "resize rule")
        assert rule < value(records, "cosine", UNDEFENDED, lossless, "input size")
    # The toy's calibration supports no stricter budget, and none is claimed.
    assert not [r for r in records if r.metric.endswith("@0.01")]
    assert {r.images for r in records} == {6}


def test_the_page_comes_from_the_records_alone(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "photographs", tmp_path / "photographs")
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert text == (out / "probe.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if " px, " in line]
    assert len(rows) == len(SIDES) * len(FORMATS) * 3
    assert "60 px" in rows[0]
    assert "150 px" in rows[-1]
    assert "twogate probe" in text


def test_other_pictures_in_a_folder_of_the_same_name_are_rows_of_their_own(
    served: ThreadServer, toy_bundles: tuple[Path, Path], pictures: Path, tmp_path: Path
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    pages = []
    for name in (b"0.png", b"odd\xff.png"):
        shutil.copy(pictures / "0.png", os.fsencode(root) + b"/" + name)
        page = probe_photographs(
            toy_bundles[0], served.url, root, tmp_path / "out", sides=(60,), epsilon=24, size="smoke", bars=QuietBars()
        )
        pages.append([line for line in page.read_text(encoding="utf-8").splitlines() if " px, " in line])
    assert set(pages[0]) < set(pages[1])
    assert len(pages[1]) == 2 * len(pages[0])


def test_what_is_there_is_not_measured_again(
    out: Path, served: ThreadServer, toy_bundles: tuple[Path, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(sides: tuple[int, ...]) -> None:
        probe_photographs(toy_bundles[0], served.url, pictures, out, sides=sides, epsilon=24, size="smoke", bars=QuietBars())

    asked: list[int] = []
    real = LiveService.ask

    def counted(self: LiveService, images: list[bytes]) -> object:
        asked.append(len(images))
        return real(self, images)

    monkeypatch.setattr(LiveService, "ask", counted)
    before = {file: file.read_bytes() for file in (out / "photographs").rglob("*.jsonl")}
    run(SIDES)
    assert not asked
    # One attacker's cell is gone: that one and the clean photographs are asked about, and the numbers are the same.
    lost = next(file for file in before if file.name.startswith("00060-resize-rule"))
    lost.unlink()
    run(SIDES)
    assert sum(asked) == 2 * 6 * len(FORMATS)
    again = [r.value for r in read(lost.parent) if (r.attack, r.task.split(", ")[1]) == ("resize rule", "60 px")]
    assert len(again) == 3 * len(FORMATS)
    assert {f.name for f in before} == {f.name for f in (out / "photographs").rglob("*.jsonl")}


def test_a_photograph_is_upright_and_of_the_side_that_was_asked_for(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # stored sideways
    picture.save(tmp_path / "sideways.jpg", exif=exif)
    assert photograph(tmp_path / "sideways.jpg", 80).shape == (80, 60, 3)
    assert photograph(tmp_path / "sideways.jpg", 20).shape == (20, 15, 3)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(TwogateError, match=r"broken\.jpg"):
        photograph(tmp_path / "broken.jpg", 80)


def test_refusals_before_any_work(
    served: ThreadServer, toy_bundles: tuple[Path, Path], pictures: Path, task_folder: Path, tmp_path: Path
) -> None:
    place = toy_bundles[0]

    def photographs(url: str = served.url, place: Path = place, root: Path = pictures, side: int = 60) -> None:
        probe_photographs(place, url, root, tmp_path, sides=(side,), size="smoke", bars=QuietBars())

    with pytest.raises(ServiceError, match="no service answers"):
        photographs(url="http://127.0.0.1:9")
    for url in ("localhost", "http://127.0.0.1:99999", "http://[::1"):
        with pytest.raises(ServiceError, match="like http://"):
            photographs(url=url)
    with pytest.raises(ServiceError, match="no service answers"):
        photographs(url="http://a..b")
    with pytest.raises(DeviceError, match="no device"):
        probe_photographs(place, served.url, pictures, tmp_path, sides=(60,), size="smoke", device="foo", bars=QuietBars())
    with pytest.raises(ServiceError, match=r"serves toy/1 .* not toy/2"):
        photographs(place=toy_bundles[1])
    with pytest.raises(TwogateError, match="TWOGATE_MAX_IMAGE_BYTES"):
        photographs(side=4000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TwogateError, match="no photographs"):
        photographs(root=tmp_path / "empty")
    with pytest.raises(TwogateError, match="square, nes"):
        probe_blackbox(place, served.url, "x", task_folder, tmp_path, searches=("guess",), size="smoke", bars=QuietBars())
    write_pictures(tmp_path / "flat", patterns(50)[0])
    with pytest.raises(TwogateError, match="images need classes"):
        probe_blackbox(place, served.url, "x", tmp_path / "flat", tmp_path, size="smoke", bars=QuietBars())
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_service_that_refuses_flagged_images_cannot_be_measured(toy_bundles: tuple[Path, Path]) -> None:
    place = toy_bundles[0]
    settings = Settings(store=place.parent.parent, bundle=f"toy/{place.name}", max_fpr=0.05, on_flag="reject", threads=1)
    with thread_server(settings) as server, pytest.raises(ServiceError, match="--on-flag flag"):
        LiveService(server.url, load_bundle(place))


def test_a_service_with_another_calibration_is_told_from_the_bundle(
    served: ThreadServer, toy_bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle = load_bundle(toy_bundles[0])
    scores = tuple(score - 1 for score in bundle.manifest.calibration.scores)
    table = bundle.manifest.calibration.model_copy(update={"scores": scores})
    other = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"calibration": table}))
    with pytest.raises(ServiceError, match="another calibration"):
        LiveService(served.url, other).ask([png(image) for image in patterns(3)[0][:8]])


def test_answers_are_the_bundles_own_in_the_order_of_the_images(served: ThreadServer, toy_bundles: tuple[Path, Path]) -> None:
    bundle = load_bundle(toy_bundles[0])
    images = patterns(3)[0][:8]
    answers = LiveService(served.url, bundle).ask([png(image) for image in images])
    outputs = GateSession(bundle, threads=1).run(images)
    np.testing.assert_allclose(answers.embedding, outputs.embedding, atol=1e-5)
    np.testing.assert_allclose(answers.score, outputs.score, rtol=1e-4)
    np.testing.assert_allclose(answers.p_value, bundle.manifest.calibration.p_value(answers.score))


def test_black_box(served: ThreadServer, toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path) -> None:
    page = probe_blackbox(
        toy_bundles[0],
        served.url,
        "patterns",
        task_folder,
        tmp_path,
        queries=50,
        epsilon=48,
        size="smoke",
        bars=QuietBars(),
    )
    records = read(tmp_path / "blackbox")
    attacks = {r.attack for r in records}
    assert attacks == {"square, 50 queries", "nes, 50 queries"}
    for attack in attacks:
        assert 0 <= value(records, "queries_flagged@0.05", SERVICE, "patterns", attack) <= 1
        assert value(records, "cosine", RETURNED, "patterns", attack) < 1
        success = value(records, SUCCESS, SERVICE, "patterns", attack)
        if success:
            assert 1 <= value(records, QUERIES, SERVICE, "patterns", attack) <= 50
    assert page.read_text(encoding="utf-8").count("| patterns | ") == 2


def test_the_attackers_books(served: ThreadServer, toy_bundles: tuple[Path, Path]) -> None:
    bundle = load_bundle(toy_bundles[0])
    service = LiveService(served.url, bundle)
    images = patterns(1)[0]
    labels = np.zeros(len(images), np.int64)
    shown: list[np.ndarray] = []

    def head(embedding: Tensor) -> Tensor:
        """Finds class 0 the less, the further an embedding is from the first clean one."""
        return torch.stack([embedding @ torch.from_numpy(clean), torch.zeros(len(embedding))], dim=1)

    clean = service.ask([png(images[0])]).embedding[0]

    def classify(pictures: np.ndarray) -> np.ndarray:
        """Image 0 is broken by any change."""
        shown.append(pictures)
        return (pictures != images[0]).any(axis=(1, 2, 3)) & (np.abs(pictures.astype(int) - images[0]).max() <= 8)

    attacker = Attacker(service, images, labels, np.inf, 8, head, classify, lambda by: None)
    found = square(attacker, images, epsilon=8, queries=12, seed=0)
    assert (found.loss[attacker.won] == -1).all()
    assert (found.loss[~attacker.won] > 0).all()
    # What was won was not asked about again; what was not, up to the budget.
    np.testing.assert_array_equal(attacker.queries, found.queries)
    assert (attacker.queries[~attacker.won] == 12).all()
    # A win is told also where another picture moved the embedding more: image 0 first, then its broken neighbour.
    attacker = Attacker(
        service, images, labels, np.inf, 8, head, lambda pictures: (pictures == near).all(axis=(1, 2, 3)), lambda _: None
    )
    near = np.clip(images[1].astype(int) + 1, 0, 255).astype(np.uint8)
    far = np.clip(images[1].astype(int) + np.where(np.arange(16) % 2, 8, -8)[:, None], 0, 255).astype(np.uint8)
    attacker(far[None], np.array([1]))
    further = attacker.distance[1]
    attacker(near[None], np.array([1]))
    assert attacker.won[1]
    assert attacker.distance[1] < further
    attacker = Attacker(service, images, labels, np.inf, 8, head, classify, lambda by: None)
    # What he lowers is the margin of his own head, and the score only above the threshold.
    answers = service.ask([png(image) for image in images])
    margin = (answers.embedding @ clean).astype(np.float64)
    np.testing.assert_allclose(attacker(images, np.arange(len(images))), np.logaddexp(0, margin), atol=1e-5)
    loud = Attacker(service, images, labels, -50.0, 8, head, classify, lambda by: None)
    over = np.maximum(answers.score + 50, 0)
    assert over.any()
    np.testing.assert_allclose(loud(images, np.arange(len(images))), np.logaddexp(0, margin) + over, rtol=1e-4)
    # A picture outside the budget is a question, never a result.
    before = attacker.distance.copy()
    attacker(255 - images, np.arange(len(images)))
    np.testing.assert_array_equal(attacker.distance, before)
    # The heads are asked only about pictures that the service lets pass.
    assert all(len(pictures) for pictures in shown)
