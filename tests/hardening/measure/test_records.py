from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardening.measure.records import Origin, mean_and_spread, once, read

ORIGIN = Origin("toy/1", "f" * 64, "smoke", "twogate evaluate", "abc")


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    calls = []

    def measure() -> list[object]:
        calls.append(1)
        return [ORIGIN.record("clean_acc", "x", "t", "clean", 0.5, 10)]

    for _ in range(2):
        once(tmp_path / "a" / "cell.jsonl", measure)  # type: ignore[arg-type]
    assert len(calls) == 1
    (found,) = read(tmp_path)
    assert (found.value, found.images, found.commit, found.command) == (0.5, 10, "abc", "twogate evaluate")


def test_a_cell_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> list[object]:
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        once(tmp_path / "cell.jsonl", broken)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_every_line_stands_alone(tmp_path: Path) -> None:
    file = tmp_path / "cell.jsonl"
    once(file, lambda: [ORIGIN.record("m", "s", "t", "pgd", v, 3, 8.0, 1) for v in (0.1, 0.2)])
    for line in file.read_text().splitlines():
        assert json.loads(line)["digest"] == "f" * 64


def test_spread_is_the_standard_deviation_over_runs() -> None:
    assert mean_and_spread([0.5]) == (0.5, 0.0)
    mean, spread = mean_and_spread([1.0, 2.0, 3.0])
    assert (mean, spread) == (2.0, 1.0)
