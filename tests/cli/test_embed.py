from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cli import rows
from model_store.bundle import load_bundle
from model_store.pixels import decode
from model_store.session import GateOutputs, GateSession
from tests.cli.conftest import FOLDER_ROWS, Process, Twogate
from tests.conftest import REPOSITORY
from tests.support.tiny_bundle import noisy_images

COLUMNS = ["path", "embedding", "p_value", "score", "flagged", "error"]


def answer_of(tiny_bundle: Path, photo: Path) -> tuple[np.ndarray, float, float]:
    """What plain ONNX Runtime says of a photograph: embedding, score, p-value."""
    bundle = load_bundle(tiny_bundle)
    outputs = GateSession(bundle).run(decode(photo.read_bytes(), bundle.manifest.pixels)[None])
    return outputs.embedding[0], outputs.score[0], bundle.manifest.calibration.p_value(outputs.score)[0]


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A picture that the tiny bundle flags."""
    file = tmp_path / "noise.png"
    Image.fromarray(noisy_images(1, 32, seed=5)[0]).save(file)
    return file


# Files: JSON lines


def test_files_become_json_lines(process: Process, store: Path, tiny_bundle: Path, photos: list[Path], noise: Path) -> None:
    result = process("embed", *photos, noise, "--store", store, "--bundle", "tiny")
    assert result.returncode == 0
    assert result.stderr == ""
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in (*photos, noise)]
    for photo, line in zip(photos, lines, strict=False):
        embedding, score, p_value = answer_of(tiny_bundle, photo)
        assert list(line) == COLUMNS
        np.testing.assert_allclose(np.array(line["embedding"], np.float32), embedding, atol=1e-6)
        assert line["score"] == pytest.approx(score, abs=1e-5)
        assert line["p_value"] == pytest.approx(p_value)
        assert line["flagged"] is False
        assert line["error"] is None
    assert lines[-1]["flagged"] is True
    assert lines[-1]["p_value"] < 0.001


def test_a_broken_image_is_a_line_with_an_error(twogate: Twogate, store: Path, folder: Path) -> None:
    result = twogate("embed", folder / "below/broken.jpg", folder / "a.jpg", "--store", store, "--bundle", "tiny")
    assert result.exit_code == 0
    broken, sound = map(json.loads, result.stdout.splitlines())
    assert broken["error"] == "the image is damaged or truncated"
    assert all(broken[column] is None for column in COLUMNS[1:-1])
    assert sound["error"] is None


def test_only_broken_images_is_exit_code_one(twogate: Twogate, store: Path, folder: Path) -> None:
    result = twogate("embed", folder / "notes.txt", "--store", store, "--bundle", "tiny")
    assert result.exit_code == 1
    assert "accepted are" in json.loads(result.stdout)["error"]


def test_the_budget_decides_what_is_flagged(twogate: Twogate, store: Path, photos: list[Path]) -> None:
    def flagged(budget: float) -> list[bool]:
        output = twogate("embed", *photos, "--store", store, "--bundle", "tiny", "--max-fpr", budget).stdout
        lines = [json.loads(line) for line in output.splitlines()]
        assert [line["flagged"] for line in lines] == [line["p_value"] <= budget for line in lines]
        return [line["flagged"] for line in lines]

    assert not any(flagged(0.01))
    assert sum(flagged(0.5)) == 1
    assert all(flagged(0.9))


@pytest.mark.parametrize(("budget", "words"), [("0.0001", "at least 9999 calibration images"), ("2", "between 0 and 1")])
def test_an_impossible_budget_is_refused(twogate: Twogate, store: Path, photos: list[Path], budget: str, words: str) -> None:
    result = twogate("embed", photos[0], "--store", store, "--bundle", "tiny", "--max-fpr", budget)
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_damaged_bundle_is_refused(twogate: Twogate, own_store: Path, photos: list[Path]) -> None:
    (own_store / "tiny/2/model.onnx").write_bytes(b"x")
    result = twogate("embed", photos[0], "--store", own_store, "--bundle", "tiny")
    assert result.exit_code == 1
    assert result.stderr.startswith("twogate: tiny/2: model.onnx: its sha256")
    assert twogate("embed", photos[0], "--store", own_store, "--bundle", "tiny/1").exit_code == 0


def test_a_bundle_may_be_named_by_its_folder(twogate: Twogate, tiny_bundle: Path, photos: list[Path]) -> None:
    result = twogate("embed", photos[0], "--bundle", tiny_bundle)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["embedding"]) == 24


def test_a_store_that_is_not_there_is_named(twogate: Twogate, photos: list[Path]) -> None:
    result = twogate("embed", photos[0], "--store", "/nope")
    assert (result.exit_code, result.stderr) == (1, "twogate: there is no store /nope\n")


def test_a_path_that_does_not_exist_is_wrong_usage(twogate: Twogate, store: Path) -> None:
    assert twogate("embed", "nowhere.jpg", "--store", store, "--bundle", "tiny").exit_code == 2


# Folders: Parquet


def test_a_folder_becomes_a_parquet_file(
    process: Process, store: Path, tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    result = process("embed", "pictures", "--store", store, "--bundle", "tiny")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == "pictures.parquet: 4 images answered, 0 of them flagged; 2 without an answer\n"
    table = pq.read_table(tmp_path / "pictures.parquet")
    assert table.column_names == COLUMNS
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[24]"
    assert table["path"].to_pylist() == [f"pictures/{name}" for name in FOLDER_ROWS]
    for row in table.to_pylist():
        if row["path"].endswith(("broken.jpg", "notes.txt")):
            assert row["error"]
            assert all(row[column] is None for column in COLUMNS[1:-1])
        else:
            embedding, score, p_value = answer_of(tiny_bundle, tmp_path / row["path"])
            np.testing.assert_allclose(row["embedding"], embedding, atol=1e-6)
            assert (row["score"], row["p_value"]) == pytest.approx((score, p_value), abs=1e-5)
            assert row["flagged"] is False
            assert row["error"] is None
    manifest = load_bundle(tiny_bundle).manifest
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["twogate.bundle"] == "tiny"
    assert metadata["twogate.version"] == "1"
    assert metadata["twogate.digest"] == manifest.digest
    assert metadata["twogate.model_sha256"] == manifest.files["model.onnx"]
    assert metadata["twogate.max_fpr"] == "0.01"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "pictures.parquet"]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_size_changes_nothing(twogate: Twogate, store: Path, folder: Path, tmp_path: Path, batch: int) -> None:
    expected, found = tmp_path / "16.parquet", tmp_path / "other.parquet"
    twogate("embed", folder, "-o", expected, "--store", store, "--bundle", "tiny")
    twogate("embed", folder, "-o", found, "--store", store, "--bundle", "tiny", "--batch", batch)
    one, other = pq.read_table(expected).to_pylist(), pq.read_table(found).to_pylist()
    assert [row["path"] for row in one] == [row["path"] for row in other]
    for left, right in zip(one, other, strict=True):
        assert left["error"] == right["error"]
        if left["embedding"] is not None:
            np.testing.assert_allclose(left["embedding"], right["embedding"], atol=1e-5)


def test_rows_are_written_in_groups(
    twogate: Twogate, store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.table.ROWS_PER_GROUP", 4)
    twogate("embed", folder, "-o", tmp_path / "x.parquet", "--store", store, "--bundle", "tiny")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [4, 2]


def test_several_folders_and_files_into_one_output(
    twogate: Twogate, store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = twogate("embed", folder / "below", folder / "a.jpg", "--store", store, "--bundle", "tiny")
    assert result.exit_code == 0
    found = pq.read_table("embeddings.parquet")["path"].to_pylist()
    assert [Path(path).name for path in found] == ["broken.jpg", "c.jpg", "d.jpg", "a.jpg"]


def test_files_with_an_output_become_parquet_and_a_folder_can_be_printed(
    twogate: Twogate, store: Path, folder: Path, tmp_path: Path
) -> None:
    assert (
        twogate("embed", folder / "a.jpg", "-o", tmp_path / "one.parquet", "--store", store, "--bundle", "tiny").exit_code
        == 0
    )
    assert pq.read_table(tmp_path / "one.parquet").num_rows == 1
    printed = twogate("embed", folder, "-o", "-", "--store", store, "--bundle", "tiny").stdout
    assert len(printed.splitlines()) == len(FOLDER_ROWS)


def test_an_output_inside_the_folder_is_no_row_of_its_own(twogate: Twogate, store: Path, folder: Path) -> None:
    output = folder / "out.parquet"
    for _ in range(2):
        twogate("embed", folder, "-o", output, "--overwrite", "--store", store, "--bundle", "tiny")
        assert pq.read_table(output).num_rows == len(FOLDER_ROWS)


@pytest.mark.parametrize(
    ("output", "words"), [("x.csv", "must end in .parquet"), ("nowhere/x.parquet", "no folder"), ("old.parquet", "exists")]
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    twogate: Twogate, store: Path, folder: Path, tmp_path: Path, output: str, words: str
) -> None:
    (tmp_path / "old.parquet").write_text("precious")
    result = twogate("embed", folder, "-o", tmp_path / output, "--store", store, "--bundle", "tiny")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert (tmp_path / "old.parquet").read_text() == "precious"


def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(
    twogate: Twogate, store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "old.parquet"
    output.write_text("precious")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the lights went out")

    monkeypatch.setattr("service.engine.local.LocalGate.judge", fail)
    result = twogate("embed", folder, "-o", output, "--overwrite", "--store", store, "--bundle", "tiny")
    assert isinstance(result.exception, RuntimeError)
    assert output.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".png"] in (
        ["pictures", "old.parquet"],
        ["old.parquet", "pictures"],
    )


@pytest.mark.parametrize("output", ["x.parquet", "-"])
def test_an_empty_folder_is_told_and_leaves_no_table(
    twogate: Twogate, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    result = twogate("embed", "empty", "-o", output, "--store", store, "--bundle", "tiny")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "twogate: there are no files in empty; hidden ones are left out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_folder_that_cannot_be_listed_is_a_row_of_its_own(
    twogate: Twogate, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, scandir = folder / "below" / "deeper", os.scandir

    def refuse(path: Path | str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = twogate("embed", folder, "-o", "-", "--store", store, "--bundle", "tiny")
    assert result.exit_code == 0
    assert result.stderr == f"twogate: {closed}: cannot be read (Permission denied)\n"
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == [str(folder / name) for name in [*FOLDER_ROWS[:-1], "below/deeper"]]
    assert lines[-1]["error"] == "cannot be read (Permission denied)"


def test_odd_names_and_unreadable_files_stop_nothing(
    twogate: Twogate, store: Path, photos: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = os.path.join(os.fsencode(folder), b"caf\xe9\n.jpg")  # noqa: PTH118 - a name that is no UTF-8
    with open(odd, "wb") as file:  # noqa: PTH123
        file.write(photos[0].read_bytes())
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    output = tmp_path / "x.parquet"
    assert twogate("embed", folder, "-o", output, "--store", store, "--bundle", "tiny").exit_code == 0
    odd_name, gone, pipe = pq.read_table(output).to_pylist()
    assert odd_name["path"].endswith("caf\\xe9\n.jpg")
    assert odd_name["error"] is None
    assert (gone["path"], gone["error"]) == (str(folder / "gone.jpg"), "cannot be read (No such file or directory)")
    assert (pipe["path"], pipe["error"]) == (str(folder / "pipe.jpg"), "is no file")


@pytest.mark.parametrize("name", [b"caf\xe9.parquet", b"run:2.parquet"])
def test_an_odd_output_is_written(twogate: Twogate, store: Path, photos: list[Path], tmp_path: Path, name: bytes) -> None:
    out = tmp_path / os.fsdecode(name)
    result = twogate("embed", str(photos[0]), "--store", str(store), "--bundle", "tiny", "--max-fpr", "0.05", "-o", str(out))
    assert result.exit_code == 0, result.stderr
    with out.open("rb") as file:
        assert len(pq.read_table(file)) == 1


def test_a_file_beyond_the_limit_is_a_row_with_an_error(
    twogate: Twogate, store: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_FILE_BYTES", 1000)
    result = twogate("embed", photos[0], "--store", store, "--bundle", "tiny")
    size = photos[0].stat().st_size
    assert json.loads(result.stdout)["error"] == f"the file's size in bytes is {size}, the limit is 1000"


def test_an_image_that_breaks_the_arithmetic_hurts_no_neighbour(
    twogate: Twogate, store: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.engine.local import LocalGate
    from service.engine.verdict import BrokenOutput

    original = LocalGate.judge
    poison = photos[1].read_bytes()

    def judge(self: LocalGate, pictures: list[np.ndarray]) -> object:
        if any(np.array_equal(picture, self.decode(poison)) for picture in pictures):
            raise BrokenOutput("an embedding is not finite")
        return original(self, pictures)

    monkeypatch.setattr(LocalGate, "judge", judge)
    result = twogate("embed", *photos, "--store", store, "--bundle", "tiny")
    errors = [json.loads(line)["error"] for line in result.stdout.splitlines()]
    assert errors == [None, "an embedding is not finite", None, None]


def test_a_score_that_is_no_number_is_null(
    twogate: Twogate, store: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GateSession.run

    def broken(self: GateSession, images: np.ndarray) -> GateOutputs:
        out = original(self, images)
        return out if len(images) == 3 else GateOutputs(out.embedding, out.confidence, out.score * np.float32(np.nan))

    monkeypatch.setattr(GateSession, "run", broken)  # but for the three golden images
    result = twogate("embed", photos[0], "--store", store, "--bundle", "tiny")
    assert "NaN" not in result.stdout
    line = json.loads(result.stdout)
    assert (line["score"], line["flagged"]) == (None, True)


def test_reading_ahead_is_bounded(tiny_bundle: Path, photo: bytes, tmp_path: Path) -> None:
    """Any number of files fits into memory: no more than two batches are open before the first answer is out."""
    from service.engine.local import LocalGate

    gate = LocalGate(load_bundle(tiny_bundle))
    file = tmp_path / "x.jpg"
    file.write_bytes(photo)
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield file

    answers = rows.rows(gate, endless(), batch=4, threads=2)
    next(answers)
    assert taken == 8
    for _ in range(99):
        next(answers)
    assert taken <= 100 + 8
    answers.close()


def test_without_pyarrow_the_extra_is_named(
    twogate: Twogate, store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cli.table", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = twogate("embed", folder, "-o", tmp_path / "x.parquet", "--store", store, "--bundle", "tiny")
    assert result.exit_code == 1
    assert "twogate[batch]" in result.stderr
    # A few files do not need it.
    assert twogate("embed", folder / "a.jpg", "--store", store, "--bundle", "tiny").exit_code == 0


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_leaves_nothing(store: Path, tmp_path: Path, how: signal.Signals, code: int) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.fromarray(noisy_images(1, 512, seed=0)[0]).save(buffer, "PNG")
    for index in range(2000):
        (folder / f"{index:04}.png").write_bytes(buffer.getvalue())
    command = [sys.executable, "-m", "cli", "embed", "many", "--store", str(store), "--bundle", "tiny"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".many.parquet.*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(how)
        assert process.wait(timeout=60) == code
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
