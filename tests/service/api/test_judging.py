from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.service.support import assert_problem, thread_server, wait_until


def _request(photo: bytes) -> bytes:
    return f"POST /v1/scan HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n".encode() + photo


def test_images_of_a_client_that_left_are_never_computed_and_make_room_at_once(
    make_settings: Callable[..., Settings], photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(max_images=1, max_pending_images=2)
    with thread_server(settings) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        assert server.gate._engine is not None
        batcher = server.gate._engine.batcher
        real, go, computed = batcher._compute, threading.Event(), []

        def held_back(pictures: Any) -> Any:
            assert go.wait(10)
            computed.append(len(pictures))
            return real(pictures)

        monkeypatch.setattr(batcher, "_compute", held_back)
        with socket.create_connection(("127.0.0.1", server.port)) as stayer:
            stayer.sendall(_request(photo))
            wait_until(lambda: batcher._batch)
            with socket.create_connection(("127.0.0.1", server.port)) as leaver:
                leaver.sendall(_request(photo))
                wait_until(lambda: batcher._queue.qsize() == 1)
                # Both permits are taken: there is no room for a third.
                refused = client.post("/v1/scan", content=photo)
                assert_problem(refused, 503, "overloaded")
                assert int(refused.headers["retry-after"]) >= 1
            wait_until(lambda: server.gate._permits.taken == 1)
            assert not go.is_set()
            go.set()
            assert stayer.recv(65536).startswith(b"HTTP/1.1 200")
        assert client.post("/v1/scan", content=photo).status_code == 200
        assert computed == [1, 1]
        assert 'code="499",method="POST",route="/v1/scan"} 1.0' in client.get("/metrics").text
