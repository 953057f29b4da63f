from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Process, Twogate
from tests.support.tiny_head import add_tiny_head


def test_list(twogate: Twogate, own_store: Path) -> None:
    result = twogate("bundle", "list", "--store", own_store)
    assert result.exit_code == 0
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["bundle", "version", "created", "dim", "detector", "size"]
    assert [line.split()[:2] for line in lines] == [["tiny", "1"], ["tiny", "2"]]
    assert lines[0].split()[2:] == ["2025-01-01", "00:00", "24", "consistency", "48", "KiB"]


def test_list_takes_the_store_from_the_environment(
    twogate: Twogate, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOGATE_STORE", str(own_store))
    assert "tiny" in twogate("bundle", "list").stdout


def test_list_of_no_store_is_an_error(twogate: Twogate, tmp_path: Path) -> None:
    result = twogate("bundle", "list", "--store", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "there is no store" in result.stderr


def test_list_of_an_empty_store_says_so(twogate: Twogate, tmp_path: Path) -> None:
    result = twogate("bundle", "list", "--store", tmp_path)
    assert result.exit_code == 0
    assert "no bundle" in result.stderr


def test_list_shows_the_others_where_one_is_damaged(twogate: Twogate, own_store: Path) -> None:
    (own_store / "tiny/1/manifest.json").write_text("{")
    result = twogate("bundle", "list", "--store", own_store)
    assert result.exit_code == 1
    assert "damaged: tiny/1: manifest.json" in result.stdout
    assert "48 KiB" in result.stdout


def test_show_says_what_a_person_wants_to_know(twogate: Twogate, own_store: Path) -> None:
    result = twogate("bundle", "show", "tiny", "--store", own_store)
    assert result.exit_code == 0
    for words in ("tiny/2", "32 x 32", "24 numbers", "victim", "tripwire", "consistency", "1200 clean images", "0.01"):
        assert words in result.stdout


def test_show_tells_which_scores_each_budget_flags(twogate: Twogate, own_store: Path) -> None:
    from model_store.bundle import load_bundle

    calibration = load_bundle(own_store / "tiny/1").manifest.calibration
    output = twogate("bundle", "show", "tiny/1", "--store", own_store).stdout
    for budget in (0.001, 0.01, 0.05):
        (line,) = [line for line in output.splitlines() if line.split()[:1] == [f"{budget:g}"]]
        threshold = float(line.split()[-1])
        assert calibration.p_value(threshold + 0.002) <= budget < calibration.p_value(threshold - 0.002)


def test_show_as_json(twogate: Twogate, own_store: Path) -> None:
    shown = json.loads(twogate("bundle", "show", "tiny/1", "--json", "--store", own_store).stdout)
    assert shown["version"] == 1
    assert shown["embedding_dim"] == 24
    assert "golden" not in shown
    assert shown["calibration"] == {"source": "generated smooth pictures"}


def test_verify_prints_each_check(twogate: Twogate, own_store: Path) -> None:
    result = twogate("bundle", "verify", "tiny/1", "--store", own_store)
    assert result.exit_code == 0
    *checks, last = result.stdout.splitlines()
    assert len(checks) == 5
    assert all(check.startswith("ok  ") for check in checks)
    assert last == "tiny/1 is sound"


def test_verify_takes_a_path(twogate: Twogate, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "unpacked"
    shutil.copytree(own_store / "tiny/1", elsewhere)
    monkeypatch.chdir(tmp_path)
    for path in (elsewhere, "./unpacked", "unpacked"):
        assert twogate("bundle", "verify", path).exit_code == 0


@pytest.mark.parametrize("name", ["model.onnx", "card.md", "manifest.json"])
def test_verify_names_the_file_and_the_reason(process: Process, own_store: Path, name: str) -> None:
    file = own_store / "tiny/2" / name
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    result = process("bundle", "verify", "tiny", "--store", own_store)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"twogate: tiny/2: {name}: ")
    assert result.stderr.count("\n") == 1


def test_a_copy_under_another_number_is_for_import(process: Process, own_store: Path, tmp_path: Path) -> None:
    shutil.copytree(own_store / "tiny/1", own_store / "tiny/9")
    for command in ("show", "verify"):
        result = process("bundle", command, "tiny", "--store", own_store)
        assert result.returncode == 1
        assert result.stderr.startswith("twogate: tiny/9: the folder holds tiny/1")
    assert "tiny/9: the folder holds tiny/1" in process("bundle", "list", "--store", own_store).stdout
    assert process("bundle", "verify", own_store / "tiny/9").returncode == 0


def test_import_gives_a_bundle_of_another_store_the_next_number(twogate: Twogate, own_store: Path, tmp_path: Path) -> None:
    received = add_tiny_head(own_store / "tiny/2", tmp_path / "other")
    result = twogate("bundle", "import", received, "--store", own_store)
    assert (result.exit_code, result.stdout) == (0, f"{own_store / 'tiny/3'}\n")
    assert twogate("bundle", "verify", "tiny/3", "--store", own_store).exit_code == 0
    shown = json.loads(twogate("bundle", "show", "tiny", "--json", "--store", own_store).stdout)
    assert [task["name"] for task in shown["tasks"]] == ["animals"]
    assert shown["provenance"]["revisions"][-1]["from"] == "tiny/1"
    (received / "stranger").write_text("x")
    result = twogate("bundle", "import", received, "--store", own_store)
    assert result.exit_code == 1
    assert "stranger: the manifest does not name this file" in result.stderr
    assert not (own_store / "tiny/4").exists()


def test_verify_of_what_is_not_there(twogate: Twogate, own_store: Path) -> None:
    for wanted in ("huge", "tiny/7", "./nowhere", "/nowhere"):
        result = twogate("bundle", "verify", wanted, "--store", own_store)
        assert result.exit_code == 1
        assert result.stderr.startswith("twogate: ")


def test_diff_of_two_bundles(twogate: Twogate, own_store: Path) -> None:
    result = twogate("bundle", "diff", "tiny/1", "tiny/2", "--store", own_store)
    assert result.exit_code == 0
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["what", "tiny/1", "tiny/2"]
    for words in ("file model.onnx", "detector seed", "calibration", "golden vector"):
        assert any(line.startswith(words) for line in lines)
    assert not any(line.startswith(("pixels", "branch", "task", "file card.md")) for line in lines)


def test_diff_shows_calibration_and_tasks(twogate: Twogate, own_store: Path) -> None:
    add_tiny_head(own_store / "tiny/1", own_store)
    output = twogate("bundle", "diff", "tiny/1", own_store / "tiny/3", "--store", own_store).stdout
    assert "file tasks/animals.onnx" in output
    assert "3 classes, guarded" in output
    assert "model.onnx" not in output


def test_diff_of_a_bundle_and_itself(twogate: Twogate, own_store: Path) -> None:
    result = twogate("bundle", "diff", "tiny/1", "tiny/1", "--store", own_store)
    assert result.exit_code == 0
    assert result.stdout == "tiny/1 and tiny/1 do not differ in what they answer\n"
    assert twogate("bundle", "diff", "tiny/1", "tiny/9", "--store", own_store).exit_code == 1
