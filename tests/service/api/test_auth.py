from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from pydantic import SecretStr

from service.settings import Settings
from tests.service.support import assert_problem, post_raw, thread_server


@pytest.fixture(scope="module")
def locked(make_settings: Callable[..., Settings]) -> Iterator[httpx.Client]:
    keys = (SecretStr("first-key"), SecretStr("clé"))
    with thread_server(make_settings(api_keys=keys)) as server, httpx.Client(base_url=server.url) as client:
        yield client


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer wrong",
        "Bearer",
        "Bearer cl\xe8",
        "Bearer first-ke",
        "Bearer first-key2",
        "Basic first-key",
        "first-key",
    ],
)
def test_without_a_key_v1_is_closed(locked: httpx.Client, photo: bytes, header: str | None) -> None:
    headers = {"Authorization": header.encode("latin-1")} if header else {}
    for response in (
        post_raw(locked, photo, headers=headers),
        post_raw(locked, photo, "/v1/scan", headers=headers),
        locked.get("/v1/models", headers=headers),
        locked.get("/v1/models/tiny", headers=headers),
        locked.get("/v1/limits", headers=headers),
    ):
        assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


def test_any_of_the_keys_opens(locked: httpx.Client, photo: bytes) -> None:
    assert post_raw(locked, photo, headers={"Authorization": "Bearer first-key"}).status_code == 200


def test_health_and_metrics_stay_open(locked: httpx.Client) -> None:
    for path in ("/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"):
        assert locked.get(path).status_code == 200
