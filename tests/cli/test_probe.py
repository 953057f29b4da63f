"""`twogate probe`: what it is called with. What it computes: tests/hardening/measure/test_probe.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Twogate
from tests.conftest import PHOTOS

NOBODY = "http://127.0.0.1:9"


Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What would have been probed."""
    calls: Calls = []

    def noting(name: str) -> None:
        def probe(*arguments: Any, **more: Any) -> Path:
            calls.append((name, arguments, more))
            return Path("out/probe.md")

        monkeypatch.setattr(f"hardening.measure.probe.{name}", probe)

    noting("probe_photographs")
    noting("probe_blackbox")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/twogate", "probe"])
    return calls


def test_arguments_reach_the_probe_of_photographs(twogate: Twogate, calls: Calls, store: Path, tmp_path: Path) -> None:
    given = ["probe", "photographs", "tiny", "--store", store, "--images", PHOTOS]
    result = twogate(*given)
    assert (result.exit_code, result.stdout) == (0, "out/probe.md\n"), result.output
    more = ["--url", NOBODY, "--out", tmp_path, "--sides", "640,64", "--epsilon", "4", "--size", "full", "--seed", "7"]
    assert twogate(*given, *more, "--device", "cuda").exit_code == 0
    usual = {"sides": [640, 1280, 2560, 4000], "epsilon": 8.0, "size": "small", "seed": 0, "device": "cpu"}
    asked = {"sides": [640, 64], "epsilon": 4.0, "size": "full", "seed": 7, "device": "cuda"}
    place, command = store / "tiny/1", {"command": ["twogate", "probe"]}
    assert calls == [
        ("probe_photographs", (place, "http://127.0.0.1:8000", PHOTOS, Path("probe")), usual | command),
        ("probe_photographs", (place, NOBODY, PHOTOS, tmp_path), asked | command),
    ]


def test_arguments_reach_the_black_box(twogate: Twogate, calls: Calls, store: Path, tmp_path: Path) -> None:
    given = ["probe", "blackbox", "tiny", "--store", store, "--task", f"flowers={PHOTOS}"]
    result = twogate(*given)
    assert (result.exit_code, result.stdout) == (0, "out/probe.md\n"), result.output
    more = ["--url", NOBODY, "--out", tmp_path, "--searches", "nes", "--queries", "50", "--epsilon", "4"]
    assert twogate(*given, *more, "--size", "full", "--seed", "7", "--device", "cuda").exit_code == 0
    usual = {"searches": ["square", "nes"], "queries": 300, "epsilon": 8.0, "size": "small", "seed": 0, "device": "cpu"}
    asked = {"searches": ["nes"], "queries": 50, "epsilon": 4.0, "size": "full", "seed": 7, "device": "cuda"}
    place, command = store / "tiny/1", {"command": ["twogate", "probe"]}
    assert calls == [
        ("probe_blackbox", (place, "http://127.0.0.1:8000", "flowers", PHOTOS, Path("probe")), usual | command),
        ("probe_blackbox", (place, NOBODY, "flowers", PHOTOS, tmp_path), asked | command),
    ]


def test_no_service(twogate: Twogate, tmp_path: Path) -> None:
    result = twogate("probe", "photographs", "photos", "--images", PHOTOS, "--out", tmp_path, "--url", NOBODY)
    assert result.exit_code == 1
    assert "no service answers at http://127.0.0.1:9" in result.stderr
    assert "twogate serve --bundle photos/" in result.stderr


def test_wrong_usage_is_named(twogate: Twogate, tmp_path: Path) -> None:
    for arguments, words in (
        (["photographs", "photos", "--images", PHOTOS, "--sides", "640,big"], "'big' is no whole number"),
        (["photographs", "photos", "--images", tmp_path], "no photographs"),
        (["photographs", "photos", "--images", PHOTOS, "--size", "huge"], "smoke, small, full"),
        (["photographs", "nobody", "--images", PHOTOS], "nobody"),
        (["blackbox", "photos", "--task", "flowers"], "NAME=DIR"),
        (["blackbox", "photos", "--task", f"x={tmp_path}", "--searches", "guess"], "square, nes"),
    ):
        result = twogate("probe", *arguments, "--out", tmp_path / "out", "--url", NOBODY)
        assert result.exit_code == 1, arguments
        assert words in result.stderr, arguments
        assert not (tmp_path / "out").exists()
