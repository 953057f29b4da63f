from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from model_store.pixels import Limits, PixelRule, decode, read_header
from service.engine import decode as module
from service.engine.decode import BYTES_PER_PIXEL, Decoder, MemoryBudget
from service.problems import DeadlineExceeded, ImageTooLarge, Problem, UndecodableImage
from service.telemetry import Telemetry

RULE = PixelRule(height=32, width=32)


def run(test: Callable[[Decoder], Awaitable[None]], *, threads: int = 2, memory: int = 10**9) -> None:
    async def main() -> None:
        decoder = Decoder(RULE, Limits(), threads=threads, memory=memory, telemetry=Telemetry())
        try:
            await asyncio.wait_for(test(decoder), 10)
            await asyncio.sleep(0.05)
            assert decoder.memory.free == memory
        finally:
            decoder.close()

    asyncio.run(main())


def soon() -> float:
    return time.monotonic() + 10


def test_it_is_the_pixel_rule(photo: bytes, suspicious: bytes) -> None:
    async def test(decoder: Decoder) -> None:
        pictures = await decoder.decode_all([photo, suspicious], soon())
        np.testing.assert_array_equal(pictures[0], decode(photo, RULE))
        np.testing.assert_array_equal(pictures[1], decode(suspicious, RULE))

    run(test)


def test_the_guilty_image_is_named(photo: bytes) -> None:
    async def test(decoder: Decoder) -> None:
        with pytest.raises(UndecodableImage) as found:
            await decoder.decode_all([photo, photo[: len(photo) // 2]], soon())
        assert found.value.members["index"] == 1
        with pytest.raises(Problem) as found_type:
            await decoder.decode_all([photo, photo, b"GIF89a"], soon())
        assert found_type.value.members["index"] == 2
        assert found_type.value.members["detected"] == "image/gif"

    run(test)


def test_all_headers_are_checked_before_anything_is_decoded(photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(module, "decode", never)
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x75\x30\0\0\x75\x30\x08\x02\0\0\0" + bytes(4)

    async def test(decoder: Decoder) -> None:
        with pytest.raises((ImageTooLarge, UndecodableImage)) as found:
            await decoder.decode_all([photo, bomb], soon())
        assert found.value.members["index"] == 1

    run(test)


def test_a_decoder_that_fails_in_an_unknown_way_found_no_picture(photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("never seen before")

    monkeypatch.setattr(module, "decode", broken)

    async def test(decoder: Decoder) -> None:
        with pytest.raises(UndecodableImage):
            await decoder.decode_all([photo], soon())

    run(test)


def test_what_expired_is_never_decoded(photo: bytes) -> None:
    async def test(decoder: Decoder) -> None:
        with pytest.raises(DeadlineExceeded):
            await decoder.decode_all([photo], time.monotonic() - 1)

    run(test)


def test_a_caller_who_leaves_frees_the_memory_when_the_thread_is_done(photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    calls = []

    def slow(*args: object) -> object:
        calls.append(1)
        started.set()
        assert go.wait(10)
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "decode", slow)

    async def test(decoder: Decoder) -> None:
        leaver = asyncio.create_task(decoder.decode_all([photo, photo, photo], soon()))
        await asyncio.to_thread(started.wait)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        # The thread still decodes, and its memory is still taken; that of the two that never began is free.
        header = read_header(photo, Limits())
        taken = header.width * header.height * BYTES_PER_PIXEL[header.media_type]
        assert decoder.memory.total - decoder.memory.free == taken
        go.set()
        assert len(await decoder.decode_all([photo], soon())) == 1
        assert len(calls) == 2

    run(test, threads=1)


def test_memory_goes_to_whoever_came_first_and_survives_those_who_leave() -> None:
    async def main() -> None:
        budget = MemoryBudget(10)
        order: list[str] = []

        async def want(name: str, amount: int) -> None:
            await budget.acquire(amount)
            order.append(name)

        await budget.acquire(8)
        big, leaver, small = (
            asyncio.create_task(want("big", 9)),
            asyncio.create_task(want("leaver", 5)),
            asyncio.create_task(want("small", 2)),
        )
        await asyncio.sleep(0)
        assert order == []  # small would fit, but is not served before big
        leaver.cancel()
        budget.release(8)
        await big
        await asyncio.gather(leaver, return_exceptions=True)
        assert order == ["big"]
        budget.release(9)
        await small
        budget.release(2)
        assert budget.free == 10
        with pytest.raises(ValueError, match="never fit"):
            await budget.acquire(11)

    asyncio.run(main())


def test_a_turn_that_is_granted_and_cancelled_at_once_is_not_lost() -> None:
    async def main() -> None:
        budget = MemoryBudget(10)
        await budget.acquire(10)
        waiting = asyncio.create_task(budget.acquire(10))
        await asyncio.sleep(0)
        budget.release(10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert budget.free == 10
        await asyncio.wait_for(budget.acquire(10), 1)

    asyncio.run(main())


def test_the_head_of_the_queue_that_leaves_lets_the_next_one_in() -> None:
    async def main() -> None:
        budget = MemoryBudget(10)
        await budget.acquire(5)
        head = asyncio.create_task(budget.acquire(6))
        following = asyncio.create_task(budget.acquire(5))
        await asyncio.sleep(0)
        head.cancel()
        await asyncio.wait_for(following, 1)
        assert budget.free == 0

    asyncio.run(main())
