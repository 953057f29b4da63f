"""The model card: what a bundle is, from its manifest, and what was measured of it, from records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hardening.measure.records import Record
from hardening.measure.render import card_sections
from model_store.manifest import MODEL_FILE, Manifest
from model_store.revise import CARD_FILE

_LIMITS = """\
- Known bypass: who has these weights and aims at embedding and score together gets most pictures past both; so does, less
  often, who has another bundle of the same recipe. That was not measured here but of bundles like it (Twogate's
  `docs/results.md`); `twogate evaluate --adaptive T2,T3,T5-selective` measures it of this one.
- Everything above was attacked on the undefended public victim, without knowledge of the defence, and at one budget.
- The thresholds hold for images like those of the calibration. Other domains or heavy editing raise false alarms: compare
  the table above, and calibrate on your own images.
- The verdict says whether an image looks like an attack on the encoder. It is no filter for content, and no malware scan."""


def write_card(folder: Path, manifest: Manifest, records: Sequence[Record]) -> None:
    """Write `card.md` and `report/` (records, plots) into a bundle in the making; its graph is there already."""
    report = folder / "report" / "records"
    report.mkdir(parents=True)
    lines = [json.dumps(asdict(record)) for record in records]
    (report / f"{manifest.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = manifest.provenance["recipe"]
    parts = [
        f"# {manifest.name}",
        recipe["description"],
        _facts(manifest, (folder / MODEL_FILE).stat().st_size),
        card_sections(records, folder, manifest.detector.name),
        f"## What it does not withstand\n\n{_LIMITS}",
        f"## How it was made\n\n{_making(manifest)}",
        f"```json\n{json.dumps(recipe, indent=1)}\n```",
    ]
    (folder / CARD_FILE).write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _facts(manifest: Manifest, size: int) -> str:
    rule, calibration, recipe = manifest.pixels, manifest.calibration, manifest.provenance["recipe"]
    facts = [
        ("input", f"{rule.width} x {rule.height} pixels, RGB, whole picture resized ({rule.resample})"),
        ("embedding", f"{manifest.embedding_dim} values, unit length; compare with a dot product"),
        *((branch.name, branch.description) for branch in manifest.branches),
        ("detector", f"{manifest.detector.name}: {manifest.detector.description}"),
        ("calibration", f"{calibration.words}; smallest max_fpr {calibration.smallest_budget:.2g}"),
        ("licence of the data", recipe["data_licence"]),
        ("licence of the weights", recipe["weights_licence"]),
        ("size", f"{size / 2**20:.1f} MiB, weights stored in 8 bits"),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)])


def _making(manifest: Manifest) -> str:
    made = manifest.provenance
    spent = ", ".join(f"{name} {value / 60:.1f} min" for name, value in made["seconds"].items()) or "nothing to train"
    images = ", ".join(f"{count} {name}" for name, count in made["data"]["splits"].items() if count)
    parity = ", ".join(f"{name} {value:.1e}" for name, value in made["parity"].items())
    return (
        f"`twogate harden` with the recipe below, seed {made['recipe']['seed']}, commit {made['commit']}, on "
        f"{made['cores']} cores ({made['device']}): {spent} (wall clock; side by side where there are cores). "
        f"Images: {images}; sha256 {made['data']['sha256'][:16]}….\n\n"
        f"ONNX against torch on real images, largest difference: {parity}.\n\n"
        "Every measured number is a record in `report/records/`; `twogate evaluate --out` a copy of `report/` makes tables "
        "of them again."
    )
