"""Real servers for tests: one in a thread of this process, one as a process of its own."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.engine.gate import Gate
from service.settings import Settings

REPOSITORY = Path(__file__).parents[2]
_PROGRAM = """
import json, sys
from service.server import serve
from service.settings import load_settings
sys.exit(serve(load_settings(**json.loads(sys.argv[1]))))
"""


class ThreadServer:
    """An app under a real uvicorn in a thread; `gate` is within reach, to break things on purpose."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self.gate: Gate = self.app.state.context.gate
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_config=None, lifespan="on", timeout_graceful_shutdown=5, ws="none")
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started and self.gate.health().state != "starting")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def thread_server(settings: Settings) -> Iterator[ThreadServer]:
    server = ThreadServer(settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class ProcessServer:
    """`serve()` in a process of its own, as users run it."""

    def __init__(self, settings: dict[str, Any], log: Path) -> None:
        import json

        self.log = log
        self._log = log.open("wb")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TWOGATE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps({"port": 0, **settings}, default=str)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.line = ""
        self.url = ""

    def start(self) -> None:
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert "http://" in self.line, self.log.read_text(encoding="utf-8")
        self.url = self.line.split(" on ")[1].split()[0]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


@contextmanager
def process_server(log: Path, **settings: Any) -> Iterator[ProcessServer]:
    server = ProcessServer(settings, log)
    try:
        server.start()
        yield server
    finally:
        server.close()


def wait_until(condition: Any, seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture [H, W, 3], losslessly."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes, media_type: str = "image/jpeg") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def post_raw(client: httpx.Client, data: bytes, path: str = "/v1/embeddings", **more: Any) -> httpx.Response:
    return client.post(path, content=data, headers={"Content-Type": "image/jpeg", **more.pop("headers", {})}, **more)


def assert_problem(response: httpx.Response, status: int, name: str) -> dict[str, Any]:
    """It is a well-formed problem document of this type; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"/problems/{name}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["instance"].startswith("urn:twogate:")
    assert "Traceback" not in response.text
    for folder in (str(REPOSITORY), tempfile.gettempdir()):
        assert folder not in response.text
    return document
