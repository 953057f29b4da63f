from __future__ import annotations

import json
import logging
import time

import httpx
import pytest

from tests.service.support import ThreadServer, assert_problem, post_raw, wait_until

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_the_request_id_is_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/health/live", headers={"X-Request-Id": "my-id"}).headers["x-request-id"] == "my-id"
    made = client.get("/health/live", headers={"X-Request-Id": "not ok!"}).headers["x-request-id"]
    assert len(made) == 32


def test_a_problem_is_named_by_the_trace_or_else_by_the_id(client: httpx.Client) -> None:
    traced = client.get("/nothing", headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"})
    assert assert_problem(traced, 404, "not-found")["instance"] == f"urn:twogate:trace:{TRACE}"
    plain = client.get("/nothing", headers={"X-Request-Id": "my-id"})
    assert plain.json()["instance"] == "urn:twogate:request:my-id"


def test_headers_that_every_answer_has(client: httpx.Client, photo: bytes) -> None:
    for response in (
        client.get("/health/live"),
        client.get("/nothing"),
        post_raw(client, photo),
        post_raw(client, b""),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "x-request-id" in response.headers


def test_methods_and_paths_that_do_not_exist(client: httpx.Client) -> None:
    response = client.put("/v1/scan")
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    assert_problem(client.get("/v1/embeddings/x"), 404, "not-found")
    assert_problem(client.request("BREW", "/v1/scan"), 405, "method-not-allowed")


def test_one_line_per_request_without_what_was_sent(
    client: httpx.Client, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "twogate.access"):
        post_raw(client, photo, "/v1/scan?token=secret", headers={"X-Request-Id": "me"})
        wait_until(lambda: any(record.name == "twogate.access" for record in caplog.records))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "twogate.access"]
    noted = json.loads(line)
    assert noted["request_id"] == "me"
    assert (noted["method"], noted["route"], noted["status"]) == ("POST", "/v1/scan", 200)
    assert (noted["body_bytes"], noted["images"], noted["problem"]) == (len(photo), 1, None)
    assert "secret" not in line


def test_a_failure_of_ours_is_logged_and_not_shown(
    server: ThreadServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(server.gate, "health", broken)
    response = client.get("/health/ready", headers={"X-Request-Id": "find-me"})
    assert_problem(response, 500, "internal-error")
    assert "secret" not in response.text
    (record,) = [record for record in caplog.records if record.name == "twogate.failures"]
    assert "find-me" in record.getMessage()
    assert "a secret of ours" in str(record.exc_info)


def test_who_left_before_the_answer_is_counted_so(server: ThreadServer, client: httpx.Client) -> None:
    import socket

    def left() -> float:
        sample = 'twogate_requests_total{code="499",method="POST",route="/v1/scan"} '
        lines = client.get("/metrics").text.splitlines()
        return float(next((line for line in lines if line.startswith(sample)), "0").split()[-1])

    before = left()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"POST /v1/scan HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
        time.sleep(0.05)
    wait_until(lambda: left() == before + 1)
