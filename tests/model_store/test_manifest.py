from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.errors import BundleError
from model_store.manifest import MANIFEST_FILE, Golden, parse_manifest


@pytest.fixture
def sealed(tiny_bundle: Path) -> bytes:
    return (tiny_bundle / MANIFEST_FILE).read_bytes()


def resealed(sealed: bytes, **changes: Any) -> bytes:
    """The manifest with other fields and a digest that fits them."""
    raw = {**json.loads(sealed), **changes, "digest": "0" * 64}
    unsealed = json.dumps(raw).encode()
    return unsealed.replace(b"0" * 64, hashlib.sha256(unsealed).hexdigest().encode(), 1)


def reason(data: bytes) -> str:
    with pytest.raises(BundleError) as refused:
        parse_manifest(data)
    assert refused.value.file == MANIFEST_FILE
    return refused.value.reason


def test_what_is_written_is_read_back(sealed: bytes) -> None:
    manifest = parse_manifest(sealed)
    assert manifest.sealed_bytes() == sealed
    assert parse_manifest(resealed(sealed)) == manifest.model_copy(update={"digest": json.loads(resealed(sealed))["digest"]})


def test_the_digest_can_be_checked_without_this_program(sealed: bytes) -> None:
    digest = json.loads(sealed)["digest"]
    assert hashlib.sha256(sealed.replace(digest.encode(), b"0" * 64, 1)).hexdigest() == digest


def test_a_changed_field_or_an_unsealed_manifest_is_refused(sealed: bytes) -> None:
    assert "changed after" in reason(sealed.replace(b'"name": "tiny"', b'"name": "tine"'))
    assert "changed after" in reason(sealed + b"\n")
    digest = json.loads(sealed)["digest"].encode()
    assert "changed after" in reason(sealed.replace(digest, b"0" * 64))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_what_is_not_json_is_refused(data: bytes) -> None:
    assert "is not JSON" in reason(data)


@pytest.mark.parametrize("data", [b"[]", b"null", b'"x"', b"{}", b'{"schema_version": 2}', b'{"schema_version": "1"}'])
def test_another_schema_is_refused_before_anything_else(data: bytes) -> None:
    assert "schema version" in reason(data)


def test_a_manifest_of_a_newer_program_says_so(sealed: bytes) -> None:
    newer = "made by a newer Twogate? Update this one"
    assert newer in reason(b'{"schema_version": 2}')
    assert newer in reason(resealed(sealed, surprise=1))
    assert newer not in reason(b'{"schema_version": 0}')
    assert newer not in reason(resealed(sealed, embedding_dim=0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../up"),
        ("name", "Photos"),
        ("name", ""),
        ("version", 0),
        ("created", "yesterday"),
        ("embedding_dim", 0),
        ("branches", []),
        ("surprise", 1),
        ("files", {"model.onnx": 7}),
        ("detector", {"name": "magic", "description": ""}),
        ("pixels", {"height": 4, "width": 32}),
    ],
)
def test_a_wrong_field_is_named(sealed: bytes, field: str, value: object) -> None:
    assert f"field '{field}" in reason(resealed(sealed, **{field: value}))


def test_a_missing_field_is_named(sealed: bytes) -> None:
    raw = json.loads(sealed)
    del raw["calibration"]
    assert "field 'calibration'" in reason(json.dumps(raw).encode())


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_golden_arrays_survive_packing(n: int, dim: int, branches: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 8, 9, 3), dtype=np.uint8)
    embedding, confidence = (rng.normal(size=(n, k)).astype(np.float32) for k in (dim, branches))
    score = rng.normal(size=n).astype(np.float32)
    packed = Golden.of(images, embedding, confidence, score)
    again = Golden.model_validate_json(packed.model_dump_json()).arrays()
    for expected, found in zip((images, embedding, confidence, score), again, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
