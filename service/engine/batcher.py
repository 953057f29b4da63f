"""Put images of different requests into one forward, without letting any of them hurt another.

Whatever waits when the last forward is over goes into the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.verdict import Judged
from service.problems import DeadlineExceeded, InternalError, Overloaded
from service.telemetry import Telemetry

logger = logging.getLogger("twogate.batcher")
RESTART_DELAY_S = 0.1


@dataclass(frozen=True, eq=False)
class _Item:
    picture: NDArray[np.uint8]
    deadline: float
    queued: float
    answer: asyncio.Future[Judged]

    def alive(self) -> bool:
        """False once nobody waits for it. One whose time is over is told so, and never computed."""
        if self.answer.done():
            return False
        if time.monotonic() >= self.deadline:
            self.answer.set_exception(DeadlineExceeded())
            return False
        return True


class Batcher:
    """One loop forms batches, one thread computes them.

    `compute` takes uint8 [N, H, W, 3] and returns N answers; it runs in the batcher's thread. `max_batch` is the
    largest N, `max_wait` the seconds that an image waits for company.
    """

    def __init__(
        self,
        compute: Callable[[NDArray[np.uint8]], list[Judged]],
        *,
        max_batch: int,
        max_wait: float,
        telemetry: Telemetry,
    ) -> None:
        self._compute = compute
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._telemetry = telemetry
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="twogate-inference")
        self._batch: list[_Item] = []
        self._supervisor: asyncio.Task[None] | None = None
        self._looping = False
        self.failing = False
        """Whether the last forward gave no answer to anybody."""
        self._since: float | None = None
        self.seconds_per_image = 0.05
        """A moving average, to estimate when a full server is free again."""

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._looping and self._supervisor is not None and not self._supervisor.done()

    @property
    def running_s(self) -> float:
        """How long the present forward has been running, seconds; 0 where there is none."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def start(self) -> None:
        """Begin to form batches; call it on the event loop."""
        self._looping = True
        self._supervisor = asyncio.create_task(self._supervise(), name="twogate-batcher")

    async def close(self) -> None:
        """Stop; whoever still waits is told to try again."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        while not self._queue.empty():
            self._batch.append(self._queue.get_nowait())
        self._fail(self._batch, lambda: Overloaded("the server is shutting down"))
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    async def submit_all(self, pictures: Sequence[NDArray[np.uint8]], deadline: float) -> list[Judged]:
        """Answers for the pictures of one request, in their order; `deadline` is on `time.monotonic`'s clock.

        Raises DeadlineExceeded, InternalError where a picture could not be computed, Overloaded at shutdown. If the
        caller is cancelled, what has not been computed yet never will be.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        items = [_Item(picture, deadline, now, loop.create_future()) for picture in pictures]
        for item in items:
            self._queue.put_nowait(item)
        self._count_waiting()
        try:
            return list(await asyncio.gather(*(item.answer for item in items)))
        finally:
            for item in items:
                if not item.answer.cancel() and not item.answer.cancelled():
                    # Its exception, if any, was or will be the caller's through another item: mark it as seen.
                    item.answer.exception()

    async def _supervise(self) -> None:
        """Keep the loop alive: if it ever breaks, its batch fails, and it begins anew."""
        while True:
            self._looping = True
            try:
                await self._loop()
            except asyncio.CancelledError:
                raise
            except BaseException:
                self._looping = False
                logger.exception("the batcher broke; it is restarted")
                self._telemetry.batcher_restarts.inc()
                self._fail(self._batch, InternalError)
                await asyncio.sleep(RESTART_DELAY_S)

    async def _loop(self) -> None:
        while True:
            self._batch = []
            await self._collect()
            # Again: between the first that came and now, some may have left.
            batch = self._batch = [item for item in self._batch if item.alive()]
            if batch:
                await self._answer(batch)

    async def _collect(self) -> None:
        """Fill `_batch`: the first that comes, and those that come within `max_wait` of it."""
        until: float | None = None
        while len(self._batch) < self._max_batch:
            if not self._queue.empty():
                item = self._queue.get_nowait()
            elif until is None:
                item = await self._queue.get()
            else:
                try:
                    async with asyncio.timeout_at(until):
                        item = await self._queue.get()
                except TimeoutError:
                    return
            if until is None:
                until = asyncio.get_running_loop().time() + self._max_wait
            self._count_waiting()
            if item.alive():
                self._batch.append(item)

    async def _answer(self, batch: list[_Item]) -> None:
        now = time.monotonic()
        for item in batch:
            self._telemetry.queue_wait_seconds.observe(now - item.queued)
        try:
            answers = await self._run(batch)
        except Exception:
            logger.exception("a forward of %d images failed", len(batch))
            if len(batch) > 1:
                await self._answer_singly(batch)
            else:
                self.failing = True
                self._fail(batch, InternalError)
        else:
            self.failing = False
            self._give(batch, answers)

    async def _answer_singly(self, batch: list[_Item]) -> None:
        """After a failed batch: only whoever fails alone is guilty."""
        answered = False
        for item in batch:
            if not item.alive():
                continue
            try:
                answers = await self._run([item])
            except Exception:
                logger.exception("a forward of 1 image failed")
                self.failing = not answered
                self._fail([item], InternalError)
            else:
                answered = True
                self.failing = False
                self._give([item], answers)

    async def _run(self, batch: list[_Item]) -> list[Judged]:
        pictures = [item.picture for item in batch]
        started = self._since = time.monotonic()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: self._compute(np.stack(pictures))
            )
        except Exception:
            self._telemetry.forward_failures.inc()
            raise
        finally:
            self._since = None
        if len(answers) != len(batch):
            raise RuntimeError(f"{len(answers)} answers for {len(batch)} images")
        seconds = time.monotonic() - started
        self._telemetry.forward(len(batch), seconds)
        self.seconds_per_image += 0.2 * (seconds / len(batch) - self.seconds_per_image)
        return answers

    def _give(self, batch: list[_Item], answers: list[Judged]) -> None:
        for item, judged in zip(batch, answers, strict=True):
            if not item.answer.done():
                item.answer.set_result(judged)

    def _fail(self, batch: list[_Item], error: Callable[[], Exception]) -> None:
        for item in batch:
            if not item.answer.done():
                item.answer.set_exception(error())

    def _count_waiting(self) -> None:
        self._telemetry.queue_images.set(self._queue.qsize())
