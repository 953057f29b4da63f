"""Honest changes: what happens to pictures without any attack, made on decoded ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from model_store.pixels import PixelRule, to_input

Change = Callable[[Image.Image], Image.Image]


def honest_changes(images: Sequence[NDArray[np.uint8]], seed: int, rule: PixelRule) -> dict[str, NDArray[np.uint8]]:
    """Name -> N images [h, w, 3] after a change at their own sizes, as the graph's input, uint8 [N, H, W, 3].

    Kinds that `model_store.honest` draws from, and two that no detector was ever shown: WebP and rotation.
    """

    def each(change: Change) -> NDArray[np.uint8]:
        return np.stack([to_input(change(Image.fromarray(image)), rule) for image in images])

    rng = np.random.default_rng(seed)
    grains = [rng.normal(0, 1, image.shape) for image in images]

    def computed(change: Callable[[NDArray[np.uint8], NDArray[np.float64]], NDArray[np.floating[Any]]]) -> NDArray[np.uint8]:
        changed = [change(image, grain) for image, grain in zip(images, grains, strict=True)]
        return np.stack([to_input(Image.fromarray(_to_uint8(image)), rule) for image in changed])

    return {
        **{f"JPEG quality {quality}": each(_jpeg(quality)) for quality in (95, 75, 50, 30)},
        "half size and back": each(_rescaled(0.5)),
        "double size and back": each(_rescaled(2.0)),
        "noise, sigma 8": computed(lambda image, grain: image + 8 * grain),
        "noise, sigma 1": computed(lambda image, grain: image + grain),
        "shot noise": computed(lambda image, grain: image + 4 * np.sqrt(image / 128) * grain),
        "blur, sigma 1": each(lambda image: image.filter(ImageFilter.GaussianBlur(1))),
        "sharpened": each(lambda image: image.filter(ImageFilter.UnsharpMask(2, 150, 0))),
        "brightness x 0.7": computed(lambda image, _: image * 0.7),
        "brightness x 1.3": computed(lambda image, _: image * 1.3),
        "contrast x 1.4": each(lambda image: ImageEnhance.Contrast(image).enhance(1.4)),
        "64 colours": each(_few_colours),
        "WebP quality 80": each(_webp),
        "rotated by 5 degrees": each(lambda image: image.rotate(5, Image.Resampling.BICUBIC)),
        "screenshot": each(_screenshot),
        "text overlay": each(_text),
    }


def _to_uint8(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return change


def _webp(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return Image.open(buffer)


def _few_colours(image: Image.Image) -> Image.Image:
    """Dithered, as a GIF is."""
    return image.quantize(palette=image.quantize(64), dither=Image.Dither.FLOYDSTEINBERG)


def _rescaled(factor: float) -> Change:
    def change(image: Image.Image) -> Image.Image:
        smaller = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        return image.resize(smaller, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BILINEAR)

    return change


def _screenshot(image: Image.Image) -> Image.Image:
    """The picture in a viewer: a bar above, grey beside it, scaled to fit."""
    width, height = image.size
    page = Image.new("RGB", image.size, (246, 246, 246))
    page.paste((52, 58, 64), (0, 0, width, max(1, height // 12)))
    inside = (round(width * 0.84), round(height * 0.84))
    page.paste(image.resize(inside, Image.Resampling.BICUBIC), ((width - inside[0]) // 2, height // 8))
    return page


def _text(image: Image.Image) -> Image.Image:
    """A caption in white on a dark strip at the lower edge."""
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    strip = max(9, copy.height // 7)
    draw.rectangle((0, copy.height - strip, copy.width, copy.height), fill=(20, 20, 20))
    draw.text((1, copy.height - strip), "SALE 20%", fill=(255, 255, 255), font_size=max(8, strip - 2))
    return copy
