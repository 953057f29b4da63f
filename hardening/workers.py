"""Run independent trainings side by side: on two cores, two processes with one thread each beat one with two."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any

import torch

from hardening.process import prepare_process
from hardening.progress import Bars, Task
from model_store.errors import TwogateError


@dataclass(frozen=True)
class Job:
    """A module-level function that takes (*arguments, bars=...), and what to call it with; all of it can be pickled."""

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]


class JobError(TwogateError):
    """A training ended before it was done."""


def run_jobs(jobs: Sequence[Job], workers: int, bars: Bars) -> None:
    """Run all jobs, at most `workers` at a time; with one worker, in this process. JobError where one fails.

    A worker dies with its parent, so that a run that is killed and started again is never written by two.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            job.function(*job.arguments, bars=bars)
        return
    context = multiprocessing.get_context("spawn")
    messages: Queue[Any] = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    waiting = list(jobs)
    running: dict[str, Any] = {}
    listener = threading.Thread(target=_show, args=(messages, bars), daemon=True)
    listener.start()
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            process = context.Process(target=_work, args=(job, threads, messages), name=job.name, daemon=True)
            process.start()
            running[job.name] = process
        for name, process in list(running.items()):
            process.join(timeout=0.2)
            if process.exitcode is not None:
                del running[name]
                if process.exitcode:
                    failed.append(name)
                    waiting.clear()
    messages.put(None)
    listener.join()
    if failed:
        raise JobError(f"{', '.join(failed)} failed; what was done is kept, the same command goes on from there")


class _RemoteBars(Bars):
    """Bars whose every call travels to the parent process."""

    def __init__(self, messages: Queue[Any]) -> None:
        self._messages = messages

    def say(self, text: str) -> None:
        self._messages.put(("say", text))

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        self._messages.put(("open", description, total))
        yield _RemoteTask(self._messages, description)
        self._messages.put(("close", description))


class _RemoteTask(Task):
    def __init__(self, messages: Queue[Any], description: str) -> None:
        self._messages = messages
        self._description = description

    def advance(self, by: int = 1, note: str | None = None) -> None:
        self._messages.put(("advance", self._description, by, note))


def _work(job: Job, threads: int, messages: Queue[Any]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            raise SystemExit(1)  # it died while this process was starting: nobody would tell us any more
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    prepare_process()
    try:
        job.function(*job.arguments, bars=_RemoteBars(messages))
    except TwogateError as error:
        messages.put(("say", f"{job.name}: {error}"))
        raise SystemExit(1) from None


def _show(messages: Queue[Any], bars: Bars) -> None:
    with ExitStack() as stack:
        tasks: dict[str, Task] = {}
        while (message := messages.get()) is not None:
            kind, *rest = message
            if kind == "say":
                bars.say(rest[0])
            elif kind == "open":
                tasks[rest[0]] = stack.enter_context(bars.task(rest[0], rest[1]))
            elif kind == "advance":
                tasks[rest[0]].advance(rest[1], rest[2])
