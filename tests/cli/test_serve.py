from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Twogate
from tests.conftest import REPOSITORY


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that would have been served."""
    served: list[Any] = []

    def serve(settings: Any) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr("service.server.serve", serve)
    return served


def test_flags_become_settings(twogate: Twogate, served: list[Any], store: Path) -> None:
    flags = ["--host", "0.0.0.0", "--port", "9000", "--bundle", "tiny/1", "--max-fpr", "0.05", "--on-flag", "reject"]
    assert twogate("serve", "--store", store, *flags, "--threads", "1", "--provider", "cpu").exit_code == 0
    (settings,) = served
    assert (settings.host, settings.port, settings.store, settings.bundle) == ("0.0.0.0", 9000, store, "tiny/1")
    assert (settings.max_fpr, settings.on_flag, settings.threads, settings.provider) == (0.05, "reject", 1, "cpu")


def test_without_flags_the_environment_decides_and_then_the_defaults(
    twogate: Twogate, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOGATE_PORT", "9001")
    monkeypatch.setenv("TWOGATE_API_KEYS", "one,two")
    assert twogate("serve").exit_code == 0
    assert twogate("serve", "--port", "9002").exit_code == 0
    first, second = served
    assert (first.port, second.port) == (9001, 9002)
    assert (first.host, first.bundle, first.on_flag) == ("127.0.0.1", "photos", "flag")
    assert [key.get_secret_value() for key in first.api_keys] == ["one", "two"]


def test_a_settings_file_counts_least(
    twogate: Twogate, served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "twogate.toml"
    file.write_text('port = 9003\nhost = "::1"\nmax_fpr = 0.05\n')
    monkeypatch.setenv("TWOGATE_MAX_FPR", "0.02")
    assert twogate("serve", "--settings", file, "--port", "9004").exit_code == 0
    (settings,) = served
    assert (settings.host, settings.max_fpr, settings.port) == ("::1", 0.02, 9004)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-fpr", "2"], "max_fpr"),
        (["--port", "70000"], "port"),
        (["--settings", "nowhere.toml"], "nowhere.toml"),
        (["--on-flag", "explode"], "explode"),
    ],
)
def test_a_wrong_setting_is_wrong_usage_and_named(twogate: Twogate, served: list[Any], flags: list[str], words: str) -> None:
    result = twogate("serve", *flags)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not served


def test_a_variable_that_is_no_setting_is_a_warning(
    twogate: Twogate, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOGATE_MAXFPR", "0.05")
    result = twogate("serve")
    assert (result.exit_code, len(served)) == (0, 1)
    assert result.stderr == "twogate: warning: TWOGATE_MAXFPR is no setting; did you mean TWOGATE_MAX_FPR?\n"


def test_the_exit_code_is_the_servers(twogate: Twogate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.server.serve", lambda settings: 1)
    assert twogate("serve").exit_code == 1


def test_a_real_server_answers_and_stops_when_told(store: Path, photo: bytes, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "serve", "--store", str(store), "--bundle", "tiny", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = next(word for word in line.split() if word.startswith("http://")).rstrip("/)")
            request = urllib.request.Request(f"{url}/v1/scan", photo, {"Content-Type": "image/jpeg"})
            with urllib.request.urlopen(request, timeout=30) as response:
                assert response.status == 200
                assert b'"p_value"' in response.read()
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
