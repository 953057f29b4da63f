from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from service.api.intake import Intake, parse
from service.problems import ImageTooLarge, InvalidRequest, MalformedRequest, Problem, TooManyImages, UnsupportedMedia


def _parse(body: bytes, content_type: str = "application/json", query: str = "") -> Intake:
    return parse(body, content_type, QueryParams(query), max_images=3, max_bytes=1000)


def _json(input_: Any, query: str = "", **more: Any) -> Intake:
    return _parse(json.dumps({"input": input_, **more}).encode(), query=query)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "input_",
    [
        _b64(b"picture"),
        "data:image/jpeg;base64," + _b64(b"picture"),
        "DATA:image/png;charset=utf-8;BASE64," + _b64(b"picture"),
        {"image": _b64(b"picture")},
        [{"image": "data:image/webp;base64," + _b64(b"picture")}],
        [_b64(b"picture")],
    ],
)
def test_the_forms_of_an_input(input_: Any) -> None:
    assert _json(input_).images == [b"picture"]


def test_other_clients_members_are_taken_or_ignored() -> None:
    intake = _json([_b64(b"a"), _b64(b"b")], modality="image", user="me", encoding_format="base64", truncate=True)
    assert intake.images == [b"a", b"b"]
    assert intake.options.encoding_format == "base64"


@pytest.mark.parametrize(
    ("input_", "detail"),
    [
        ("https://example.com/a.jpg", "URLs are not fetched"),
        ("file:///etc/passwd", "URLs are not fetched"),
        (["eA==", "HTTP://example.com"], "image 1: URLs"),
        ("not base64!", "not base64"),
        ("eA", "not base64"),
        ("eA==eA==", "not base64"),
        ("ab\ncd", "not base64"),
        ("_-_-", "not base64"),
        ("data:image/png;base64,%%%%", "not base64"),
        ("data:image/png,eA==", "must be base64"),
        ("data:text/plain;base64,eA==", "must begin with data:image/"),
        ("data:", "must begin with data:image/"),
        ("data:;base64,eA==", "must begin with data:image/"),
        ([], "no image"),
        ([1, 2, 3], "each a string"),
        ([[1, 2]], "each a string"),
        (None, "each a string"),
        ({"text": "hello"}, "each a string"),
        ([{"image": 3}], "each a string"),
    ],
)
def test_what_is_no_image_is_told_why(input_: Any, detail: str) -> None:
    with pytest.raises(InvalidRequest, match=detail) as found:
        _json(input_)
    assert "passwd" not in str(found.value)


@pytest.mark.parametrize(
    ("more", "pointer"),
    [
        ({"encoding_format": "int8"}, "/encoding_format"),
        ({"modality": "text"}, "/modality"),
        ({"on_flag": "ignore"}, "/on_flag"),
        ({"dimensions": "many"}, "/dimensions"),
    ],
)
def test_a_member_that_is_wrong_is_pointed_at(more: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRequest) as found:
        _json(_b64(b"x"), **more)
    assert found.value.members["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"input": "eA=="', b'{"input": "\xff"}'])
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        _parse(body)


def test_an_image_that_is_too_large_is_found_before_it_is_decoded() -> None:
    assert _json(_b64(b"x" * 1000)).images == [b"x" * 1000]
    with pytest.raises(ImageTooLarge) as found:
        _json([_b64(b"x"), _b64(b"x" * 1001)])
    assert found.value.members == {"index": 1, "limit": 1000, "actual": 1001}
    with pytest.raises(ImageTooLarge):
        _parse(b"x" * 1001, "image/png")


def test_too_many() -> None:
    with pytest.raises(TooManyImages) as found:
        _json([_b64(b"x")] * 4)
    assert found.value.members == {"limit": 3, "actual": 4}


def test_too_many_empty_files() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n\r\n'
    with pytest.raises(TooManyImages) as found:
        _parse(part * 4 + b"--b--\r\n", "multipart/form-data; boundary=b")
    assert found.value.members == {"limit": 3, "actual": 4}


@pytest.mark.parametrize("item", ['{"image":""}', '""', "1", "[]"])
def test_a_body_of_countless_values_is_refused_unread(item: str) -> None:
    values = ",".join([item] * 100_000)
    for body in (f'{{"input":[{values}]}}', f'{{"input":"eA==","more":[{values}]}}'):
        with pytest.raises(TooManyImages):
            _parse(body.encode())


@pytest.mark.parametrize("content_type", ["", "image/jpeg", "image/anything", "application/octet-stream"])
def test_a_raw_body(content_type: str) -> None:
    assert _parse(b"picture", content_type).images == [b"picture"]
    with pytest.raises(InvalidRequest, match="no image"):
        _parse(b"", content_type)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/pdf"])
def test_another_body_is_unsupported(content_type: str) -> None:
    with pytest.raises(UnsupportedMedia) as found:
        _parse(b"picture", content_type)
    assert "multipart/form-data" in found.value.members["accepted"]


@pytest.mark.parametrize(
    ("query", "member", "policy"),
    [
        ("", None, "flag"),
        ("on_flag=reject", None, "reject"),
        ("", "reject", "reject"),
        ("on_flag=flag", "reject", "reject"),
        ("on_flag=reject", "flag", "reject"),
        ("on_flag=reject&on_flag=flag", None, "reject"),
        ("on_flag=flag&on_flag=reject", "flag", "reject"),
    ],
)
def test_either_place_may_ask_to_reject(query: str, member: str | None, policy: str) -> None:
    more = {"on_flag": member} if member else {}
    assert _json(_b64(b"x"), query, **more).options.on_flag == policy


def test_options_of_the_other_forms_are_query_parameters() -> None:
    options = _parse(b"x", "image/png", "encoding_format=base64&model=tiny&dimensions=24").options
    assert (options.encoding_format, options.model, options.dimensions) == ("base64", "tiny", 24)
    assert _json(_b64(b"x"), "encoding_format=base64").options.encoding_format == "base64"
    with pytest.raises(InvalidRequest):
        _parse(b"x", "image/png", "on_flag=never")


def _form(
    fields: list[tuple[str, str]], query: str = "", *, foreign: bool = False, files: tuple[bytes, ...] = (b"x",)
) -> Intake:
    parts = [(f'form-data; name="{name}"', value.encode()) for name, value in fields]
    parts += [('form-data; name="file"; filename="a.png"', data) for data in files]
    body = b"".join(b"--b\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    kind = "multipart/form-data; boundary=b"
    return parse(body + b"--b--\r\n", kind, QueryParams(query), max_images=3, max_bytes=1000, foreign_forms=foreign)


def test_fields_of_a_form_are_those_of_the_json() -> None:
    options = _form([("model", "tiny"), ("encoding_format", "base64"), ("dimensions", "24"), ("modality", "image")]).options
    assert (options.model, options.encoding_format, options.dimensions) == ("tiny", "base64", 24)
    assert _form([("note", "a field"), ("model", "")]).options.model is None
    assert _form([("on_flag", "reject")]).options.on_flag == "reject"
    assert _form([("on_flag", "reject"), ("on_flag", "flag")]).options.on_flag == "reject"
    assert _form([("on_flag", "flag")], "on_flag=reject").options.on_flag == "reject"
    for name, value in (("encoding_format", "int8"), ("modality", "text"), ("on_flag", "ignore"), ("dimensions", "many")):
        with pytest.raises(InvalidRequest, match=f"/{name}"):
            _form([(name, value)])


def test_no_field_of_an_apps_own_form_keeps_its_files_from_being_judged() -> None:
    # Gates let pass what has no image for Twogate (invalid-request), and what they cannot ask about (model-not-found).
    odd = [("model", "a car"), ("encoding_format", "int8"), ("modality", "audio"), ("dimensions", "3"), ("on_flag", "never")]
    intake = _form(odd, "on_flag=reject", foreign=True)
    assert (intake.images, intake.options.model, intake.options.on_flag) == ([b"x"], None, "reject")
    assert _form([("on_flag", "reject")], foreign=True).options.on_flag == "reject"


def test_empty_files_alone_are_no_image_and_beside_others_they_are_kept() -> None:
    for empty in (lambda: _form([], files=(b"", b"")), lambda: _parse(b"", "image/png"), lambda: _json("")):
        with pytest.raises(InvalidRequest, match="there is no image in the request"):
            empty()
    # Left out, or refused as "no image", they would take the other one past a gate.
    assert _form([], files=(b"", b"x")).images == [b"", b"x"]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from(["application/json", "multipart/form-data; boundary=a", "image/png", "", "x/y", ";;", "\x00"]),
)
def test_nothing_but_a_problem_comes_out_of_nonsense(body: bytes, content_type: str) -> None:
    with suppress(Problem):
        assert _parse(body, content_type).images


_json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "input", "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["input", "model", "encoding_format", "dimensions", "on_flag"]), _json_values))
def test_nothing_but_a_problem_comes_out_of_any_json(value: dict[str, Any]) -> None:
    with suppress(Problem):
        assert _parse(json.dumps(value).encode()).images
