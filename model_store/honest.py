"""Honest changes drawn at random: what happens to pictures on their way through apps, for the detector to learn, and for a
calibration to be quiet on.

`hardening.measure.changes` has the fixed ones that are measured; strengths, words, places and colours here are drawn.
"""

from __future__ import annotations

import io
import string
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from model_store.calibration import copies_of
from model_store.pixels import PixelRule, to_input

_RESAMPLE = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def changed_at_random(images: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Each image [N, H, W, 3] uint8 after one change, of a kind and strength drawn for it."""
    rng = np.random.default_rng(seed)
    # In turn and not drawn: each kind has its share however few images there are.
    kinds = list(_KINDS.values())
    changed = [kinds[number % len(kinds)](Image.fromarray(image), rng) for number, image in enumerate(images)]
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in changed])


def changed_each_way(
    images: Sequence[NDArray[np.uint8]], seed: int, rule: PixelRule
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Every kind of change by its name, with all N images after it as the graph's input [N, H, W, 3] uint8.

    Images [h, w, 3] uint8 are changed at their own sizes; the strength is drawn for each.
    """
    for number, (name, change) in enumerate(_KINDS.items()):
        rng = np.random.default_rng((seed, number))
        yield name, np.stack([to_input(change(Image.fromarray(image), rng), rule) for image in images])


def to_be_changed(n: int) -> NDArray[np.int64]:
    """Which of n calibration images to change, [m], evenly spread."""
    return np.linspace(0, n - 1, copies_of(n)).round().astype(np.int64)


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Of any strength: a detector that was shown strong noise alone takes weak noise for an attack. A grain alike in the
    three channels, one in each, or shot noise, which grows with the root of the light."""
    values, strength = np.asarray(image).astype(float), np.exp(rng.uniform(np.log(0.5), np.log(8)))
    kind = rng.integers(3)
    noise = rng.normal(0, strength, (image.height, image.width, 1 if kind == 0 else 3))
    if kind == 2:
        noise = noise * np.sqrt(values / 128)
    return Image.fromarray(np.clip(np.rint(values + noise), 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(30, 96)), subsampling=int(rng.choice([0, 2])))
    return Image.open(buffer)


def _rescaled(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    factor = 2 ** rng.uniform(-1, 1)
    there, back = (_RESAMPLE[index] for index in rng.integers(0, len(_RESAMPLE), 2))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, there).resize(image.size, back)


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1)))


def _sharpened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.UnsharpMask(rng.uniform(0.5, 3), round(rng.uniform(30, 200)), int(rng.integers(0, 4))))


def _toned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lighter or darker; half of them with another contrast and saturation too."""
    values = 255 * (np.asarray(image) / 255 * rng.uniform(0.6, 1.4)) ** rng.uniform(0.8, 1.25)
    lit = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        return lit
    return ImageEnhance.Color(ImageEnhance.Contrast(lit).enhance(rng.uniform(0.6, 1.6))).enhance(rng.uniform(0, 1.8))


def _few_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """As a GIF or a small PNG has them, dithered or not."""
    palette = image.quantize(round(2 ** rng.uniform(4, 8)))
    return image.quantize(palette=palette, dither=rng.choice([Image.Dither.NONE, Image.Dither.FLOYDSTEINBERG]))


def _screenshot(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """On a page of one colour, scaled, with bars of another colour above or below."""
    width, height = image.size
    page = Image.new("RGB", image.size, _grey(rng))
    draw = ImageDraw.Draw(page)
    for edge in (0, height):
        bar = round(height * rng.uniform(0, 0.12))
        draw.rectangle((0, edge - bar, width, edge + bar), fill=_grey(rng))
    inside = tuple(round(side * rng.uniform(0.75, 0.95)) for side in image.size)
    place = tuple(round((side - kept) * rng.uniform(0.2, 0.8)) for side, kept in zip(image.size, inside, strict=True))
    page.paste(image.resize((inside[0], inside[1]), Image.Resampling.BICUBIC), (place[0], place[1]))
    return page


def _text(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A line of letters at a height and size drawn, on a strip or straight on the picture."""
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    size = max(8, round(copy.height * rng.uniform(0.08, 0.2)))
    top = round(rng.uniform(0, copy.height - size))
    if rng.random() < 0.5:
        draw.rectangle((0, top, copy.width, top + size), fill=_grey(rng))
    letters = "".join(rng.choice(list(string.ascii_letters + string.digits + "  !?%&."), 40))
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    draw.text((round(rng.uniform(0, copy.width / 3)), top - 1), letters, fill=colour, font_size=size)
    return copy


def _grey(rng: np.random.Generator) -> tuple[int, int, int]:
    """Nearly grey, of any lightness."""
    value = int(rng.integers(0, 240))
    red, green, blue = (value + int(shift) for shift in rng.integers(0, 16, 3))
    return red, green, blue


_KINDS = {
    "JPEG": _jpeg,
    "re-scaling": _rescaled,
    "noise": noisy,
    "blur": _blur,
    "sharpening": _sharpened,
    "tone": _toned,
    "few colours": _few_colours,
    "screenshot": _screenshot,
    "text": _text,
}
KINDS = tuple(_KINDS)
"""What changes there are."""
