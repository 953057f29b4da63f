from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from service.client import TwogateClient


def test_the_gate_is_told_how_long_the_client_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        client = TwogateClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=2.5)
        asked = pool.submit(client.scan, b"photo")
        connection, _ = listener.accept()
        with connection:
            head = connection.recv(65536)
        asked.result(20)
    assert b"X-Request-Timeout: 2.5\r\n" in head
