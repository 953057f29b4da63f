"""The core of the service: encoded images in, embeddings and verdicts out, whatever the protocol in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model_store.bundle import load_bundle
from model_store.errors import TwogateError
from model_store.store import resolve
from service.cores import usable_cores
from service.engine.admission import Allowance
from service.engine.batcher import Batcher
from service.engine.decode import Decoder
from service.engine.local import LocalGate
from service.engine.state import Health, State
from service.engine.verdict import Judged
from service.problems import (
    DeadlineExceeded,
    ModelLoading,
    ModelUnavailable,
    Overloaded,
    Problem,
)
from service.settings import Settings
from service.telemetry import Telemetry

logger = logging.getLogger("twogate.gate")
CANARY_PERIOD_S = 1.0
LOADING_RETRY_S = 2
HANGING_RETRY_S = 30


@dataclass(frozen=True)
class _Engine:
    """What exists once the bundle is loaded."""

    local: LocalGate
    decoder: Decoder
    batcher: Batcher


class Gate:
    """Loads the bundle in the background, then judges. All methods belong to one event loop."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._permits = Allowance(settings.max_pending_images, telemetry.images_in_flight)
        self._engine: _Engine | None = None
        self._failure: str | None = None
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        telemetry.ready.set_function(lambda: float(self.health().ready))

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._tasks = [asyncio.create_task(self._load(), name="twogate-load")]

    async def loaded(self) -> Health:
        """Wait until loading is over, one way or the other."""
        await asyncio.wait(self._tasks[:1])
        return self.health()

    def drain(self) -> None:
        """Tell the world to go elsewhere; what comes is still answered."""
        self._draining = True

    async def close(self) -> None:
        """Stop. Call it when no request is in flight any more; whoever is, is told to try again."""
        self._draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._engine is not None:
            await self._engine.batcher.close()
            await asyncio.to_thread(self._engine.decoder.close)

    def health(self) -> Health:
        """The state, derived from the facts at this moment."""
        if self._draining:
            return Health(State.DRAINING, "the server is about to stop")
        if self._failure is not None:
            return Health(State.FAILED, self._failure)
        if self._engine is None:
            return Health(State.STARTING, "the model is being loaded")
        if not self._engine.batcher.alive:
            return Health(State.DEGRADED, "the batcher is being restarted")
        if self._hangs(self._engine):
            return Health(State.DEGRADED, f"a forward has not come back for {self._engine.batcher.running_s:.0f} s")
        if self._engine.batcher.failing:
            return Health(State.DEGRADED, "the last forward failed")
        return Health(State.READY, f"serving {self._engine.local.label}")

    @property
    def model(self) -> LocalGate:
        """What is served. Raises ModelLoading, or ModelUnavailable where the bundle was refused."""
        return self._running().local

    async def judge(self, images: Sequence[bytes], deadline: float | None = None) -> list[Judged]:
        """Answers for the encoded images of one request, in their order: for all of them, or for none.

        `deadline` is on `time.monotonic`'s clock, by default `request_timeout_s` from now. Raises a Problem. A caller
        that is cancelled takes its images with it; nobody else's are touched.
        """
        engine = self._running()
        now = time.monotonic()
        deadline = now + self._settings.request_timeout_s if deadline is None else deadline
        if deadline <= now:
            raise DeadlineExceeded
        if self._hangs(engine):
            # Whoever came now would only be kept until the timeout, and their pictures longer.
            raise Overloaded("a forward does not come back", after=HANGING_RETRY_S)
        with self._permits.held(len(images)) as granted:
            if not granted:
                raise Overloaded(f"{self._permits.taken} images are being judged already", after=self._busy(engine))
            try:
                async with asyncio.timeout(deadline - now):
                    pictures = await engine.decoder.decode_all(images, deadline)
                    judged = await engine.batcher.submit_all(pictures, deadline)
            except TimeoutError:
                raise DeadlineExceeded from None
        for answer in judged:
            self._telemetry.judged(answer.verdict.p_value, answer.verdict.flagged)
        return judged

    def _running(self) -> _Engine:
        if self._failure is not None:
            raise ModelUnavailable(self._failure)
        if self._engine is None:
            raise ModelLoading("the server has just started", after=LOADING_RETRY_S)
        return self._engine

    def _hangs(self, engine: _Engine) -> bool:
        """Whether all who wait for the present forward have given up."""
        return engine.batcher.running_s > self._settings.request_timeout_s

    def _busy(self, engine: _Engine) -> float:
        """Seconds until a full server has room again, roughly; never so many that a client gives up."""
        return min(30.0, self._permits.taken * engine.batcher.seconds_per_image)

    async def _load(self) -> None:
        try:
            local = await asyncio.to_thread(self._open)
        except TwogateError as error:
            self._failure = str(error)
            return
        except Exception:
            self._failure = "the bundle cannot be loaded; the log says why"
            logger.exception("the bundle cannot be loaded")
            return
        settings = self._settings
        decoder = Decoder(
            local.manifest.pixels,
            settings.limits,
            threads=settings.decode_threads or usable_cores(),
            memory=settings.decode_memory_bytes,
            telemetry=self._telemetry,
        )
        batcher = Batcher(
            local.judge,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            telemetry=self._telemetry,
        )
        batcher.start()
        engine = self._engine = _Engine(local, decoder, batcher)
        self._telemetry.model.info(
            {
                "name": local.manifest.name,
                "version": str(local.manifest.version),
                "sha256": local.model_sha256,
                "detector": local.manifest.detector.name,
            }
        )
        self._telemetry.provider.info({"provider": local.provider})
        self._tasks.append(asyncio.create_task(self._watch(engine), name="twogate-canary"))

    def _open(self) -> LocalGate:
        """Load, verify and warm up; `LocalGate` runs the golden vector."""
        settings = self._settings
        local = LocalGate(
            load_bundle(resolve(settings.store, settings.bundle)),
            settings.max_fpr,
            settings.threads,
            provider=settings.provider,
            allow_fallback=settings.allow_fallback,
        )
        rule = local.manifest.pixels
        for n in {1, settings.max_batch}:
            local.judge(np.zeros((n, rule.height, rule.width, 3), np.uint8))
        return local

    async def _watch(self, engine: _Engine) -> None:
        """While forwards fail, try one of our own: one without traffic must still find out that it is well."""
        rule = engine.local.manifest.pixels
        canary = np.zeros((rule.height, rule.width, 3), np.uint8)
        while True:
            await asyncio.sleep(CANARY_PERIOD_S)
            if engine.batcher.failing and not self._hangs(engine):
                with contextlib.suppress(Problem):
                    await engine.batcher.submit_all([canary], time.monotonic() + self._settings.request_timeout_s)
