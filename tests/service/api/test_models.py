from __future__ import annotations

from collections.abc import Callable

import httpx
import openai
import pytest

from model_store.bundle import Bundle
from service.settings import Settings
from tests.service.support import ThreadServer, assert_problem, thread_server


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


def test_one_is_there_by_its_names(server: ThreadServer, client: httpx.Client) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    for name in ("tiny", "tiny/1"):
        assert client.get(f"/v1/models/{name}").json() == listed
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
            assert sdk.models.retrieve(name).id == "tiny"
    for name in ("tiny/2", "nobody"):
        document = assert_problem(client.get(f"/v1/models/{name}"), 404, "model-not-found")
        assert document["served"] == ["tiny", "tiny/1"]
    assert "/v1/models/{id}" in client.get("/openapi.json").json()["paths"]
