from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from model_store.bundle import Bundle
from model_store.pixels import decode
from model_store.session import GateSession
from service.engine.gate import Gate
from service.engine.state import State
from service.problems import DeadlineExceeded, ModelLoading, ModelUnavailable, Overloaded
from service.settings import Settings
from service.telemetry import Telemetry

MakeSettings = Callable[..., Settings]


def run(settings: Settings, test: Callable[[Gate], Awaitable[None]]) -> None:
    async def main() -> None:
        gate = Gate(settings, Telemetry())
        assert gate.health().state is State.STARTING
        gate.start()
        await gate.loaded()
        try:
            await asyncio.wait_for(test(gate), 15)
        finally:
            await gate.close()
        assert gate.health().state is State.DRAINING

    asyncio.run(main())


class Brake:
    """Holds forwards back until told to go, and counts the images computed."""

    def __init__(self, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
        assert gate._engine is not None
        batcher = gate._engine.batcher
        real = batcher._compute
        self.go = threading.Event()
        self.images = 0

        def compute(pictures):  # type: ignore[no-untyped-def]
            assert self.go.wait(10)
            self.images += len(pictures)
            return real(pictures)

        monkeypatch.setattr(batcher, "_compute", compute)


def test_it_answers_as_the_plain_session_does(make_settings: MakeSettings, bundle: Bundle, photo: bytes) -> None:
    async def test(gate: Gate) -> None:
        assert gate.health().state is State.READY
        answer = (await gate.judge([photo]))[0]
        expected = GateSession(bundle).run(decode(photo, bundle.manifest.pixels)[None])
        np.testing.assert_allclose(answer.embedding, expected.embedding[0], atol=1e-6)
        assert answer.verdict.score == pytest.approx(float(expected.score[0]), abs=1e-6)

    run(make_settings(), test)


def test_before_and_without_a_bundle(make_settings: MakeSettings, photo: bytes) -> None:
    async def main() -> None:
        gate = Gate(make_settings(bundle="nobody"), Telemetry())
        with pytest.raises(ModelLoading):
            await gate.judge([photo])
        gate.start()
        health = await gate.loaded()
        assert health.state is State.FAILED
        assert "tiny" in health.reason
        with pytest.raises(ModelUnavailable):
            await gate.judge([photo])
        await gate.close()

    asyncio.run(main())


def test_too_small_a_calibration_is_refused_with_its_message(make_settings: MakeSettings) -> None:
    async def main() -> None:
        gate = Gate(make_settings(max_fpr=0.0001), Telemetry())
        gate.start()
        assert "needs at least 9999 calibration images" in (await gate.loaded()).reason
        await gate.close()

    asyncio.run(main())


def test_permits_are_for_images_and_for_the_whole_request(
    make_settings: MakeSettings, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(gate: Gate) -> None:
        brake = Brake(gate, monkeypatch)
        three = asyncio.create_task(gate.judge([photo] * 3))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded) as refused:
            await gate.judge([photo] * 2)
        assert int(refused.value.headers["Retry-After"]) >= 1
        one = asyncio.create_task(gate.judge([photo]))
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded):
            await gate.judge([photo])
        brake.go.set()
        assert [len(answers) for answers in await asyncio.gather(three, one)] == [3, 1]
        assert len(await gate.judge([photo] * 3)) == 3
        assert gate._permits.taken == 0

    run(make_settings(max_images=3, max_pending_images=4), test)


def test_a_deadline_is_kept_and_nothing_is_computed_after_it(
    make_settings: MakeSettings, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(gate: Gate) -> None:
        brake = Brake(gate, monkeypatch)
        first = asyncio.create_task(gate.judge([photo]))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineExceeded):
            await gate.judge([photo], time.monotonic() + 0.1)
        with pytest.raises(DeadlineExceeded):
            await gate.judge([photo], time.monotonic() - 0.1)
        brake.go.set()
        await first
        await gate.judge([photo])
        assert brake.images == 2
        assert gate._permits.taken == 0

    run(make_settings(), test)


@pytest.mark.parametrize("after", [0, 0.0005, 0.002, 0.005, 0.02])
def test_cancelled_at_any_stage_nobody_is_harmed(make_settings: MakeSettings, photo: bytes, after: float) -> None:
    async def test(gate: Gate) -> None:
        for _ in range(5):
            tasks = [asyncio.create_task(gate.judge([photo] * 2)) for _ in range(6)]
            await asyncio.sleep(after)
            for task in tasks[::2]:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            for answer in answers[1::2]:
                assert isinstance(answer, list)
                assert len(answer) == 2
        assert gate._permits.taken == 0
        assert gate.health().ready
        await asyncio.sleep(0.1)
        assert gate._engine is not None
        assert gate._engine.decoder.memory.free == gate._engine.decoder.memory.total

    run(make_settings(), test)


def test_while_forwards_fail_it_is_degraded_and_finds_out_by_itself_when_they_work_again(
    make_settings: MakeSettings, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.problems import InternalError

    async def test(gate: Gate) -> None:
        def broken(_: object) -> None:
            raise RuntimeError("no more memory")

        assert gate._engine is not None
        with monkeypatch.context() as patch:
            patch.setattr(gate._engine.batcher, "_compute", broken)
            with pytest.raises(InternalError):
                await gate.judge([photo])
            assert gate.health().state is State.DEGRADED
        until = time.monotonic() + 5
        while not gate.health().ready:
            assert time.monotonic() < until
            await asyncio.sleep(0.05)

    run(make_settings(), test)


def test_while_a_forward_does_not_come_back_nobody_is_let_in(
    make_settings: MakeSettings, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(gate: Gate) -> None:
        brake = Brake(gate, monkeypatch)
        with pytest.raises(DeadlineExceeded):
            await gate.judge([photo])
        assert gate._engine is not None
        until = time.monotonic() + 5
        while gate.health().ready:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        assert "has not come back" in gate.health().reason
        for _ in range(3):
            with pytest.raises(Overloaded, match="does not come back"):
                await gate.judge([photo])
        assert gate._engine.batcher._queue.empty()
        brake.go.set()
        until = time.monotonic() + 5
        while not gate.health().ready:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        assert len(await gate.judge([photo])) == 1

    run(make_settings(request_timeout_s=1), test)


def test_draining_still_answers(make_settings: MakeSettings, photo: bytes) -> None:
    async def test(gate: Gate) -> None:
        gate.drain()
        assert gate.health().state is State.DRAINING
        assert not gate.health().ready
        assert len(await gate.judge([photo])) == 1

    run(make_settings(), test)
