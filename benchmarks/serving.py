"""What serving costs: start to ready, memory, latency and throughput of the default bundle, in one run on this machine.

    .venv-dev/bin/python benchmarks/serving.py [--bundle photos] [--store DIR]

A real server process on a loopback port, asked with the CC0 photographs of the tests. Bounded: a few hundred requests.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
PHOTOS = sorted((ROOT / "examples" / "photos").glob("*.jpg"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="photos")
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "cli", "serve", "--port", "0", "--bundle", arguments.bundle]
    command += ["--store", str(arguments.store)] if arguments.store else []
    begun = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            # The line is printed when the server is ready, not before.
            line = process.stdout.readline()
            ready = time.monotonic() - begun
            found = re.search(r"http://\S+:\d+", line)
            if found is None:
                raise SystemExit(f"the server did not start: {line}")
            measure(found.group(), psutil.Process(process.pid), ready)
        finally:
            process.terminate()
            process.wait(30)


def measure(url: str, process: psutil.Process, ready: float) -> None:
    """Ask the server and print a table."""

    def memory() -> float:
        return float(process.memory_info().rss) / 2**20

    bodies = [photo.read_bytes() for photo in PHOTOS]
    idle = memory()
    with httpx.Client(timeout=60) as client:

        def ask(index: int) -> float:
            start = time.monotonic()
            answer = client.post(
                f"{url}/v1/embeddings", content=bodies[index % len(bodies)], headers={"Content-Type": "image/jpeg"}
            )
            answer.raise_for_status()
            return time.monotonic() - start

        for index in range(10):
            ask(index)
        alone = [ask(index) for index in range(60)]
        begun = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, range(200)))
        spent = time.monotonic() - begun
    one = statistics.median(alone)
    print(f"cores                                  {len(os.sched_getaffinity(0))}")
    print(f"start to ready                         {ready:.2f} s")
    print(f"memory, ready                          {idle:.0f} MiB")
    print(f"memory, after {len(alone) + len(together) + 10} requests             {memory():.0f} MiB")
    print(f"one request at a time, median          {1000 * one:.0f} ms")
    print(f"eight at a time, images per second     {len(together) / spent:.1f}")
    print(f"  ratio to one at a time               {len(together) / spent * one:.2f}")


if __name__ == "__main__":
    main()
