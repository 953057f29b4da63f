from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.cores import usable_cores


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)]
)
def test_version_2(tmp_path: Path, quota: str, cores: int) -> None:
    _write(tmp_path / "cpu.max", quota)
    assert usable_cores(tmp_path, tmp_path / "none") == cores


@pytest.mark.usefixtures("many_cores")
def test_the_smallest_quota_on_the_way_to_the_own_group_counts(tmp_path: Path) -> None:
    _write(tmp_path / "own", "0::/pod/container\n")
    _write(tmp_path / "pod" / "cpu.max", "300000 100000")
    _write(tmp_path / "pod" / "container" / "cpu.max", "max 100000")
    assert usable_cores(tmp_path, tmp_path / "own") == 3


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("250000", 3)])
def test_version_1(tmp_path: Path, quota: str, cores: int) -> None:
    _write(tmp_path / "cpu" / "cpu.cfs_quota_us", quota)
    _write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000")
    assert usable_cores(tmp_path, tmp_path / "none") == cores


def test_the_affinity_mask_counts_too(tmp_path: Path) -> None:
    _write(tmp_path / "cpu.max", "1000000000 1000")
    assert usable_cores(tmp_path, tmp_path / "none") == len(os.sched_getaffinity(0))
