"""Is an ONNX model self-contained? Read from its bytes, before any runtime sees them.

An ONNX file may name other files to read weights from, or operators that a host must supply as native code. A
bundle's graph does neither. The serving side has no `onnx` package, so this reads the few protobuf fields that matter:
a message is (tag, value) pairs, tag = field number << 3 | wire type (protobuf.dev/programming-guides/encoding).
Whatever does not parse is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from model_store.errors import BundleError
from model_store.manifest import MODEL_FILE

# Message -> field number -> the message that the field holds (onnx.proto3): every way to a tensor or a node.
_HOLDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_MODEL_FUNCTIONS = 25
_NODE_OP_TYPE, _NODE_DOMAIN = 4, 7
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_STANDARD_DOMAINS = (b"", b"ai.onnx")
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def check_self_contained(model: bytes, file: str = MODEL_FILE) -> None:
    """Raise BundleError unless the model's weights are all inside it and its operators are all standard ONNX.

    `file` is the model's name inside the bundle.
    """
    waiting: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    try:
        while waiting:
            message, content = waiting.pop()
            op_type, domain = b"?", b""
            for field, value in _fields(content):
                inner = _HOLDS[message].get(field)
                if inner is not None:
                    waiting.append((inner, _bytes(value)))
                elif message == "model" and field == _MODEL_FUNCTIONS:
                    raise BundleError(file, "defines functions of its own; they must be inlined before export")
                elif message == "tensor" and (
                    field == _TENSOR_EXTERNAL_DATA or (field == _TENSOR_DATA_LOCATION and value != 0)
                ):
                    raise BundleError(file, "keeps weights in another file; a bundle's graph is self-contained")
                elif message == "node" and field == _NODE_OP_TYPE:
                    op_type = bytes(_bytes(value))
                elif message == "node" and field == _NODE_DOMAIN:
                    # The last of several counts in protobuf; here, each must be standard.
                    domain = domain if domain not in _STANDARD_DOMAINS else bytes(_bytes(value))
            if domain not in _STANDARD_DOMAINS:
                name = f"{domain.decode(errors='replace')}.{op_type.decode(errors='replace')}"
                raise BundleError(file, f"uses the operator {name!r}, which is not standard ONNX")
    except (IndexError, ValueError):
        raise BundleError(file, "is not an ONNX model") from None


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one message: numbers for varints, bytes for all else. ValueError or IndexError on bad encoding."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        field, wire = tag >> 3, tag & 7
        if not 0 < field < 1 << 29:
            raise ValueError("field number")
        if wire == _VARINT:
            number, at = _varint(content, at)
            yield field, number
            continue
        if wire == _LENGTH:
            length, at = _varint(content, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError("wire type")  # groups, which ONNX does not use
        if length > len(content) - at:
            raise ValueError("length")
        yield field, content[at : at + length]
        at += length


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A base-128 number, least significant first, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("varint")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value
