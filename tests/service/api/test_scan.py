from __future__ import annotations

import httpx

from tests.service.support import assert_problem, data_uri, post_raw


def test_the_verdict_alone_is_the_same_as_with_the_embedding(client: httpx.Client, photo: bytes, suspicious: bytes) -> None:
    body = {"input": [data_uri(photo), data_uri(suspicious)]}
    scanned = client.post("/v1/scan", json=body).json()
    embedded = client.post("/v1/embeddings", json=body).json()
    assert scanned == {
        "model": "tiny/1",
        "flagged": True,
        "data": [{"index": item["index"], "dae": item["dae"]} for item in embedded["data"]],
    }


def test_flagged_says_whether_any_is(client: httpx.Client, photo: bytes) -> None:
    assert post_raw(client, photo, "/v1/scan").json()["flagged"] is False


def test_reject_shows_in_the_status(client: httpx.Client, suspicious: bytes) -> None:
    assert_problem(post_raw(client, suspicious, "/v1/scan", params={"on_flag": "reject"}), 422, "adversarial-suspected")


def test_a_form_of_an_upload_page_is_scanned_whatever_its_fields(
    client: httpx.Client, photo: bytes, suspicious: bytes
) -> None:
    answer = client.post("/v1/scan", files={"avatar": photo, "cover": suspicious}, data={"model": "T", "csrf": "x"})
    assert [item["dae"]["flagged"] for item in answer.json()["data"]] == [False, True]


def test_a_form_may_ask_to_reject(client: httpx.Client, suspicious: bytes) -> None:
    answer = client.post("/v1/scan", files={"file": suspicious}, data={"on_flag": "reject"})
    assert_problem(answer, 422, "adversarial-suspected")
