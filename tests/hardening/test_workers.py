from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from hardening.workers import Job, JobError, run_jobs
from model_store.errors import TwogateError
from tests.conftest import REPOSITORY
from tests.hardening.conftest import QuietBars
from tests.support import jobs

PARENT = """\
import sys
from pathlib import Path
from hardening.progress import Bars
from hardening.workers import Job, run_jobs
from tests.support import jobs
if __name__ == "__main__":
    run_jobs([Job(name, jobs.beat, (Path(sys.argv[1]) / name,)) for name in ("a", "b")], 2, Bars())
"""


def test_one_worker_is_this_process(tmp_path: Path, bars: QuietBars) -> None:
    run_jobs([Job(name, jobs.write, (tmp_path / name, name)) for name in ("a", "b")], 1, bars)
    assert (tmp_path / "a").read_text() == f"a {os.getpid()}"
    assert bars.said == ["writing a", "writing b"]


def test_workers_are_processes_and_their_words_come_here(tmp_path: Path, bars: QuietBars) -> None:
    run_jobs([Job(name, jobs.write, (tmp_path / name, name)) for name in ("a", "b")], 2, bars)
    found = [(tmp_path / name).read_text().split() for name in ("a", "b")]
    assert [name for name, _ in found] == ["a", "b"]
    assert len({os.getpid(), *(int(pid) for _, pid in found)}) == 3
    assert sorted(bars.said) == ["writing a", "writing b"]


def test_a_failure_is_a_joberror_that_names_the_job(
    tmp_path: Path, bars: QuietBars, capfd: pytest.CaptureFixture[str]
) -> None:
    work = [
        Job("bad", jobs.refuse, ("no images",)),
        Job("worse", jobs.crash, ()),
        Job("late", jobs.write, (tmp_path / "x", "x")),
    ]
    with pytest.raises(JobError) as failed:
        run_jobs(work, 2, bars)
    message = str(failed.value)
    # Both, or the second is stopped from starting by the first: what has begun is waited for.
    assert "bad" in message
    assert "the same command goes on from there" in message
    assert "bad: no images" in bars.said
    if "worse" in message:
        assert "ZeroDivisionError: a mistake in the code" in capfd.readouterr().err


def test_a_failure_in_this_process_is_what_it_is(bars: QuietBars) -> None:
    with pytest.raises(TwogateError, match="no images"):
        run_jobs([Job("bad", jobs.refuse, ("no images",))], 2, bars)


@contextmanager
def parent(folder: Path) -> Iterator[psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    there = psutil.Process(process.pid)
    try:
        yield there
    finally:
        children = there.children(recursive=True) if there.is_running() else []
        for child in [*children, there]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def command(process: psutil.Process) -> str:
    """Its command line; none where it is gone, as a helper of short life may be by now."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def workers_of(there: psutil.Process, count: int = 2) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [child for child in there.children() if "spawn_main" in command(child)]
        if len(found) == count:
            return found
        time.sleep(0.02)
    raise AssertionError("the workers did not start")


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told to its children by Linux alone")
@pytest.mark.parametrize("when", ["while they start", "while they work"])
def test_workers_die_with_their_parent(tmp_path: Path, when: str) -> None:
    """However early: a worker that outlived its parent would write into a run that was started again."""
    with parent(tmp_path) as there:
        workers = workers_of(there)
        if when == "while they work":
            deadline = time.monotonic() + 60
            while not all((tmp_path / name).exists() for name in ("a", "b")) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert (tmp_path / "a").exists()
        there.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=30)
        for worker in alive:
            worker.kill()
        assert not alive
        if when == "while they start":
            assert list(tmp_path.iterdir()) == []
