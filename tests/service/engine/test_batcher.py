from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from service.engine import batcher as module
from service.engine.batcher import Batcher
from service.engine.verdict import Judged, Verdict
from service.problems import DeadlineExceeded, InternalError, Overloaded
from service.telemetry import Telemetry

Picture = NDArray[np.uint8]
VERDICT = Verdict(False, 0.5, 0.0, "consistency", {})
POISON = 255


class Computer:
    """Answers each picture with its own value; may be held back, and fails on poison."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.broken = False

    def __call__(self, pictures: Picture) -> list[Judged]:
        values = [int(picture[0, 0, 0]) for picture in pictures]
        self.batches.append(values)
        assert self.open.wait(10)
        if self.broken or POISON in values:
            raise RuntimeError("the forward failed")
        return [Judged(np.array([value], np.float32), VERDICT) for value in values]


def picture(value: int) -> Picture:
    return np.full((2, 2, 3), value, np.uint8)


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


def values(answers: list[Judged]) -> list[int]:
    return [int(answer.embedding[0]) for answer in answers]


def run(test: Callable[[Batcher, Computer], Awaitable[None]], *, max_batch: int = 4, max_wait: float = 0.02) -> None:
    async def main() -> None:
        computer = Computer()
        batcher = Batcher(computer, max_batch=max_batch, max_wait=max_wait, telemetry=Telemetry())
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher, computer), 10)
        finally:
            computer.open.set()
            await batcher.close()

    asyncio.run(main())


async def held(batcher: Batcher, computer: Computer, value: int) -> asyncio.Task[list[Judged]]:
    """A forward that has begun and waits for `computer.open`."""
    computer.open.clear()
    task = asyncio.create_task(batcher.submit_all([picture(value)], soon()))
    while not computer.batches:
        await asyncio.sleep(0.001)
    return task


def test_everybody_gets_their_own_answer_in_their_own_order() -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        requests = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11]]
        answers = await asyncio.gather(
            *(batcher.submit_all([picture(value) for value in request], soon()) for request in requests)
        )
        assert [values(answer) for answer in answers] == requests
        assert max(map(len, computer.batches)) == 4
        assert len(computer.batches) == 3

    run(test)


def test_a_lonely_image_does_not_wait_for_ever() -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        assert values(await batcher.submit_all([picture(7)], soon())) == [7]

    run(test, max_batch=100)


@pytest.mark.parametrize("leaver", [0, 1, 3])
def test_one_who_leaves_before_the_forward_is_not_computed_and_harms_nobody(leaver: int) -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        first = await held(batcher, computer, 100)
        tasks = [asyncio.create_task(batcher.submit_all([picture(value)], soon())) for value in range(4)]
        await asyncio.sleep(0.01)
        tasks[leaver].cancel()
        await asyncio.sleep(0.01)
        computer.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[leaver], asyncio.CancelledError)
        for value, answer in enumerate(answers):
            if value != leaver:
                assert isinstance(answer, list)
                assert values(answer) == [value]
        assert values(await first) == [100]
        assert leaver not in [value for batch in computer.batches[1:] for value in batch]

    run(test)


def test_one_who_leaves_during_the_forward_harms_nobody() -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        computer.open.clear()
        tasks = [asyncio.create_task(batcher.submit_all([picture(value)], soon())) for value in range(4)]
        while not computer.batches:
            await asyncio.sleep(0.001)
        assert computer.batches == [[0, 1, 2, 3]]
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        computer.open.set()
        assert values(await tasks[1]) == [1]
        assert values(await tasks[3]) == [3]
        assert values(await batcher.submit_all([picture(9)], soon())) == [9]
        assert batcher.alive

    run(test)


def test_one_who_leaves_while_a_batch_is_collected_harms_nobody() -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        leaver = asyncio.create_task(batcher.submit_all([picture(1)], soon()))
        await asyncio.sleep(0.02)
        stayer = asyncio.create_task(batcher.submit_all([picture(2)], soon()))
        await asyncio.sleep(0.02)
        leaver.cancel()
        assert values(await stayer) == [2]
        assert computer.batches == [[2]]

    run(test, max_wait=0.2)


def test_what_expired_in_the_queue_is_never_computed() -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        first = await held(batcher, computer, 100)
        late = asyncio.create_task(batcher.submit_all([picture(1)], soon(0.02)))
        good = asyncio.create_task(batcher.submit_all([picture(2)], soon()))
        await asyncio.sleep(0.05)
        computer.open.set()
        with pytest.raises(DeadlineExceeded):
            await late
        assert values(await good) == [2]
        await first
        assert computer.batches == [[100], [2]]

    run(test)


def test_only_the_guilty_fails() -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        tasks = [asyncio.create_task(batcher.submit_all([picture(value)], soon())) for value in (1, POISON, 3)]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[1], InternalError)
        assert [values(answer) for answer in (answers[0], answers[2]) if isinstance(answer, list)] == [[1], [3]]
        assert not batcher.failing

    run(test)


def test_failing_says_whether_the_last_forward_gave_anything() -> None:
    async def test(batcher: Batcher, computer: Computer) -> None:
        computer.broken = True
        with pytest.raises(InternalError):
            await batcher.submit_all([picture(1), picture(2)], soon())
        assert batcher.failing
        computer.broken = False
        await batcher.submit_all([picture(1)], soon())
        assert not batcher.failing

    run(test)


def test_a_loop_that_breaks_is_restarted_and_its_batch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S", 0.05)

    async def test(batcher: Batcher, computer: Computer) -> None:
        async def broken(batch: object) -> None:
            raise SystemError("a bug in the batcher")

        with monkeypatch.context() as patch:
            patch.setattr(batcher, "_answer", broken)
            with pytest.raises(InternalError):
                await batcher.submit_all([picture(1)], soon())
        assert not batcher.alive
        assert values(await batcher.submit_all([picture(2)], soon())) == [2]
        assert batcher.alive

    run(test)


def test_at_shutdown_whoever_waits_is_told() -> None:
    async def main() -> None:
        computer = Computer()
        batcher = Batcher(computer, max_batch=1, max_wait=0, telemetry=Telemetry())
        batcher.start()
        first = await held(batcher, computer, 1)
        waiting = asyncio.create_task(batcher.submit_all([picture(2)], soon()))
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.05, computer.open.set)
        await batcher.close()
        for task in (first, waiting):
            with pytest.raises(Overloaded):
                await task
        assert computer.batches == [[1]]

    asyncio.run(main())
