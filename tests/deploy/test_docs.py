"""What docs/deploy.md shows is run as it stands, with the address of a real gate."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from service.client.wsgi import TwogateMiddleware as WsgiMiddleware
from tests.service.support import ThreadServer

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")


def block(containing: str, gate: ThreadServer) -> str:
    """The one example that contains this."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if containing in code]
    assert "http://twogate:8000" in found
    return str(found).replace("http://twogate:8000", gate.url)


def test_the_lines_for_asgi(gate: ThreadServer, photo: bytes, suspicious: bytes) -> None:
    app = FastAPI()

    @app.post("/upload")
    async def upload(request: Request) -> int:
        return len(await request.body())

    exec(block("client.asgi", gate), {"app": app})
    with TestClient(app) as client:
        assert client.post("/upload", content=photo).json() == len(photo)
        assert client.post("/upload", content=suspicious).status_code == 422


def test_the_lines_for_wsgi(gate: ThreadServer) -> None:
    app = SimpleNamespace(wsgi_app=lambda environ, start_response: [])
    exec(block("client.wsgi", gate), {"app": app})
    assert isinstance(app.wsgi_app, WsgiMiddleware)


def test_the_lines_for_the_client(gate: ThreadServer, photo: bytes, suspicious: bytes) -> None:
    names: dict[str, Any] = {"Rejected": ValueError}
    exec(block("TwogateClient", gate), {**names, "image": photo})
    with pytest.raises(ValueError, match="adversarial-suspected"):
        exec(block("TwogateClient", gate), {**names, "image": suspicious})


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_line_for_curl(gate: ThreadServer, photo: bytes, suspicious: bytes, tmp_path: Path) -> None:
    (found,) = re.findall(r"`(curl [^`]+)`", GUIDE)
    for picture, flagged in ((photo, False), (suspicious, True)):
        (tmp_path / "photo.jpg").write_bytes(picture)
        command = found.replace("http://127.0.0.1:8000", gate.url).replace("curl", "curl --silent --show-error", 1)
        answer = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert ("adversarial-suspected" in answer) is flagged


def test_the_links_lead_somewhere() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
