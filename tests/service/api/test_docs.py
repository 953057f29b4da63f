from __future__ import annotations

import httpx
import pytest

from service.problems import all_problems


def test_the_page_is_self_contained_and_shows_every_path_and_problem(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert "http://" not in page.text.replace(str(client.base_url).rstrip("/"), "")
    assert "https://" not in page.text
    paths = ("/v1/embeddings", "/v1/scan", "/v1/tasks/{task}/classify", "/v1/models", "/v1/limits")
    for path in (*paths, "/health/live", "/health/ready", "/metrics"):
        assert f" {path}</code>" in page.text
    for kind in all_problems():
        assert client.get(f"/problems/{kind.name}").text.startswith(kind.name)
    assert client.get("/problems/unknown").status_code == 404
    assert client.get("/").headers["location"] == "/docs"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/scan"])
def test_the_three_forms_are_described_and_the_examples_work(client: httpx.Client, path: str) -> None:
    operation = client.get("/openapi.json").json()["paths"][path]["post"]
    content = operation["requestBody"]["content"]
    assert list(content) == ["application/json", "multipart/form-data", "image/*"]
    for example in content["application/json"]["examples"].values():
        assert client.post(path, json=example["value"]).status_code == 200
    assert {"on_flag", "model", "encoding_format", "X-Request-Timeout"} <= {
        parameter["name"] for parameter in operation["parameters"]
    }


def test_every_reference_in_the_description_leads_somewhere(client: httpx.Client) -> None:
    spec = client.get("/openapi.json").json()

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for value in node for found in references(value)] if isinstance(node, list) else []

    found = references(spec)
    assert found
    for reference in found:
        node = spec
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
