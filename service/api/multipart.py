"""Take the files out of a multipart/form-data body."""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.problems import ImageTooLarge, MalformedRequest, TooManyImages, UnsupportedMedia

_PLAIN = ("", "binary", "8bit", "7bit")
_MAX_FIELDS = 100


def file_parts(body: bytes, content_type: str, *, max_files: int, max_bytes: int) -> list[bytes]:
    """The contents of all file parts, in their order, whatever their fields are called; other fields are skipped.

    A part is a file if it has a file name, or is of type image/* or application/octet-stream. Raises
    MalformedRequest, TooManyImages, ImageTooLarge, or UnsupportedMedia for a part with a Content-Transfer-Encoding:
    some frameworks undo it, so that what the app stores would not be what was judged.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedRequest("multipart/form-data without a boundary")
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
    return parts.files


@dataclass
class _Parts:
    """Collects files from the parser's callbacks."""

    max_files: int
    max_bytes: int
    files: list[bytes] = field(default_factory=list)
    finished: bool = False
    _count: int = 0
    _field: bytes = b""
    _value: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _current: bytearray | None = None
    _unnamed: bool = False

    def begin(self) -> None:
        self._count += 1
        if self._count > self.max_files + _MAX_FIELDS:
            raise MalformedRequest(f"more than {self.max_files + _MAX_FIELDS} parts")
        self._headers = {}
        self._current = None

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[self._field.strip().lower()] = self._value.strip()
        self._field = self._value = b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        media_type, _ = parse_options_header(self._headers.get(b"content-type"))
        extended = b"filename*" in self._headers.get(b"content-disposition", b"").lower()
        named = b"filename" in options or extended
        typed = media_type.startswith(b"image/") or media_type == b"application/octet-stream"
        if not (named or typed):
            return
        index = len(self.files)
        if self._headers.get(b"content-transfer-encoding", b"").decode("latin-1").lower() not in _PLAIN:
            raise UnsupportedMedia(f"image {index}: send it without Content-Transfer-Encoding", index=index)
        self._unnamed = not options.get(b"filename") and not extended
        self._current = bytearray()

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._current is None:
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
        # A form whose file input was left empty sends a part without name and content.
        if self._current is not None and (self._current or not self._unnamed):
            self.files.append(bytes(self._current))
        self._current = None

    def finish(self) -> None:
        self.finished = True
