"""From the bytes of an image to the tensor that a bundle's graph sees: ONE rule, used by hardening and serving alike.

An attacker controls every pixel, so training, calibration and serving must agree on them bit for bit. The rule:

1. type by content (JPEG, PNG, WebP; never a declared type), first frame only;
2. the header against the limits, before any pixel is decoded;
3. a JPEG is decoded at the smallest DCT scale that still gives at least twice the input size (a 12-megapixel photo then
   costs a sixth of the time);
4. the orientation in EXIF is applied (and none in XMP), 16-bit grey is brought to 8 bits, alpha is composited on the rule's
   background, and the result is RGB;
5. it is resized with antialiasing to the input size, without cropping: a gate must see the whole picture. The aspect
   ratio is not kept.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import BaseModel, ConfigDict, Field

from model_store.errors import ImageTooLarge, UndecodableImage, UnsupportedMedia

# The readers are called by name, because Image.open would refuse or warn at limits of its own, before ours are asked.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "image/jpeg": JpegImageFile,
    "image/png": PngImageFile,
    "image/webp": WebPImageFile,
}
ACCEPTED = tuple(_READERS)
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# What Pillow raises on hostile files of the accepted types, seen on its own corpus of odd images.
DECODE_ERRORS = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    OverflowError,
    NotImplementedError,
    MemoryError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each orientation upright (Exif 2.3, tag 0x0112)."""
_STRIP = 256
"""Rows."""
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Of a segment: not a stuffed zero, filling or a restart within a scan."""
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MOST_SCANS = 64
"""Encoders write ten or so. Each costs a pass over all pixels in however few bytes: thousands fit into a small file."""

# Odd metadata makes Pillow warn; the pixels are judged, not the metadata. Set once and not around each decode, because
# Python's warning filters are shared by all threads.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class PixelRule(BaseModel):
    """How a picture becomes the graph's input; part of every manifest, so that a bundle never meets other pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(ge=8, le=1024, description="rows of the graph's input, pixels")
    width: int = Field(ge=8, le=1024, description="columns of the graph's input, pixels")
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    background: tuple[int, int, int] = (255, 255, 255)
    jpeg_dct_factor: int = Field(default=2, ge=1, le=8, description="a JPEG is decoded at no less than this many input sizes")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an image's header may promise. Sides and pixels are counted before scaling."""

    max_pixels: int = 50_000_000
    """Pixels; the default admits the largest pictures that phones take (8160 x 6120)."""
    max_side: int = 16_384
    """Pixels; a longer side is refused even where the product is small."""
    min_side: int = 8
    """Pixels; nothing can be said about a smaller picture."""


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image say about it."""

    media_type: str
    width: int
    height: int


def sniff(data: bytes) -> str | None:
    """Name the type of `data` by its first bytes, or None.

    Knows a few common types that are not accepted too, so that a refusal can name them.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"avif", b"avis"):
            return "image/avif"
        if brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
            return "image/heic"
        return "video/mp4"
    for magic, name in (
        (b"GIF8", "image/gif"),
        (b"BM", "image/bmp"),
        (b"II*\0", "image/tiff"),
        (b"MM\0*", "image/tiff"),
        (b"\0\0\0\x0cjP  ", "image/jp2"),
        (b"%PDF", "application/pdf"),
        (b"PK\x03\x04", "application/zip"),
        (b"<svg", "image/svg+xml"),
    ):
        if data.startswith(magic):
            return name
    return None


def read_header(data: bytes, limits: Limits) -> Header:
    """Check type and size of an encoded image without decoding a pixel.

    Raises UnsupportedMedia, ImageTooLarge or UndecodableImage.
    """
    media_type, image = _open(data, limits)
    with image:
        return Header(media_type, *image.size)


def decode(data: bytes, rule: PixelRule, limits: Limits | None = None) -> NDArray[np.uint8]:
    """Decode an encoded image to uint8 [height, width, 3], RGB, by the rule.

    Raises UnsupportedMedia, ImageTooLarge or UndecodableImage; never returns a partly decoded picture.
    """
    return _decode(data, rule, limits or Limits(), enlarge=True)


def decode_small(data: bytes, rule: PixelRule) -> NDArray[np.uint8]:
    """`decode`, but a picture both of whose sides are smaller than the input's stays as it is, [h, w, 3].

    What happens to such a picture on its way happens to its own pixels, before they are enlarged.
    """
    return _decode(data, rule, Limits(), enlarge=False)


def to_input(picture: Image.Image, rule: PixelRule) -> NDArray[np.uint8]:
    """An opaque picture as the graph's input, uint8 [height, width, 3], RGB."""
    # Pillow copies a picture that it converts to what it is.
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    return np.asarray(rgb.resize((rule.width, rule.height), _RESAMPLING[rule.resample]), dtype=np.uint8)


def _decode(data: bytes, rule: PixelRule, limits: Limits, enlarge: bool) -> NDArray[np.uint8]:
    _, image = _open(data, limits)
    with image:
        try:
            # The longer side both ways: a photo stored sideways has the sides of the input swapped.
            enough = rule.jpeg_dct_factor * max(rule.width, rule.height)
            image.draft(None, (enough, enough))
            image.load()
            picture, turn = _to_rgb(image, rule.background), _TURNS.get(_orientation(image))
            if picture is not image:
                image.close()  # which frees its pixels
            if turn is not None:
                picture = picture.transpose(turn)
            if not enlarge and picture.width < rule.width and picture.height < rule.height:
                return np.asarray(picture, dtype=np.uint8)
            return to_input(picture, rule)
        except DECODE_ERRORS:
            raise UndecodableImage("the image is damaged or truncated") from None


def _open(data: bytes, limits: Limits) -> tuple[str, ImageFile.ImageFile]:
    """Media type and opened image, whose header was checked and whose pixels are not decoded yet."""
    media_type = sniff(data[:32])
    if media_type not in _READERS:
        raise UnsupportedMedia(media_type, ACCEPTED)
    try:
        image = _READERS[media_type](io.BytesIO(data))
    except Image.DecompressionBombError as error:
        # The WebP reader has a limit of its own; its message begins with the number of pixels.
        pixels = re.search(r"\d+", str(error))
        raise ImageTooLarge("the number of pixels", limits.max_pixels, int(pixels[0]) if pixels else 0) from None
    except DECODE_ERRORS:
        raise UndecodableImage("the image's header cannot be read") from None
    # The first count is quick, and nearly always enough.
    if media_type == "image/jpeg" and data.count(bytes([0xFF, _START_OF_SCAN])) > _MOST_SCANS and _scans(data) > _MOST_SCANS:
        raise UndecodableImage(f"the JPEG has more than {_MOST_SCANS} scans")
    width, height = image.size
    if max(width, height) > limits.max_side:
        raise ImageTooLarge("the longer side in pixels", limits.max_side, max(width, height))
    if width * height > limits.max_pixels:
        raise ImageTooLarge("the number of pixels", limits.max_pixels, width * height)
    if min(width, height) < limits.min_side:
        raise UndecodableImage(f"the image is {width} x {height} pixels; the shorter side must have {limits.min_side}")
    return media_type, image


def _orientation(image: Image.Image) -> int:
    """What EXIF says; a picture whose EXIF block is broken counts as upright, as viewers show it."""
    # Pillow would read an orientation there too, which browsers and most other readers do not.
    for xmp in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(xmp, None)
    try:
        found: int = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found
    except DECODE_ERRORS:
        return 1


def _scans(jpeg: bytes) -> int:
    """How often a JPEG says something about all of its pixels, found as a decoder finds it: marker by marker."""
    found, position = 0, 2
    while marker := _MARKER.search(jpeg, position):
        kind = marker[0][1]
        if kind == _END_OF_IMAGE:
            break
        found += kind == _START_OF_SCAN
        length = int.from_bytes(jpeg[marker.end() : marker.end() + 2])
        position = marker.end() + max(2, length)
    return found


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture, where it is RGB already, or another one of it."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    # In strips: each step on the way makes a copy, and a whole picture's would be large.
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        if strip.mode.startswith("I"):
            # 16-bit grey, which Pillow would clip at 255 instead of scaling.
            strip = Image.fromarray((np.asarray(strip).clip(0, 65535) // 256).astype(np.uint8))
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, (*background, 255)), strip)
        rgb.paste(strip.convert("RGB"), (0, top))
    return rgb
