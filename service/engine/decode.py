"""Decode images in a few threads, within a budget of memory that their headers are charged to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# Pillow would import all of its plugins, some forty, at the first image that needs one of these.
from PIL import JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin

from model_store.errors import ImageError, UndecodableImage
from model_store.pixels import Header, Limits, PixelRule, decode, read_header
from service.problems import DeadlineExceeded, refused_image
from service.settings import LARGEST_BYTES_PER_PIXEL
from service.telemetry import Telemetry

T = TypeVar("T")
PLUGINS = (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin)

BYTES_PER_PIXEL = {
    # A progressive JPEG keeps all its coefficients, 2 bytes in each of up to 4 channels, at whatever scale it is decoded.
    "image/jpeg": 9,
    "image/png": 10,
    "image/webp": LARGEST_BYTES_PER_PIXEL,
}
"""What decoding takes at its peak, stored sideways and with alpha; `benchmarks/decode_memory.py` measures it."""

logger = logging.getLogger("twogate.decode")


class MemoryBudget:
    """Bytes that all decoding together may take; whoever does not fit waits, first come first served."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, amount: int) -> None:
        """Wait until `amount` bytes are free, and take them. ValueError if there will never be so many."""
        if amount > self.total:
            raise ValueError(f"{amount} bytes never fit into {self.total}")
        if not self._waiting and amount <= self.free:
            self.free -= amount
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (amount, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # Granted and cancelled in the same tick.
                self.release(amount)
            else:
                self._waiting.remove(entry)
                self._grant()
            raise

    def release(self, amount: int) -> None:
        """Give back what `acquire` took."""
        self.free += amount
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            amount, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= amount
                turn.set_result(None)
            else:
                # Cancelled, and not yet told so: its own clean-up must still find it.
                self._waiting.appendleft((amount, turn))
                return


class Decoder:
    """Encoded images in, uint8 [H, W, 3] out, by the bundle's pixel rule."""

    def __init__(self, rule: PixelRule, limits: Limits, *, threads: int, memory: int, telemetry: Telemetry) -> None:
        self._rule = rule
        self._limits = limits
        self._telemetry = telemetry
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="twogate-decode")
        self.memory = MemoryBudget(memory)

    async def decode_all(self, images: Sequence[bytes], deadline: float) -> list[NDArray[np.uint8]]:
        """Decode the images of one request. All headers are checked before any pixel is decoded.

        `deadline` is on `time.monotonic`'s clock. Raises the Problem of the first image that is refused, or
        DeadlineExceeded; nothing of the request stays queued then, nor where the caller is cancelled.
        """
        headers = await self._submit(lambda: self._read_headers(images))
        tasks = [
            asyncio.create_task(self._decode_one(index, data, header, deadline))
            for index, (data, header) in enumerate(zip(images, headers, strict=True))
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Let what runs finish, drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_headers(self, images: Sequence[bytes]) -> list[Header]:
        return [_guarded(index, partial(read_header, data, self._limits)) for index, data in enumerate(images)]

    async def _decode_one(self, index: int, data: bytes, header: Header, deadline: float) -> NDArray[np.uint8]:
        cost = header.width * header.height * BYTES_PER_PIXEL[header.media_type]
        await self.memory.acquire(cost)

        def job() -> NDArray[np.uint8]:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded
            with self._telemetry.decode_seconds.time():
                return _guarded(index, partial(decode, data, self._rule, self._limits))

        return await self._submit(job, lambda: self.memory.release(cost))

    async def _submit(self, job: Callable[[], T], after: Callable[[], None] | None = None) -> T:
        """Run `job` in the pool; `after` runs on the loop when the THREAD is done with it.

        A cancelled caller does not stop a thread that already runs, so that its memory is not free before that.
        """
        loop = asyncio.get_running_loop()
        future = self._pool.submit(job)
        if after is not None:

            def done(_: Future[T]) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(after)

            future.add_done_callback(done)
        return await asyncio.wrap_future(future)


def _guarded(index: int, work: Callable[[], T]) -> T:
    """Turn what is wrong with an image into a Problem.

    A decoder that fails in a way nobody has seen yet has still found no picture in these bytes: the client is told so,
    and the log has the traceback.
    """
    try:
        return work()
    except ImageError as error:
        raise refused_image(error, index) from None
    except Exception:
        logger.exception("a decoder failed in an unknown way; the image counts as undecodable")
        raise refused_image(UndecodableImage("the image is damaged or truncated"), index) from None
