"""Two real bundles of toy encoders, and the images of their task."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hardening.calibrate import assemble, calibrate
from hardening.data import prepare
from hardening.encoders import Encoder
from hardening.export import export, golden
from hardening.recipe import Splits
from model_store.manifest import MODEL_FILE, Branch, Detector, Manifest
from model_store.pixels import PixelRule
from model_store.store import publishing
from tests.hardening.conftest import QuietBars
from tests.support.patterns import trained_encoder, write_patterns

SPLITS = Splits(local=0.3, validation=0.1, fit=0.3, calibration=0.3)


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("task") / "root", train=80, test=15)


@pytest.fixture(scope="session")
def toy_bundles(task_folder: Path, trained_toy: Encoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a bundle with one public victim, and other private encoders."""
    store = tmp_path_factory.mktemp("store")
    rule = PixelRule(height=16, width=16)
    dataset = prepare(task_folder, rule, SPLITS, 0, store / ".data", QuietBars())
    sample = dataset.images[dataset.splits["fit"][:8]]
    places = []
    for seed in (1, 4):
        tuned = {role: trained_encoder(seed=seed + i) for i, role in enumerate(("victim", "auxiliary", "bmp"))}
        calibrated = calibrate(
            assemble(copy.deepcopy(trained_toy), tuned, sample), dataset, "consistency", "cpu", QuietBars()
        )
        model = export(calibrated.gate, sample[:2])
        branches = calibrated.gate.detector.branches
        dims = calibrated.gate.dims()
        roles = {"mpae_victim": "mpae", "mpae_auxiliary": "mpae", "bmp": "bmp", "tripwire": "tripwire"}
        manifest = Manifest(
            name="toy",
            version=1,
            created=datetime(2025, 1, 1, tzinfo=UTC),
            pixels=rule,
            embedding_dim=sum(map(sum, dims.values())),
            branches=tuple(
                Branch(
                    name=name,
                    role=roles[name],  # type: ignore[arg-type]
                    description="",
                    embedding_dim=sum(dims.get(name, ())),
                    parts=dims.get(name, ()),
                )
                for name in branches
            ),
            detector=Detector(name="consistency", description=""),
            calibration=calibrated.calibration,
            files={},
            golden=golden(model, rule),
            provenance={
                "data": dataset.summary(),
                "recipe": {"splits": SPLITS.model_dump(mode="json")},
            },
        )
        with publishing(store, "toy") as publication:
            (publication.path / MODEL_FILE).write_bytes(model)
            places.append(publication.seal(manifest))
    return places[0], places[1]
