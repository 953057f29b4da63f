"""The whole path: a folder of images and a recipe in, a hardened bundle out, served by a real process, asked over HTTP.

One hardening run of `recipes/smoke.yaml` on scikit-learn's digits, about two minutes on two cores; every test reads it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hardening import data, pipeline
from hardening.attacks.features import pgd_features
from hardening.calibrate import assemble, calibrate
from hardening.encoders import Encoder
from hardening.gate import Gate
from hardening.measure.records import Record, read
from hardening.progress import Bars
from hardening.recipe import load_recipe
from model_store.bundle import load_bundle
from model_store.pixels import decode
from tests.conftest import REPOSITORY
from tests.support.toy_images import write_digits

RECIPE = REPOSITORY / "recipes" / "smoke.yaml"
ATTACKS = ("pgd", "uap")


@dataclass(frozen=True)
class Run:
    """What `twogate harden` left."""

    root: Path
    bundle: Path
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("smoke")
    write_digits(root / "data", train=90, test=40)
    command = [sys.executable, "-m", "cli", "harden", str(RECIPE), "--data", str(root / "data")]
    command += ["--store", str(root / "store"), "--run", str(root / "run"), "--device", "cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    return Run(root / "data", root / "store" / "smoke" / "1", root / "run", done.stdout)


@pytest.fixture(scope="module")
def url(run: Run) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "cli",
        "serve",
        "--store",
        str(run.bundle.parent.parent),
        "--bundle",
        "smoke",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.search(r"http://[\d.]+:\d+", line)
            assert found, line
            yield found.group()
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def rebuilt(run: Run) -> tuple[Gate, Encoder, data.Dataset]:
    """The torch gate, made again from what the run directory keeps, and the public victim."""
    recipe, bars = load_recipe(RECIPE), Bars()
    dataset = data.prepare(run.root, recipe.pixels, recipe.splits, recipe.seed, run.folder / "data", bars)

    def public() -> Encoder:
        return pipeline.public_encoder(recipe, dataset, "victim", run.folder, "cpu", bars)

    tuned = {role: pipeline.train_encoder(recipe, dataset, role, run.folder, "cpu", bars) for role in pipeline.ROLES}
    views = assemble(public(), tuned, dataset.images[dataset.splits["fit"][:8]])
    return calibrate(views, dataset, recipe.detector, "cpu", bars).gate, public(), dataset


@pytest.fixture(scope="module")
def records(run: Run) -> list[Record]:
    return read(run.bundle / "report")


def value(records: list[Record], metric: str, subject: str, attack: str) -> float:
    (found,) = [r.value for r in records if (r.metric, r.subject, r.attack) == (metric, subject, attack)]
    assert isinstance(found, float)
    return found


def png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def post(url: str, image: bytes) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/embeddings", content=image, headers={"Content-Type": "image/png"}, timeout=30)
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["data"]
    return dict(item)


def test_the_command_prints_the_bundle(run: Run) -> None:
    assert run.printed.strip() == str(run.bundle)
    assert sorted(p.name for p in run.bundle.iterdir()) == ["card.md", "manifest.json", "model.onnx", "report"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_hardening_helps_against_attacks_on_the_public_victim(records: list[Record], attack: str) -> None:
    undefended = value(records, "robust_acc", "undefended victim", attack)
    # The attack is real: it costs the undefended victim much of what it knows.
    assert undefended < value(records, "clean_acc", "undefended victim", "clean") - 0.2
    for system in ("hardened victim alone", "three branches, RFDM", "three branches, guarded"):
        assert value(records, "robust_acc", system, attack) > undefended + 0.15
    embedding = value(records, "knn_acc", "returned embedding", attack)
    assert embedding > value(records, "knn_acc", "undefended victim", attack) + 0.15


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacked_images_score_higher(records: list[Record], attack: str) -> None:
    assert value(records, "auroc", "detector", attack) > 0.8
    assert value(records, "tpr@0.05", "bundle's calibration", attack) > 0.4
    assert value(records, "fpr@0.05", "bundle's calibration", "clean") < 0.15


def test_rest_onnxruntime_and_torch_give_one_answer(run: Run, url: str, rebuilt: tuple[Gate, Encoder, data.Dataset]) -> None:
    gate, _, dataset = rebuilt
    bundle = load_bundle(run.bundle)
    session = ort.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    for index in dataset.splits["test"][:5]:
        encoded = (run.root / dataset.paths[index]).read_bytes()
        pixels = decode(encoded, bundle.manifest.pixels)
        np.testing.assert_array_equal(pixels, dataset.images[index])
        plain = session.run(["embedding", "confidence", "score"], {"images": pixels[None]})
        with torch.no_grad():
            module = [output.numpy() for output in gate(torch.from_numpy(pixels[None].copy()))]
        served = post(url, encoded)
        confidence = [served["dae"]["confidence"][branch.name] for branch in bundle.manifest.branches]
        rest = [np.array([served["embedding"]]), np.array([confidence]), np.array([served["dae"]["score"]])]
        for answer, tolerance in ((rest, 1e-5), (module, 1e-4)):
            np.testing.assert_allclose(answer[0], plain[0], atol=tolerance)
            np.testing.assert_allclose(answer[1], plain[1], atol=10 * tolerance)
            np.testing.assert_allclose(answer[2], plain[2], atol=10 * tolerance)


def test_the_service_tells_attacked_uploads_from_clean_ones(url: str, rebuilt: tuple[Gate, Encoder, data.Dataset]) -> None:
    _, victim, dataset = rebuilt
    images, _ = dataset.take("test")
    images = images[::8][:40]
    attacked = pgd_features(victim, images, epsilon=10, steps=10, restarts=1, seed=1, device="cpu", bars=Bars())
    clean = [post(url, png(image))["dae"] for image in images]
    bad = [post(url, png(image))["dae"] for image in attacked]
    assert np.median([v["score"] for v in bad]) > np.median([v["score"] for v in clean])
    assert sum(v["flagged"] for v in bad) > sum(v["flagged"] for v in clean) + 5


def test_reject_gives_no_embedding(url: str, rebuilt: tuple[Gate, Encoder, data.Dataset]) -> None:
    _, victim, dataset = rebuilt
    images, _ = dataset.take("test")
    attacked = pgd_features(victim, images[:20], epsilon=10, steps=20, restarts=1, seed=2, device="cpu", bars=Bars())
    worst = max(attacked, key=lambda image: post(url, png(image))["dae"]["score"])
    uri = "data:image/png;base64," + base64.b64encode(png(worst)).decode()
    answer = httpx.post(f"{url}/v1/embeddings?on_flag=reject", json={"input": uri}, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["type"] == "/problems/adversarial-suspected"
    assert "embedding" not in json.dumps(answer.json()["detail"])
    assert "data" not in answer.json()


def test_a_bundle_with_one_flipped_byte_is_refused(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(run.bundle, store / "smoke" / "1")
    model = store / "smoke" / "1" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    for command in (
        ["bundle", "verify", "smoke", "--store", str(store)],
        ["serve", "--store", str(store), "--bundle", "smoke", "--port", "0"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cli", *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode != 0
        assert "model.onnx" in done.stderr
        assert "Traceback" not in done.stderr
