"""The scripts that go into the image, without building one; docker/check.sh builds and runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import Settings
from tests.service.support import thread_server

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *(str(part) for part in command)]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_health_check_follows_readiness(tiny_bundle: Path) -> None:
    with thread_server(Settings(store=tiny_bundle.parents[1], bundle="tiny", threads=1)) as server:
        healthy = run(DOCKER / "healthcheck.py", TWOGATE_PORT=str(server.port))
        assert (healthy.returncode, json.loads(healthy.stdout)["state"]) == (0, "ready")
        server.gate.drain()
        draining = run(DOCKER / "healthcheck.py", TWOGATE_PORT=str(server.port))
        assert (draining.returncode, json.loads(draining.stdout)["state"]) == (1, "draining")
    gone = run(DOCKER / "healthcheck.py", TWOGATE_PORT=str(server.port))
    assert gone.returncode == 1
    assert "not reachable" in gone.stderr


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A small environment, finished."""
    packages = tmp_path / "env/lib/python3.11/site-packages"
    for name in ("pip", "pip-1.dist-info", "setuptools", "numpy/tests", "numpy/core"):
        (packages / name).mkdir(parents=True)
        (packages / name / "module.py").write_text("")
    record = packages / "Some_Thing-1.2.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: Some_Thing\nVersion: 1.2\n")
    (tmp_path / "env/bin").mkdir()
    for name in ("python", "python3", "pip", "uvicorn", "activate"):
        (tmp_path / "env/bin" / name).write_text("")
    (tmp_path / "build/app/cli").mkdir(parents=True)
    (tmp_path / "build/app/cli/main.py").write_text("x = 1\n")
    (tmp_path / "build/pyproject.toml").write_text('[project]\nname = "twogate"\nversion = "9.8"\n')
    done = run(DOCKER / "finish.py", tmp_path / "env", tmp_path / "build")
    assert done.returncode == 0, done.stderr
    return tmp_path / "env"


def test_only_what_serving_needs_is_left(finished: Path) -> None:
    packages = finished / "lib/python3.11/site-packages"
    assert {path.name for path in packages.iterdir()} == {"Some_Thing-1.2.dist-info", "cli", "numpy", "twogate-9.8.dist-info"}
    assert not (packages / "numpy/tests").exists()
    assert list((packages / "cli/__pycache__").glob("main.*.pyc"))
    assert {path.name for path in (finished / "bin").iterdir()} == {"python", "python3", "twogate"}
    assert os.access(finished / "bin/twogate", os.X_OK)


def test_the_bill_of_materials(finished: Path) -> None:
    bill = json.loads((finished / "sbom.cdx.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert [part["purl"] for part in bill["components"]] == ["pkg:pypi/some-thing@1.2", "pkg:pypi/twogate@9.8"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_everything_that_is_copied_is_there_and_not_ignored(name: str) -> None:
    admitted = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    text = (DOCKER / name).read_text(encoding="utf-8")
    sources = [word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source in admitted
    assert re.search(r"^USER \d+:0$", text, re.MULTILINE)
