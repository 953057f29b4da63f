from __future__ import annotations

import io
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from model_store.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedMedia
from model_store.pixels import ACCEPTED, Limits, PixelRule, decode, decode_small, read_header, sniff, to_input

RULE = PixelRule(height=32, width=32)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode: str, colour: Any, side: int = 48) -> Image.Image:
    return Image.new(mode, (side, side), colour)


def quadrants(width: int = 640, height: int = 480) -> Image.Image:
    """Red, green / blue, white: no two orientations look alike."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def assert_colour(pixels: NDArray[np.uint8], colour: tuple[int, int, int], tolerance: int = 0) -> None:
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - colour).max() <= tolerance


# What is accepted, by content


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_accepted_types(kind: str) -> None:
    data = encoded(flat("RGB", (200, 30, 40)), kind)
    assert sniff(data) == f"image/{kind.lower()}"
    header = read_header(data, Limits())
    assert (header.media_type, header.width, header.height) == (f"image/{kind.lower()}", 48, 48)
    assert_colour(decode(data, RULE), (200, 30, 40), 3)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("GIF", "image/gif"),
        ("BMP", "image/bmp"),
        ("TIFF", "image/tiff"),
        ("AVIF", "image/avif"),
        ("PDF", "application/pdf"),
    ],
)
def test_known_but_not_accepted_types_are_named(kind: str, name: str) -> None:
    data = encoded(flat("RGB", 0), kind)
    for refuse in (lambda: read_header(data, Limits()), lambda: decode(data, RULE)):
        with pytest.raises(UnsupportedMedia, match=f"this looks like {name}") as refused:
            refuse()
        assert refused.value.detected == name
        assert refused.value.accepted == ACCEPTED


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", None),
        (b"\xff\xd8", None),
        (b"hello", None),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"PK\x03\x04", "application/zip"),
        (b"<svg xmlns", "image/svg+xml"),
        (b"\0\0\0\x18ftypheic", "image/heic"),
        (b"\0\0\0\x18ftypisom", "video/mp4"),
    ],
)
def test_sniff(data: bytes, name: str | None) -> None:
    assert sniff(data) == name
    with pytest.raises(UnsupportedMedia):
        decode(data, RULE)


def test_the_content_decides_and_not_a_second_format_behind_it() -> None:
    gif_after_png_magic = b"\x89PNG\r\n\x1a\n" + encoded(flat("P", 0), "GIF")
    with pytest.raises(UndecodableImage):
        decode(gif_after_png_magic, RULE)


# The same picture, however it is stored


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("rule", [RULE, PixelRule(height=24, width=48)], ids=["square", "wide"])
def test_exif_orientation(kind: str, orientation: int, rule: PixelRule) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    picture = quadrants()
    stored = picture.transpose(undo[orientation]) if orientation in undo else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(stored, kind, exif=exif, **options), rule)
    expected = decode(encoded(picture, "PNG"), rule)
    # The colours meet in the middle, where DCT scaling shows most; elsewhere, nothing but JPEG noise.
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= (60 if kind == "JPEG" else 0)
    assert np.median(difference) <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_in_xmp_is_none(kind: str) -> None:
    picture = quadrants()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        plain, told = encoded(picture, kind), encoded(picture, kind, pnginfo=info)
    else:
        plain, told = encoded(picture, kind, **options), encoded(picture, kind, xmp=xmp, **options)
    assert xmp in told
    np.testing.assert_array_equal(decode(told, RULE), decode(plain, RULE))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_counts_as_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = quadrants()
    np.testing.assert_array_equal(decode(encoded(picture, "PNG", exif=exif), RULE), decode(encoded(picture, "PNG"), RULE))


def test_a_broken_exif_block_counts_as_upright() -> None:
    picture = quadrants()
    for broken in (
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40),
    ):
        found = decode(encoded(picture, "JPEG", exif=broken), RULE)
        np.testing.assert_array_equal(found, decode(encoded(picture, "JPEG"), RULE))


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_the_same() -> None:
    # 3200 x 2400 at 32 x 32: the DCT scale is 1/8 (400 x 300, still more than twice the input).
    x = np.linspace(0, 4 * np.pi, 3200)
    y = np.linspace(0, 3 * np.pi, 2400)[:, None]
    picture = Image.fromarray(np.stack([128 + 100 * np.sin(x + k) * np.cos(y) for k in range(3)], -1).astype(np.uint8))
    data = encoded(picture, "JPEG", quality=95)
    found = decode(data, RULE)
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(found - expected).max() <= 4
    with Image.open(io.BytesIO(data)) as opened:
        opened.draft(None, (64, 64))
        assert opened.size == (400, 300)


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_the_scale_never_goes_below_the_factor(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    original = Image.Image.resize

    def spy(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        asked.append(self.size)
        return original(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(quadrants(1600, 1200), "JPEG", exif=exif)
    decode(data, PixelRule(height=16, width=64, jpeg_dct_factor=factor))
    assert asked[0][0] >= factor * 64
    assert asked[0][1] >= factor * 16
    assert asked[0] in [(1200 // scale, 1600 // scale) for scale in (1, 2, 4, 8)]


def test_a_picture_smaller_than_the_input_is_enlarged() -> None:
    assert_colour(decode(encoded(flat("RGB", (1, 2, 3), 8), "PNG"), RULE), (1, 2, 3))


@pytest.mark.parametrize("size", [(16, 31), (16, 32), (40, 16), (100, 90)])
def test_only_a_small_picture_can_stay_as_it_is(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG")
    found = decode_small(data, RULE)
    np.testing.assert_array_equal(found, pixels if max(size) < 32 else decode(data, RULE))
    np.testing.assert_array_equal(to_input(Image.fromarray(found), RULE), decode(data, RULE))


def test_the_whole_picture_is_seen() -> None:
    pixels = np.zeros((100, 1000, 3), np.uint8)
    pixels[:, :50] = 255
    found = decode(encoded(Image.fromarray(pixels), "PNG"), RULE)
    assert found[:, 0].min() == 255
    assert found[:, -1].max() == 0


def test_resampling_is_antialiased_and_chosen_by_the_rule() -> None:
    checkers = np.indices((320, 320)).sum(0) % 2 * 255
    data = encoded(Image.fromarray(checkers.astype(np.uint8)), "PNG")
    assert_colour(decode(data, RULE), (128, 128, 128), 3)
    sharp = decode(encoded(quadrants(), "PNG"), PixelRule(height=33, width=33, resample="bicubic"))
    soft = decode(encoded(quadrants(), "PNG"), PixelRule(height=33, width=33))
    assert not np.array_equal(sharp, soft)


# Every colour model becomes RGB


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (flat("1", 1), "PNG", (255, 255, 255)),
        (flat("1", 0), "PNG", (0, 0, 0)),
        (flat("L", 90), "PNG", (90, 90, 90)),
        (flat("L", 90), "JPEG", (90, 90, 90)),
        (flat("LA", (90, 255)), "PNG", (90, 90, 90)),
        (flat("LA", (90, 0)), "PNG", (255, 255, 255)),
        (flat("RGBA", (10, 20, 30, 255)), "PNG", (10, 20, 30)),
        (flat("RGBA", (10, 20, 30, 0)), "PNG", (255, 255, 255)),
        (flat("RGBA", (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (flat("RGBA", (0, 0, 0, 51)), "WEBP", (204, 204, 204)),
        (flat("I;16", 0x8000), "PNG", (128, 128, 128)),
        (flat("I;16", 0xFFFF), "PNG", (255, 255, 255)),
        (flat("I;16", 0x00FF), "PNG", (0, 0, 0)),
        (flat("CMYK", (255, 0, 255, 0)), "JPEG", (0, 255, 0)),
        (flat("CMYK", (0, 0, 0, 255)), "JPEG", (0, 0, 0)),
        (flat("YCbCr", (255, 128, 128)), "JPEG", (255, 255, 255)),
    ],
    ids=lambda value: f"{value.mode}-{value.getpixel((0, 0))}" if isinstance(value, Image.Image) else None,
)
def test_colour_models(image: Image.Image, kind: str, colour: tuple[int, int, int]) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_colour(decode(encoded(image, kind, **options), RULE), colour, 2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_a_tall_picture_is_converted_as_in_one_piece(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (700, 40, 4), dtype=np.uint8)
    picture = (
        Image.fromarray(values[..., 0].astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(values).convert(mode)
    )
    if mode == "I;16":
        whole = Image.fromarray(values[..., 0])
    else:
        whole = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture.convert("RGBA"))
    rule = PixelRule(height=700, width=40)
    np.testing.assert_array_equal(decode(encoded(picture, "PNG"), rule), np.asarray(whole.convert("RGB")))


def test_the_background_is_the_rules() -> None:
    data = encoded(flat("RGBA", (9, 9, 9, 0)), "PNG")
    assert_colour(decode(data, RULE.model_copy(update={"background": (1, 2, 3)})), (1, 2, 3))


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_a_palette_with_transparency_is_composited(transparency: int | bytes) -> None:
    palette = flat("P", 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (24, 0, 48, 48))
    found = decode(encoded(palette, "PNG", transparency=transparency), RULE)
    assert_colour(np.tile(found[:, :8], (1, 4, 1)), (255, 255, 255))
    assert_colour(np.tile(found[:, -8:], (1, 4, 1)), (0, 0, 255))


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (7, 7, 7)), ("L", 7), ("1", 0)])
def test_a_transparent_colour_without_alpha_channel_is_composited(mode: str, colour: Any) -> None:
    data = encoded(flat(mode, colour), "PNG", transparency=colour)
    assert_colour(decode(data, RULE), (255, 255, 255))


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen(kind: str) -> None:
    frames = [flat("RGB", colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    assert_colour(decode(data, RULE), (250, 0, 0))


def test_of_several_pictures_in_a_jpeg_the_first_is_seen() -> None:
    data = encoded(flat("RGB", (250, 0, 0)), "MPO", save_all=True, append_images=[flat("RGB", (0, 250, 0))])
    assert_colour(decode(data, RULE), (250, 0, 0), 3)


# What is refused, from the header alone


def png_promising(width: int, height: int) -> bytes:
    """A PNG header and no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_promising(width: int, height: int) -> bytes:
    """A JPEG whose frame header was given another size."""
    data = bytearray(encoded(flat("RGB", 0), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_promising(width: int, height: int) -> bytes:
    """A lossless WebP whose header was given another size."""
    data = bytearray(encoded(flat("RGB", 0), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    (bits,) = struct.unpack("<I", data[at : at + 4])
    data[at : at + 4] = struct.pack("<I", bits & 0xF0000000 | (width - 1) | (height - 1) << 14)
    return bytes(data)


@pytest.mark.parametrize("promise", [png_promising, jpeg_promising, webp_promising])
@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (10_000, 10_000), (16_000, 16_000), (16_384, 16_384)])
def test_a_bomb_is_refused_before_a_pixel_is_decoded(
    promise: Callable[[int, int], bytes], width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", never)
    data = promise(width, height)
    for refuse in (lambda: read_header(data, Limits()), lambda: decode(data, RULE)):
        with pytest.raises(ImageTooLarge, match="number of pixels") as refused:
            refuse()
        assert refused.value.actual == width * height
        assert refused.value.limit == 50_000_000


def test_a_jpeg_of_countless_scans_is_refused_before_a_pixel_is_decoded() -> None:
    plain = encoded(quadrants(), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    bomb = plain[:last] + plain[last:-2] * 5000 + plain[-2:]
    for refused in (lambda: decode(bomb, RULE), lambda: read_header(bomb, Limits())):
        started = time.process_time()
        with pytest.raises(UndecodableImage, match="scans"):
            refused()
        assert time.process_time() - started < 1


@pytest.mark.parametrize("options", [{"progressive": True}, {}, {"restart_marker_blocks": 1}])
def test_what_looks_like_scans_and_is_none_is_not_counted(options: dict[str, Any]) -> None:
    """In metadata, and in what phones put behind a photograph."""
    plain = encoded(quadrants(), "JPEG", comment=b"\xff\xda" * 500, **options)
    moving = plain + b"\xff\xda\x00\x02" * 5000
    np.testing.assert_array_equal(decode(moving, RULE), decode(encoded(quadrants(), "JPEG", **options), RULE))


@pytest.mark.parametrize("promise", [png_promising, jpeg_promising])
def test_a_long_side_is_refused_even_where_the_product_is_small(promise: Callable[[int, int], bytes]) -> None:
    for width, height in ((60_000, 16), (16, 60_000)):
        with pytest.raises(ImageTooLarge, match="longer side") as refused:
            read_header(promise(width, height), Limits())
        assert refused.value.actual == 60_000


def test_the_limits_are_inclusive() -> None:
    limits = Limits(max_pixels=48 * 40, max_side=48, min_side=40)
    data = encoded(Image.new("RGB", (48, 40)), "PNG")
    read_header(data, limits)
    assert decode(data, RULE, limits).shape == (32, 32, 3)
    with pytest.raises(ImageTooLarge):
        read_header(data, Limits(max_pixels=48 * 40 - 1))
    with pytest.raises(ImageTooLarge):
        read_header(data, Limits(max_side=47))
    with pytest.raises(UndecodableImage, match="48 x 40"):
        read_header(data, Limits(min_side=41))


def test_the_largest_pictures_that_phones_take_pass() -> None:
    header = read_header(jpeg_promising(8160, 6120), Limits())
    assert (header.width, header.height) == (8160, 6120)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 100), (100, 7)])
def test_a_picture_too_small_to_judge_is_refused(width: int, height: int) -> None:
    with pytest.raises(UndecodableImage, match="shorter side"):
        decode(encoded(Image.new("RGB", (width, height)), "PNG"), RULE)


# What is damaged


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_refused_and_never_half_decoded(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.02, 0.1, 0.5, 0.9):
        with pytest.raises((UndecodableImage, UnsupportedMedia)):
            decode(data[: int(len(data) * share)], RULE)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_never_more_than_a_refusal(photos: list[Path], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    whole = photos[0].read_bytes() if kind == "JPEG" else encoded(quadrants(40, 40), kind)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(damaged), RULE)
    except ImageError:
        return
    assert pixels.shape == (32, 32, 3)


def test_messages_name_no_library() -> None:
    with pytest.raises(UndecodableImage) as refused:
        decode(b"\xff\xd8\xff" + bytes(100), RULE)
    assert "PIL" not in str(refused.value)


# One rule for all


def test_decoding_is_deterministic_and_the_same_in_many_threads(photos: list[Path]) -> None:
    rule = PixelRule(height=160, width=160)
    expected = [decode(path.read_bytes(), rule) for path in photos]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [decode(path.read_bytes(), rule) for path in photos], range(8)):
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_a_rule_refuses_what_it_does_not_know() -> None:
    for wrong in ({"height": 32}, {"height": 32, "width": 4}, {"height": 32, "width": 32, "crop": 0.9}):
        with pytest.raises(ValueError, match="validation error"):
            PixelRule.model_validate(wrong)


def test_the_odd_images(shared_data: Path, tmp_path: Path) -> None:
    """Every file of a corpus of odd and hostile images is either a picture or a refusal with a name."""
    odd_images = shared_data / "odd-images.tar.xz"
    if not odd_images.is_file():
        pytest.skip("odd-images.tar.xz is not among the shared data sets")
    with tarfile.open(odd_images) as archive:
        archive.extractall(tmp_path, filter="data")
    outcomes = {"picture": 0, "refused": 0}
    for file in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        try:
            pixels = decode(file.read_bytes(), RULE)
        except ImageError:
            outcomes["refused"] += 1
        else:
            assert pixels.shape == (32, 32, 3), file.name
            outcomes["picture"] += 1
    assert min(outcomes.values()) > 20, outcomes
