"""Run the service: bind, say where, load, answer, drain, stop."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from model_store.errors import TwogateError
from service.app import create_app
from service.engine.gate import Gate
from service.engine.state import State
from service.settings import Settings

_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""What to type into a browser on this machine, where every address is listened on."""


class CannotListen(TwogateError):
    """The address cannot be listened on; the message says why and what to do."""


def serve(settings: Settings) -> int:
    """Serve until told to stop; returns the exit code: 0 after a signal, 1 where it could not start.

    The reason of a failure is one line on stderr. One line on stdout says when and where the service is ready.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s", level="INFO")
    # Its lines for people would be noise beside ours.
    logging.getLogger("uvicorn").setLevel("WARNING")
    if not settings.store.is_dir():
        print(f"twogate: there is no store {settings.store}", file=sys.stderr)
        return 1
    try:
        listener = _listen(settings.host, settings.port)
    except CannotListen as error:
        print(f"twogate: {error}", file=sys.stderr)
        return 1
    if not settings.api_keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        print(
            f"twogate: warning: on {settings.host} anyone who reaches it may ask; TWOGATE_API_KEYS=key1,key2 asks for a key",
            file=sys.stderr,
        )
    app = create_app(settings)
    gate: Gate = app.state.context.gate
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=settings.shutdown_grace_s,
    )
    port = listener.getsockname()[1]
    where = f"{_url(settings.host, port)} (try {_url(_LOCAL.get(settings.host, settings.host), port)}/docs)"
    server = _Server(config, gate, settings.drain_delay_s, where)
    server.run(sockets=[listener])
    return 1 if server.failed else 0


class _Server(uvicorn.Server):
    """Uvicorn, with a life before (loading) and after (draining) its own."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain_delay_s: float, where: str) -> None:
        super().__init__(config)
        self._gate = gate
        self._drain_delay_s = drain_delay_s
        self._where = where
        self._loop: asyncio.AbstractEventLoop | None = None
        self._announcing: asyncio.Task[None] | None = None
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer, then wait for the model in the background."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._announcing = asyncio.create_task(self._announce())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then stop. Second: stop now. Uvicorn's own would also kill the process by the signal."""
        if self._gate.health().state is State.DRAINING or self._loop is None:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._gate.drain()
        if self._drain_delay_s:
            self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_delay_s, self._stop)
        else:
            self.should_exit = True

    def _stop(self) -> None:
        self.should_exit = True

    async def _announce(self) -> None:
        health = await self._gate.loaded()
        if health.state is State.FAILED:
            self.failed = True
            self.should_exit = True
            print(f"twogate: {health.reason}", file=sys.stderr)
        elif health.ready:
            print(f"twogate: {health.reason} on {self._where}", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Not left to uvicorn, whose message for a port in use is a log record and exit code 3."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(f"cannot listen on {host}: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise CannotListen(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port or TWOGATE_PORT"
        ) from None
    return listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
