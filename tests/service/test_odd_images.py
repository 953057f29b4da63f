"""Every odd, broken and hostile image of Pillow's own tests, posted to a server that runs as users run it."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.service.support import process_server

KNOWN = {
    415: {"/problems/unsupported-media"},
    413: {"/problems/image-too-large"},
    422: {"/problems/undecodable-image", "/problems/invalid-request"},
}


@pytest.fixture(scope="module")
def odd_images(shared_data: Path) -> dict[str, bytes]:
    archive = shared_data / "odd-images.tar.xz"
    if not archive.is_file():
        pytest.skip("odd-images.tar.xz is not among the shared data sets")
    with tarfile.open(archive) as tar:
        return {
            member.name: file.read() for member in tar if member.isfile() and (file := tar.extractfile(member)) is not None
        }


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[str]:
    log = tmp_path_factory.mktemp("odd") / "log"
    with process_server(log, store=tiny_bundle.parents[1], bundle="tiny", threads=1) as server:
        process = psutil.Process(server.process.pid)
        yield server.url
        assert server.process.poll() is None
        assert process.memory_info().rss < 400 * 2**20
        server.terminate()
        assert server.process.wait(10) == 0
    text = log.read_text(encoding="utf-8")
    assert "in an unknown way" not in text
    assert "Traceback" not in text


def test_none_hurts_and_a_clean_photo_is_answered_right_after_each(
    url: str, odd_images: dict[str, bytes], photo: bytes
) -> None:
    assert len(odd_images) > 1000

    def post(name: str) -> tuple[str, httpx.Response, httpx.Response]:
        odd = client.post("/v1/embeddings", content=odd_images[name], headers={"Content-Type": "image/png"})
        clean = client.post("/v1/embeddings", content=photo, headers={"Content-Type": "image/jpeg"})
        return name, odd, clean

    with httpx.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor(3) as pool:
        expected = client.post("/v1/embeddings", content=photo).json()["data"][0]["embedding"]
        statuses: Counter[int] = Counter()
        for name, odd, clean in pool.map(post, odd_images):
            statuses[odd.status_code] += 1
            assert odd.status_code < 500, name
            if odd.status_code != 200:
                assert odd.json()["type"] in KNOWN[odd.status_code], name
            assert clean.status_code == 200, name
            assert clean.json()["data"][0]["embedding"] == pytest.approx(expected, abs=1e-5), name
        assert client.get("/health/ready").status_code == 200
    # The corpus has plenty of each: a server that refused or swallowed everything would not pass.
    assert statuses[200] > 100
    assert statuses[415] > 100
    assert statuses[422] > 5
