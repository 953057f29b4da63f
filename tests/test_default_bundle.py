"""The bundle that comes with the code: small, whole, self-sufficient, and described by its card."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from hardening.measure.records import CLEAN, Record, read
from model_store.bundle import load_bundle, verify_bundle
from model_store.store import DEFAULT_BUNDLE, EMBEDDED_STORE, resolve
from service.engine.local import LocalGate
from tests.conftest import PHOTOS, REPOSITORY

_MIB = 2**20


@pytest.fixture(scope="module")
def default() -> Path:
    return resolve(EMBEDDED_STORE, DEFAULT_BUNDLE)


@pytest.fixture(scope="module")
def gate() -> LocalGate:
    return LocalGate.open(EMBEDDED_STORE, DEFAULT_BUNDLE)


@pytest.fixture(scope="module")
def records(default: Path) -> list[Record]:
    return read(default / "report" / "records")


def test_it_verifies_and_is_small(default: Path) -> None:
    assert len(verify_bundle(default)) >= 4
    assert sum(file.stat().st_size for file in default.rglob("*") if file.is_file()) <= 20 * _MIB


def test_it_supports_the_budgets_that_operators_ask_for(default: Path) -> None:
    calibration = load_bundle(default).manifest.calibration
    for budget in (0.001, 0.01, 0.05):
        calibration.require_budget(budget)


def test_the_card_shows_the_records(default: Path, records: list[Record]) -> None:
    card = (default / "card.md").read_text(encoding="utf-8")
    shown = {r.subject: r.value for r in records if r.metric == "clean_acc"}
    assert len(shown) > 4
    for subject, value in shown.items():
        assert isinstance(value, float)
        assert f"| {subject} | {100 * value:.1f} |" in card


def test_the_numbers_in_the_readme_are_the_cards(default: Path) -> None:
    card = (default / "card.md").read_text(encoding="utf-8").splitlines()
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in readme if line.startswith(("| undefended victim", "| returned embedding", "| sentinel"))]
    assert len(rows) == 4
    assert all(row in card for row in rows)


def test_the_returned_embedding_stays_within_three_points_of_the_undefended_victim(records: list[Record]) -> None:
    clean = {r.subject: r.value for r in records if (r.metric, r.attack) == ("knn_acc", CLEAN)}
    ours, theirs = clean["returned embedding"], clean["undefended victim"]
    assert isinstance(ours, float)
    assert isinstance(theirs, float)
    assert ours >= theirs - 0.03


def test_the_script_in_the_readme_gives_the_embedding_of_the_service(gate: LocalGate, photos: list[Path]) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert "model_store" in script
    assert re.findall(r"^(?:import|from) (\w+)", script, flags=re.MULTILINE) == ["sys", "numpy", "PIL"]
    for photo in photos[:2]:
        done = subprocess.run(
            [sys.executable, "-c", script, str(photo)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
        )
        printed = [float(x) for x in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", done.stdout)]
        judged = gate.judge([gate.decode(photo.read_bytes())])[0]
        np.testing.assert_allclose(printed[:4], judged.embedding[:4], atol=1e-6)
        np.testing.assert_allclose(printed[-1], judged.verdict.score, atol=1e-3)


def test_the_example_photos_get_the_verdicts_that_their_readme_shows(gate: LocalGate) -> None:
    table = (PHOTOS / "README.md").read_text(encoding="utf-8")
    clean = sorted(PHOTOS.glob("*-clean.jpg"))
    attacked = [path.with_name(path.name.replace("-clean.jpg", "-attacked.png")) for path in clean]

    def flags(paths: list[Path]) -> list[bool]:
        return [judged.verdict.flagged for judged in gate.judge([gate.decode(path.read_bytes()) for path in paths])]

    assert not any(flags(clean))
    flagged = flags(attacked)
    assert sum(flagged) > len(flagged) / 2
    for path, found in zip(clean, flagged, strict=True):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {path.stem.removesuffix('-clean')} |")]
        assert row.endswith("flagged |" if found else "passes |"), "python -m examples.make_photos writes it again"
    assert sum(file.stat().st_size for file in PHOTOS.iterdir()) < 1_500_000


def test_a_photo_in_its_eight_orientations_gets_one_answer(gate: LocalGate, photo: bytes) -> None:
    upright = Image.open(io.BytesIO(photo)).convert("RGB").resize((512, 512))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    answers = []
    for orientation in range(1, 9):
        stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        stored.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
        answers.append(gate.judge([gate.decode(buffer.getvalue())])[0])
    for answer in answers[1:]:
        assert float(answer.embedding @ answers[0].embedding) > 0.99
        assert answer.verdict.flagged == answers[0].verdict.flagged


def test_neighbours_in_a_batch_change_nothing(gate: LocalGate, photos: list[Path]) -> None:
    pictures = [gate.decode(path.read_bytes()) for path in photos]
    noise = np.random.default_rng(0).integers(0, 256, pictures[0].shape).astype(np.uint8)
    alone = gate.judge([pictures[0]])[0]
    for companions in ([noise] * 7, pictures[1:], [np.zeros_like(noise)]):
        among = gate.judge([pictures[0], *companions])[0]
        np.testing.assert_allclose(among.embedding, alone.embedding, atol=1e-5)
        np.testing.assert_allclose(among.verdict.score, alone.verdict.score, atol=1e-3)


def test_serving_it_takes_less_than_400_mb(photos: list[Path]) -> None:
    command = [sys.executable, "-m", "cli", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            assert found
            files = [("file", (path.name, path.read_bytes(), "image/jpeg")) for path in photos] * 4
            for _ in range(5):
                answer = httpx.post(f"{found.group()}/v1/embeddings", files=files[:16], timeout=60)
                assert answer.status_code == 200
                assert len(answer.json()["data"]) == min(16, len(files))
            assert psutil.Process(process.pid).memory_info().rss < 400e6
        finally:
            process.terminate()
            process.wait(30)
