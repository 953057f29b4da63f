"""Take the files and the fields out of a multipart/form-data body."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.problems import ImageTooLarge, MalformedRequest, TooManyImages, UnsupportedMedia

_PLAIN = ("", "binary", "8bit", "7bit")
_MAX_FIELDS = 100
_BOUNDARY = re.compile(
    r"""boundary=(?:"([0-9A-Za-z'()+_,./:=?-]{1,70})"|([0-9A-Za-z'+_.-]{1,70})(?=\s*(?:;|$)))""", re.IGNORECASE
)
"""RFC 2046, section 5.1.1, without blanks; unquoted only what is a token in RFC 9110."""
_FILE_NAME = re.compile(rb"(?:^|;)\s*filename[^=;]*=", re.IGNORECASE)
"""Wherever it stands: whether a quote before it was closed, frameworks see differently."""


@dataclass(frozen=True)
class Form:
    """What a form holds."""

    files: list[bytes]
    """The contents of all file parts, in their order, whatever their fields are called."""
    fields: list[tuple[str, str]]
    """Name and value of all other parts, in their order."""


def read_form(body: bytes, content_type: str, *, max_files: int, max_bytes: int) -> Form:
    """The files and the other fields of a form.

    A part is a file if it has a file name, or is of type image/* or application/octet-stream. Raises
    MalformedRequest, TooManyImages, ImageTooLarge, or UnsupportedMedia for a part with a Content-Transfer-Encoding:
    some frameworks undo it, so that what the app stores would not be what was judged.

    A form that frameworks are known to read in different ways is malformed, so that an app finds no file in it that was
    not found here: a boundary that they cut in two ways, more delimiters than parts, a form within a part, a part's header
    twice or over two lines.
    """
    boundary = _boundary(content_type)
    parts = _Parts(max_files, max_bytes)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_header_field": parts.header_field,
                "on_header_value": parts.header_value,
                "on_header_end": parts.header_end,
                "on_headers_finished": parts.headers_finished,
                "on_part_data": parts.data,
                "on_part_end": parts.end,
                "on_end": parts.finish,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MalformedRequest("the multipart body cannot be parsed") from None
    if not parts.finished:
        raise MalformedRequest("the multipart body ends before its closing boundary")
    if body.count(b"--" + boundary) != parts.count + 1:
        raise MalformedRequest("the multipart body has its boundary inside a part")
    return Form(parts.files, parts.fields)


def _boundary(content_type: str) -> bytes:
    """The boundary, where everybody reads the same one."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedRequest("multipart/form-data without a boundary")
    said = [found.groups() for found in _BOUNDARY.finditer(content_type)]
    if [quoted or plain for quoted, plain in said] != [boundary.decode("latin-1")]:
        raise MalformedRequest("the boundary of multipart/form-data has characters that must be quoted, or may not be there")
    return boundary


@dataclass
class _Parts:
    """Collects files and fields from the parser's callbacks."""

    max_files: int
    max_bytes: int
    files: list[bytes] = field(default_factory=list)
    fields: list[tuple[str, str]] = field(default_factory=list)
    finished: bool = False
    count: int = 0
    _field: bytes = b""
    _value: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _current: bytearray = field(default_factory=bytearray)
    _name: str | None = ""
    """Of a part that is a field; None where the part is a file."""
    _unnamed: bool = False

    def begin(self) -> None:
        self.count += 1
        if self.count > self.max_files + _MAX_FIELDS:
            raise MalformedRequest(f"more than {self.max_files + _MAX_FIELDS} parts")
        self._headers = {}
        self._current = bytearray()
        self._name = ""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        name, value = self._field.strip().lower(), self._value.strip()
        if name in self._headers or b"\n" in value or b"\r" in value:
            raise MalformedRequest("a part of the multipart body has a header twice, or on two lines")
        self._headers[name] = value
        self._field = self._value = b""

    def headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        media_type, _ = parse_options_header(self._headers.get(b"content-type"))
        if media_type.startswith(b"multipart/"):
            raise MalformedRequest("a part of the multipart body is multipart itself")
        named = b"filename" in options or _FILE_NAME.search(disposition) is not None
        typed = media_type.startswith(b"image/") or media_type == b"application/octet-stream"
        self._name = None if named or typed else _text(options.get(b"name", b""))
        if self._name is not None:
            return
        index = len(self.files)
        if self._headers.get(b"content-transfer-encoding", b"").decode("latin-1").lower() not in _PLAIN:
            raise UnsupportedMedia(f"image {index}: send it without Content-Transfer-Encoding", index=index)
        self._unnamed = not options.get(b"filename") and b"filename*" not in disposition.lower()

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._name is not None:
            self._current += data[start:end]
            return
        index = len(self.files)
        if index == self.max_files:
            # Not earlier: the empty file inputs of a form do not count.
            raise TooManyImages(f"more than {self.max_files} images", limit=self.max_files)
        size = len(self._current) + end - start
        if size > self.max_bytes:
            raise ImageTooLarge(
                f"image {index}: more than {self.max_bytes} bytes", index=index, limit=self.max_bytes, actual=size
            )
        self._current += data[start:end]

    def end(self) -> None:
        if self._name is not None:
            self.fields.append((self._name, _text(self._current)))
        # A form whose file input was left empty sends a part without name and content.
        elif self._current or not self._unnamed:
            self.files.append(bytes(self._current))

    def finish(self) -> None:
        self.finished = True


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "replace")
