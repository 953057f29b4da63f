"""From a request to encoded images: JSON in OpenAI's shape, multipart files, or one raw body."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import QueryParams

from service.api.multipart import read_form
from service.api.schemas import EncodingFormat
from service.choices import OnFlag
from service.problems import ImageTooLarge, InvalidRequest, MalformedRequest, Problem, TooManyImages, UnsupportedMedia

M = TypeVar("M", bound=BaseModel)
BODY_TYPES = ("application/json", "multipart/form-data", "image/*", "application/octet-stream")
_FEWEST_COMMAS, _COMMAS_PER_IMAGE = 1000, 10
_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(?:;[^;,]*)*),", re.IGNORECASE)


class Options(BaseModel):
    """What may be asked for beside the images: members of the JSON, fields of a form, or query parameters."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, description="name, or name/version, of the model; default: the one that is served")
    encoding_format: EncodingFormat = Field("float", description="base64: little-endian float32")
    dimensions: int | None = Field(None, description="only the model's own embedding_dim; embeddings are never cut")
    on_flag: OnFlag = Field("flag", description="reject: 422 if an image is flagged; never less than the server's own")


class ImageItem(BaseModel):
    """An image as a list item, in the shape that some multimodal APIs have."""

    image: str = Field(description="data-URI or base64")


class BodyOptions(Options):
    """What JSON and form know beside the images. What is not listed is ignored."""

    modality: Literal["image"] = Field("image", description="as in infinity")
    user: str | None = Field(None, description="ignored")


class EmbeddingRequest(BodyOptions):
    """The JSON body, in OpenAI's shape. Members that are not listed are ignored."""

    input: str | ImageItem | list[str | ImageItem] = Field(
        description="an image, or a list of images, each a data-URI (data:image/...;base64,...) or base64; no URLs"
    )

    @field_validator("input", mode="before")
    @classmethod
    def _images(cls, value: Any) -> Any:
        """One message that helps, instead of one for every member of the union."""
        items = value if isinstance(value, list) else [value]
        for item in items:
            text = item.get("image") if isinstance(item, dict) else item
            if not isinstance(text, str):
                raise ValueError('must be an image or a list of images, each a string or {"image": string}')
        return value


@dataclass(frozen=True)
class Intake:
    """What a request asks for."""

    images: list[bytes]
    options: Options


def parse(
    body: bytes, content_type: str, query: QueryParams, *, max_images: int, max_bytes: int, foreign_forms: bool = False
) -> Intake:
    """Read a request's body by its Content-Type; runs in a thread, since a large body takes a while.

    `foreign_forms`: forms may be those of an app, whose fields mean something else. Of them only `on_flag=reject` counts, so
    that no field can make an upload one that the gate refuses to look at.

    Raises MalformedRequest, InvalidRequest, UnsupportedMedia, TooManyImages or ImageTooLarge.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json" or media_type.endswith("+json"):
        # Read, millions of empty values take a hundred times as much memory as their bytes.
        if body.count(b",") > _FEWEST_COMMAS + _COMMAS_PER_IMAGE * max_images:
            raise TooManyImages(f"the body lists more than {max_images} images can need", limit=max_images)
        asked = _validated(EmbeddingRequest, body)
        items = asked.input if isinstance(asked.input, list) else [asked.input]
        _check_count(len(items), max_images)
        texts = [item.image if isinstance(item, ImageItem) else item for item in items]
        images = [_decode_text(text, index, max_bytes) for index, text in enumerate(texts)]
        options = _from_query(query, asked)
    elif media_type == "multipart/form-data":
        form = read_form(body, content_type, max_files=max_images, max_bytes=max_bytes)
        images = form.files
        options = _from_query(query, _from_form(form.fields, foreign_forms))
    elif not media_type or media_type.startswith("image/") or media_type == "application/octet-stream":
        images = [body] if body else []
        options = _from_query(query)
    else:
        raise UnsupportedMedia(
            f"the body's Content-Type must be one of {', '.join(BODY_TYPES)}"
            + ("; with curl: -H 'Content-Type: image/jpeg'" if "urlencoded" in media_type else ""),
            accepted=list(BODY_TYPES),
            detected=media_type[:100],
        )
    _check_count(len(images), max_images)
    if not any(images):
        raise InvalidRequest("there is no image in the request")
    for index, image in enumerate(images):
        _check_size(len(image), index, max_bytes)
    return Intake(images, options)


def _from_query(query: QueryParams, body: Options | None = None) -> Options:
    """Query parameters; where a body has options too, they win, except that either may ask to reject."""
    asked = _validated(Options, _strictest(query.multi_items()))
    if body is None:
        return asked
    given = {
        **asked.model_dump(exclude_unset=True),
        **body.model_dump(include=body.model_fields_set & set(Options.model_fields)),
    }
    if "reject" in (asked.on_flag, body.on_flag):
        given["on_flag"] = "reject"
    return Options(**given)


def _from_form(fields: list[tuple[str, str]], foreign: bool) -> BodyOptions:
    """The fields of a form; an input that was left empty says nothing."""
    given = _strictest([(name, value) for name, value in fields if value])
    if foreign:
        given = {name: value for name, value in given.items() if (name, value) == ("on_flag", "reject")}
    return _validated(BodyOptions, given)


def _strictest(given: list[tuple[str, str]]) -> dict[str, Any]:
    """The last of each name; of several `on_flag`, where a proxy and its client each say something, the strictest."""
    return {**dict(given), **({"on_flag": "reject"} if ("on_flag", "reject") in given else {})}


def _validated(kind: type[M], source: bytes | dict[str, Any]) -> M:
    try:
        return kind.model_validate_json(source) if isinstance(source, bytes) else kind.model_validate(source)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> Problem:
    """The first thing that is wrong in `detail`, all of them in `errors`, with JSON pointers; no input is repeated."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return MalformedRequest("the body is not JSON")
    listed = []
    for one in found[:10]:
        pointer = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in one["loc"])
        listed.append({"pointer": pointer, "detail": one["msg"].removeprefix("Value error, ")})
    first = listed[0]
    return InvalidRequest(f"{first['pointer'] or 'the body'}: {first['detail']}", errors=listed)


def _check_count(n: int, limit: int) -> None:
    if n > limit:
        raise TooManyImages(f"{n} images, the limit is {limit}", limit=limit, actual=n)


def _check_size(size: int, index: int, limit: int) -> None:
    if size > limit:
        raise ImageTooLarge(
            f"image {index}: it has {size} bytes, the limit is {limit}", index=index, limit=limit, actual=size
        )


def _decode_text(text: str, index: int, max_bytes: int) -> bytes:
    """The bytes of a data-URI or of plain base64."""
    encoded = text
    if text[:5].lower() == "data:":
        match = _DATA_URI.match(text[:1000])
        if not match or not match["type"].lower().startswith("image/"):
            raise InvalidRequest(f"image {index}: a data-URI must begin with data:image/", index=index)
        if not match["parameters"].lower().endswith(";base64"):
            raise InvalidRequest(f"image {index}: a data-URI must be base64", index=index)
        encoded = text[match.end() :]
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text[:100]):
        raise InvalidRequest(
            f"image {index}: URLs are not fetched; send the image itself, as a data-URI or base64", index=index
        )
    # Before the copy is made: four characters carry three bytes.
    _check_size(len(encoded) // 4 * 3 - encoded[-2:].count("="), index, max_bytes)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            f"image {index}: it is not base64 (standard alphabet, padded, without line breaks)", index=index
        ) from None
