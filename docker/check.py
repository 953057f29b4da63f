"""Check the image by running it, with what a container engine would enforce: any UID, read-only root, no capabilities.

    python docker/check.py IMAGE BASE        as root, with buildah

Prints sizes and times; exits 1 with the reason where something does not hold. `buildah run` cannot make the root
read-only, so the service is started from the mounted image in a mount namespace of its own, with the image's own
environment, entry point and command.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.service.support import png  # noqa: E402
from tests.support.tiny_bundle import make_tiny_bundle, noisy_images  # noqa: E402

LARGEST_MB = 230
LOADED = "import fastapi, onnxruntime, PIL.Image, prometheus_client, uvicorn"
READY_OVER_LOADED = 8.0
"""The service may take this many times as long to be ready as Python takes to load the libraries: a figure in seconds would
measure the machine. The tests' bundle takes once as long, the default bundle three to five times."""
MEMORY_MB = 400
_ENTER = """
set -e
root=$1 uid=$2; shift 2
mount --rbind "$root" "$root"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
[ -z "$STORE" ] || mount --bind "$STORE" "$root/mnt"
mount -o remount,bind,ro "$root"
cd "$root"
exec chroot "$root" setpriv --reuid "$uid" --regid 0 --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \
  env -i "$@"
"""


def main(image: str, base: str) -> None:
    """All the checks, in the order in which failures explain each other."""
    config = check_configuration(image)
    whole, below = size(image) / 1e6, size(base) / 1e6
    grown = whole - below
    print(f"image: {whole:.0f} MB, {grown:.0f} MB over its base")
    require(grown <= LARGEST_MB, f"the image is more than {LARGEST_MB} MB over its base")
    with mounted(image) as root, tempfile.TemporaryDirectory() as folder:
        check_contents(root)
        store = Path(folder) / "store"
        make_tiny_bundle(store)
        for path in (Path(folder), store):
            path.chmod(0o755)
        check_service(root, config, store)
        if any((ROOT / "model_store" / "bundles").glob("*/*/manifest.json")):
            check_service(root, config, None)
        else:
            print("default bundle: skipped: there is none in this checkout")


def check_configuration(image: str) -> dict[str, Any]:
    """What the image says about itself; returned for those who run it."""
    inspected = json.loads(output("buildah", "inspect", "--type", "image", image))
    config: dict[str, Any] = inspected["Docker"]["config"]
    require(config["User"] == "65532:0", "the user is not numeric and in group 0")
    require("Healthcheck" in config, "there is no HEALTHCHECK")
    require(config.get("StopSignal", "SIGTERM") == "SIGTERM", "it is not stopped by SIGTERM")
    labels = {name.removeprefix("org.opencontainers.image.") for name in config["Labels"]}
    require({"title", "licenses", "version", "revision"} <= labels, "labels are missing")
    return config


def check_contents(root: Path) -> None:
    """Only what serving needs."""
    packages = next(root.glob("opt/twogate/lib/python3.*/site-packages"))
    there = {path.name for path in packages.iterdir()}
    require(not there & {"torch", "pyarrow", "pip", "uv", "hardening", "onnx"}, "more than serving needs is installed")
    require(not any((root / "usr/bin" / name).exists() for name in ("gcc", "cc", "make", "git")), "there is a compiler")
    require(not list(root.glob("root/.cache/*")), "there is a cache")
    listed = {part["name"].lower() for part in json.loads((root / "opt/twogate/sbom.cdx.json").read_text())["components"]}
    require({"twogate", "onnxruntime", "numpy", "pillow"} <= listed, "the SBOM is not complete")


def check_service(root: Path, config: dict[str, Any], store: Path | None) -> None:
    """Start, judge, stop."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"TWOGATE_PORT": str(port), "TWOGATE_DRAIN_DELAY_S": "1"}
    if store:
        settings |= {"TWOGATE_STORE": "/mnt", "TWOGATE_BUNDLE": "tiny"}
    environment = [*config["Env"], *(f"{name}={value}" for name, value in settings.items())]
    uid = random.randrange(100_000, 2_000_000_000)
    what = "mounted store" if store else "default bundle"

    def command(*words: str) -> list[str]:
        return ["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(root), str(uid), *environment, *words]

    outside = os.environ | {"STORE": str(store or "")}
    started = time.monotonic()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    service = subprocess.Popen(command(*config["Entrypoint"], *config["Cmd"]), env=outside, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while not answers(client, "/health/ready"):
                require(service.poll() is None and time.monotonic() - started < 60, "the service did not start")
                time.sleep(0.02)
            ready = time.monotonic() - started
            started = time.monotonic()
            subprocess.run(command("python", "-c", LOADED), env=outside, check=True)
            loaded = time.monotonic() - started
            require(ready <= READY_OVER_LOADED * loaded, f"ready after {ready:.1f} s, the libraries load in {loaded:.1f} s")
            # Whoever is not root may not write into / anyway: how it is mounted tells.
            mounts = [line.split() for line in Path(f"/proc/{service.pid}/mountinfo").read_text().splitlines()]
            require([mount[5].split(",")[0] for mount in mounts if mount[4] == "/"] == ["ro"], "/ is writable")
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{service.pid}/status").read_text().splitlines())
            require(status["Uid"].split()[0] == str(uid), "another UID")
            require(int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"] == "1", "privileges")
            probe = subprocess.run(command(*config["Healthcheck"]["Test"][1:]), env=outside, capture_output=True)
            require(probe.returncode == 0, f"HEALTHCHECK fails: {probe.stderr.decode()}")
            seen = check_verdicts(client, strict=store is not None)
            for _ in range(50):
                judge(client, photos())
            memory = int(resident(service.pid)) / 1024
            require(memory <= MEMORY_MB, f"{memory:.0f} MB of memory")
            drained = check_drain(client, service)
        print(
            f"{what}: UID {uid}, ready after {ready:.2f} s ({ready / loaded:.1f} x the libraries), {seen}, "
            f"{memory:.0f} MB of memory after 200 photos, {drained}"
        )
    except BaseException:
        log.seek(0)
        print(log.read().decode()[-3000:], file=sys.stderr)
        raise
    finally:
        if service.poll() is None:
            service.kill()
        service.wait()
        log.close()


def check_verdicts(client: httpx.Client, *, strict: bool) -> str:
    """Photographs pass; with the tests' bundle (`strict`) it is known what it flags, too."""
    answer = judge(client, photos()).json()
    flags = [found["dae"]["flagged"] for found in answer["data"]]
    p_values = ", ".join(f"{found['dae']['p_value']:.2f}" for found in answer["data"])
    require(all(0 < found["dae"]["p_value"] <= 1 for found in answer["data"]), "p-values out of range")
    if strict:
        require(not any(flags), "a clean photograph was flagged")
        noise = png(noisy_images(1, 32, seed=99)[0])
        refused = client.post("/v1/scan?on_flag=reject", content=noise, headers={"Content-Type": "image/png"})
        require(refused.status_code == 422 and refused.json()["type"] == "/problems/adversarial-suspected", refused.text)
    else:
        attacked = sorted((ROOT / "examples/photos").glob("*-attacked.png"))
        found = judge(client, [path.read_bytes() for path in attacked]).json()["data"]
        require(2 * sum(one["dae"]["flagged"] for one in found) > len(attacked), "attacked photographs pass")
    return f"{flags.count(False)} of {len(flags)} photos pass (p {p_values})"


def check_drain(client: httpx.Client, service: subprocess.Popen[bytes]) -> str:
    """After SIGTERM it is unready at once, still answers for the drain delay, and leaves with exit code 0."""
    told = time.monotonic()
    service.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    require(client.get("/health/ready").status_code == 503, "still ready after SIGTERM")
    require(judge(client, photos()).status_code == 200, "a request was lost after SIGTERM")
    code = service.wait(30)
    require(code == 0, f"exit code {code} after SIGTERM")
    return f"left {time.monotonic() - told:.1f} s after SIGTERM"


def photos() -> list[bytes]:
    """The CC0 photographs of the examples."""
    return [path.read_bytes() for path in sorted((ROOT / "examples/photos").glob("*-clean.jpg"))]


def judge(client: httpx.Client, images: list[bytes]) -> httpx.Response:
    """A form with files, judged."""
    answer = client.post("/v1/scan", files=[("file", (f"{n}.jpg", image)) for n, image in enumerate(images)])
    require(answer.status_code == 200, answer.text)
    return answer


def answers(client: httpx.Client, path: str) -> bool:
    """Whether this path answers 200 now."""
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def resident(pid: int) -> str:
    """The resident memory of a process, KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))


def size(image: str) -> int:
    """Bytes of the files in an image."""
    with mounted(image) as root:
        return int(output("du", "-s", "--apparent-size", "--block-size=1", str(root)).split()[0])


@contextmanager
def mounted(image: str) -> Iterator[Path]:
    """The image's files, in a folder."""
    container = output("buildah", "from", "--pull-never", image)
    try:
        yield Path(output("buildah", "mount", container))
    finally:
        output("buildah", "rm", container)


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def require(holds: bool, otherwise: str) -> None:
    """Leave with a reason unless it holds."""
    if not holds:
        sys.exit(f"docker/check.py: {otherwise}")


if __name__ == "__main__":
    main(*sys.argv[1:])
