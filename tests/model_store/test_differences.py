from __future__ import annotations

from pathlib import Path

from model_store.bundle import load_bundle
from model_store.calibration import Calibration
from model_store.differences import NOTHING, differences
from model_store.revise import revise
from tests.support.tiny_bundle import make_tiny_bundle
from tests.support.tiny_head import add_tiny_head


def test_a_bundle_does_not_differ_from_itself(tmp_path: Path) -> None:
    manifest = load_bundle(make_tiny_bundle(tmp_path)).manifest
    assert differences(manifest, manifest) == []
    assert differences(manifest, load_bundle(make_tiny_bundle(tmp_path)).manifest) == []


def test_another_calibration_is_one_line_and_the_cards_other(tmp_path: Path) -> None:
    bundle = load_bundle(make_tiny_bundle(tmp_path))
    table = Calibration(source="scans", scores=(1.0, 2.0, 3.0))
    other = load_bundle(revise(bundle, tmp_path, fields={"calibration": table}, card="x", record={}))
    card, calibration = differences(bundle.manifest, other.manifest)
    assert card.what == "file card.md"
    assert calibration.what == "calibration"
    assert "1200 scores (generated smooth pictures)" in calibration.before
    assert "3 scores (scans), half below 2" in calibration.after
    assert "smallest max_fpr 0.25" in calibration.after


def test_a_head_appears_as_task_and_file(tmp_path: Path) -> None:
    bundle = load_bundle(make_tiny_bundle(tmp_path))
    other = load_bundle(add_tiny_head(bundle, tmp_path))
    found = {one.what: one for one in differences(bundle.manifest, other.manifest)}
    assert list(found) == ["file card.md", "file tasks/animals.onnx", "task animals"]
    assert found["task animals"].before == NOTHING
    assert found["task animals"].after.startswith("3 classes, guarded, nothing")
    back = {one.what: one for one in differences(other.manifest, bundle.manifest)}
    assert back["task animals"].after == NOTHING


def test_another_graph_and_other_pixels(tmp_path: Path) -> None:
    one = load_bundle(make_tiny_bundle(tmp_path, "one")).manifest
    two = load_bundle(make_tiny_bundle(tmp_path, "two", size=64, seed=1)).manifest
    found = {item.what: item for item in differences(one, two)}
    assert {"file model.onnx", "pixels height", "pixels width", "detector seed", "calibration", "golden vector"} <= set(found)
    assert (found["pixels height"].before, found["pixels height"].after) == ("32", "64")


def test_branches(tmp_path: Path) -> None:
    one = load_bundle(make_tiny_bundle(tmp_path)).manifest
    swapped = one.model_copy(update={"branches": (one.branches[1], one.branches[0], *one.branches[2:])})
    (order,) = differences(one, swapped)
    assert order.what == "order of branches"
    fewer = one.model_copy(update={"branches": one.branches[:3]})
    (gone,) = differences(one, fewer)
    assert (gone.what, gone.after) == ("branch tripwire", NOTHING)
