"""`twogate probe`: what it is called with. What it computes: tests/hardening/measure/test_probe.py."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Twogate
from tests.conftest import PHOTOS

NOBODY = "http://127.0.0.1:9"


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
