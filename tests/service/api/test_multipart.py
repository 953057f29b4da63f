from __future__ import annotations

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.multipart import Form, read_form
from service.problems import ImageTooLarge, MalformedRequest, Problem, TooManyImages, UnsupportedMedia

TYPE = "multipart/form-data; boundary=xyz"


def _parts(body: bytes, content_type: str = TYPE, max_files: int = 4, max_bytes: int = 100) -> list[bytes]:
    return _form(body, content_type, max_files, max_bytes).files


def _form(body: bytes, content_type: str = TYPE, max_files: int = 4, max_bytes: int = 100) -> Form:
    return read_form(body, content_type, max_files=max_files, max_bytes=max_bytes)


def _body(*parts: tuple[str, bytes]) -> bytes:
    return b"".join(b"--xyz\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + b"--xyz--\r\n"


def _file(name: str = "a.jpg", more: str = "") -> str:
    return f'Content-Disposition: form-data; name="whatever"; filename="{name}"\r\nContent-Type: image/jpeg{more}'


def test_every_file_is_taken_whatever_its_field_is_called_and_other_fields_beside_them() -> None:
    request = httpx.Request(
        "POST",
        "http://x",
        files=[("a", ("1.jpg", b"one")), ("b", ("2.txt", b"two", "text/plain"))],
        data={"note": "a field", "model": "a car"},
    )
    form = _form(request.read(), request.headers["content-type"])
    assert form.files == [b"one", b"two"]
    assert form.fields == [("note", "a field"), ("model", "a car")]


def test_a_file_without_a_name_is_one_by_its_type_and_an_extended_name_is_a_name() -> None:
    body = _body(
        ('Content-Disposition: form-data; name="a"\r\nContent-Type: image/png', b"typed"),
        ("Content-Disposition: form-data; name=a; filename*=UTF-8''x.png", b"extended"),
        ('Content-Disposition: form-data; name="a"\r\nContent-Type: application/json', b"{}"),
    )
    assert _parts(body) == [b"typed", b"extended"]


def test_an_empty_file_input_is_no_image_and_an_empty_file_is() -> None:
    assert _parts(_body((_file(""), b""), (_file("a"), b"x"))) == [b"x"]
    assert _parts(_body((_file("a"), b""))) == [b""]


def test_too_many_and_too_large() -> None:
    with pytest.raises(TooManyImages):
        _parts(_body(*[(_file(), b"x")] * 5))
    with pytest.raises(ImageTooLarge) as found:
        _parts(_body((_file(), b"x"), (_file(), b"x" * 101)))
    assert found.value.members["index"] == 1


def test_an_encoding_that_some_frameworks_undo_is_refused() -> None:
    with pytest.raises(UnsupportedMedia):
        _parts(_body((_file(more="\r\nContent-Transfer-Encoding: base64"), b"eA==")))
    assert _parts(_body((_file(more="\r\nContent-Transfer-Encoding: binary"), b"x"))) == [b"x"]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (_body((_file(), b"x")), "multipart/form-data"),
        (_body((_file(), b"x"))[:-6], TYPE),
        (b"", TYPE),
        (b"nonsense", TYPE),
        (_body((_file(), b"x")), "multipart/form-data; boundary=" + "y" * 1000),
        (_body(*[('Content-Disposition: form-data; name="a"', b"x")] * 200), TYPE),
    ],
)
def test_what_cannot_be_parsed_is_malformed(body: bytes, content_type: str) -> None:
    with pytest.raises(MalformedRequest):
        _parts(body, content_type)


_FIELD = 'Content-Disposition: form-data; name="a"'


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        # In each of these Werkzeug 3.1, Tomcat or PHP may find a file a.jpg, and this parser saw none.
        (_body((_FIELD, b'\n--xyz\nContent-Disposition: form-data; name="b"; filename="a.jpg"\n\nx')), TYPE),
        (_body((f'{_FIELD}; filename="a.jpg"\r\n{_FIELD}', b"x")), TYPE),
        (_body((f'{_FIELD}\nX: y\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"', b"x")), TYPE),
        (
            _body(
                (f"{_FIELD}\r\nContent-Type: multipart/mixed; boundary=in", b'--in\r\nfilename="a.jpg"\r\n\r\nx\r\n--in--')
            ),
            TYPE,
        ),
        (_body((_file(), b"x")), "multipart/form-data; boundary=xyz c"),
        (_body((_file(), b"x")), "multipart/form-data; boundary=xyz:c"),
        (_body((_file(), b"x")), "multipart/form-data; boundary=xyz; boundary=abc"),
        (_body((_file(), b"x")), 'multipart/form-data; boundary="xy\\z"'),
    ],
)
def test_what_frameworks_read_in_different_ways_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(MalformedRequest):
        _parts(body, content_type)


def test_a_file_name_behind_a_quote_that_nobody_closed_is_one() -> None:
    assert _parts(_body(('Content-Disposition: form-data; name=x"; filename=a.jpg; y="', b"x"))) == [b"x"]
    assert _parts(_body(('Content-Disposition: filename="a.jpg"; name="a"', b"x"))) == [b"x"]
    assert _parts(_body(('Content-Disposition: form-data; name="filename"', b"a text"))) == []


@pytest.mark.parametrize(
    "boundary",
    ["----WebKitFormBoundary7MA4YWxkTrZu0gW", "--geckoformboundary1a2b", "=_Part_1.23", "0123456789abcdef'()+_,-./:=?"],
)
def test_boundaries_that_clients_send_are_read(boundary: str) -> None:
    body = _body((_file(), b"x")).replace(b"xyz", boundary.encode())
    assert _parts(body, f'multipart/form-data; charset=utf-8; boundary="{boundary}"') == [b"x"]
    if not set(boundary) & set("()=,/:? "):
        assert _parts(body, f"multipart/form-data; boundary={boundary} ; charset=utf-8") == [b"x"]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.binary(max_size=10))
def test_nothing_but_a_problem_comes_out_of_a_damaged_body(content: bytes, at: int, damage: bytes) -> None:
    body = _body((_file(), content), (_file(), b"second"))
    body = body[:at] + damage + body[at + len(damage) :]
    try:
        files = _parts(body)
    except Problem:
        return
    assert sum(map(len, files)) <= len(body)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=4))
def test_contents_come_out_as_they_went_in(contents: list[bytes]) -> None:
    # The boundary cannot be inside: that is the sender's duty.
    contents = [content.replace(b"--xyz", b"") for content in contents]
    if contents:
        assert _parts(_body(*[(_file(), content) for content in contents])) == contents
