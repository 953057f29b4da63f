from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from model_store.bundle import Bundle
from service.settings import Settings
from tests.service.support import thread_server


def test_it_says_exactly_what_is_served(client: httpx.Client, bundle: Bundle) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert model["id"] == "tiny"
    assert model["object"] == "model"
    assert model["version"] == 1
    assert model["sha256"] == bundle.model_sha256
    assert model["embedding_dim"] == 24
    assert model["input"] == {"height": 32, "width": 32}
    assert model["detector"] == "consistency"
    assert model["max_fpr"] == 0.01
    assert model["smallest_max_fpr"] == pytest.approx(1 / 1201)
    assert model["on_flag"] == "flag"
    assert model["provider"] == "CPUExecutionProvider"


def test_it_says_the_operators_policy(make_settings: Callable[..., Settings]) -> None:
    with thread_server(make_settings(max_fpr=0.05, on_flag="reject")) as server:
        (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["max_fpr"], model["on_flag"]) == (0.05, "reject")
