"""What decoding takes at its peak, in bytes a pixel: the figures behind `BYTES_PER_PIXEL` in service/engine/decode.py.

    .venv-dev/bin/python benchmarks/decode_memory.py

Each kind of picture, 9 megapixels of noise or of one colour, upright and stored sideways, is decoded by a process of its own.
Linux only: the peak is the kernel's (VmHWM).
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model_store.pixels import Limits, PixelRule, decode  # noqa: E402
from service.engine.decode import BYTES_PER_PIXEL  # noqa: E402

SIDE = 3000
RULE = PixelRule(height=128, width=128)
KINDS = {
    "image/jpeg": ("RGB", "CMYK"),
    "image/png": ("RGB", "RGBA", "LA", "P", "I;16"),
    "image/webp": ("RGB", "RGBA"),
}


def main() -> None:
    """Measure and print."""
    for media_type, modes in KINDS.items():
        worst = max(measured(media_type, mode, noise, sideways) for mode in modes for noise in (0, 1) for sideways in (0, 1))
        print(f"{media_type}: at most {worst:.1f} bytes a pixel, charged {BYTES_PER_PIXEL[media_type]}")


def measured(media_type: str, mode: str, noise: int, sideways: int) -> float:
    """Bytes a pixel that another process needed beyond what it had."""
    data = encoded(media_type, mode, noise, sideways)
    done = subprocess.run([sys.executable, __file__, media_type], input=data, capture_output=True, check=True)
    return float(done.stdout) / SIDE**2


def encoded(media_type: str, mode: str, noise: int, sideways: int) -> bytes:
    """A picture that is as dear to decode as its kind can be."""
    rng, shape = np.random.default_rng(0), (SIDE, SIDE, 4)
    values = rng.integers(0, 256, shape, dtype=np.uint8) if noise else np.full(shape, 100, np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(values[..., 0].astype(np.uint16) * 256)
    else:
        picture = Image.fromarray(values).convert("RGB" if mode in ("RGB", "CMYK", "P") else "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6 if sideways else 1
    options: dict[str, Any] = {"exif": exif}
    if media_type == "image/jpeg":
        options |= {"progressive": True, "subsampling": 0, "quality": 95}
    if mode == "P":
        options["transparency"] = 0
    ImageFile.MAXBLOCK = 2**27  # or Pillow cannot write a progressive JPEG of noise
    file = io.BytesIO()
    picture.save(file, media_type.removeprefix("image/").upper(), **options)
    return file.getvalue()


def decode_one(media_type: str) -> None:
    """Decode standard input, and print by how many bytes the peak rose; a small picture before it loads the libraries."""
    data, small = sys.stdin.buffer.read(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, media_type.removeprefix("image/").upper())
    decode(small.getvalue(), RULE)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    decode(data, RULE, Limits(max_pixels=2 * SIDE**2))
    print(peak() - before)


def peak() -> int:
    """Bytes of resident memory at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    decode_one(sys.argv[1]) if len(sys.argv) > 1 else main()
