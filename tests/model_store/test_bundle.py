from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_store.bundle import load_bundle, verify_bundle
from model_store.errors import BundleError
from model_store.manifest import MANIFEST_FILE, MODEL_FILE, Golden, Manifest, parse_manifest
from model_store.session import GateSession
from tests.support.tiny_bundle import make_tiny_bundle, tiny_graph


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one's own, to damage."""
    return make_tiny_bundle(tmp_path / "store", files={"report/roc.txt": b"a plot"})


def reseal(bundle: Path, **changes: object) -> None:
    """Change the manifest and give it a valid digest again, as a careless or hostile author would."""
    manifest = parse_manifest((bundle / MANIFEST_FILE).read_bytes())
    (bundle / MANIFEST_FILE).write_bytes(manifest.model_copy(update=changes).sealed_bytes())


def manifest_of(bundle: Path) -> Manifest:
    return parse_manifest((bundle / MANIFEST_FILE).read_bytes())


def test_a_sound_bundle_loads_and_verifies(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.label == "tiny/1"
    assert loaded.model == (bundle / MODEL_FILE).read_bytes()
    assert set(loaded.manifest.files) == {MODEL_FILE, "card.md", "report/roc.txt"}
    done = "\n".join(verify_bundle(bundle))
    for check in ("manifest", "sha256 of 3 files", "standard operators", "graph", "golden"):
        assert check in done


def test_the_same_arguments_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    again = make_tiny_bundle(tmp_path / "other", files={"report/roc.txt": b"a plot"})
    for name in (MANIFEST_FILE, MODEL_FILE, "card.md"):
        assert (bundle / name).read_bytes() == (again / name).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused_by_name(bundle: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([MANIFEST_FILE, MODEL_FILE, "card.md", "report/roc.txt"]))
    file = bundle / name
    whole = file.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        with pytest.raises(BundleError) as refused:
            load_bundle(bundle)
    finally:
        file.write_bytes(whole)
    assert refused.value.file == name


@pytest.mark.parametrize("name", [MANIFEST_FILE, MODEL_FILE, "card.md", "report/roc.txt"])
@pytest.mark.parametrize("cut", [1, 0.5])
def test_a_truncated_file_is_refused_by_name(bundle: Path, name: str, cut: float) -> None:
    file = bundle / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if cut == 1 else whole[: int(len(whole) * cut)])
    with pytest.raises(BundleError) as refused:
        load_bundle(bundle)
    assert refused.value.file == name


@pytest.mark.parametrize("name", [MANIFEST_FILE, MODEL_FILE, "card.md", "report/roc.txt"])
def test_a_missing_file_is_refused_by_name(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match="No such file") as refused:
        load_bundle(bundle)
    assert refused.value.file == name


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"/nothing: manifest\.json: cannot be read \(No such file"):
        load_bundle(tmp_path / "nothing")


def test_a_refusal_says_which_bundle(bundle: Path) -> None:
    (bundle / "card.md").write_text("changed")
    for read in (load_bundle, verify_bundle):
        with pytest.raises(BundleError, match=r"^tiny/1: card\.md: its sha256"):
            read(bundle)


@pytest.mark.parametrize("name", [MANIFEST_FILE, MODEL_FILE, "card.md"])
def test_a_link_is_refused_even_to_the_right_bytes(bundle: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(bundle / name, elsewhere)
    (bundle / name).symlink_to(elsewhere)
    with pytest.raises(BundleError, match="link") as refused:
        load_bundle(bundle)
    assert refused.value.file == name


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "report", tmp_path / "elsewhere")
    (bundle / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link") as refused:
        load_bundle(bundle)
    assert refused.value.file == "report/roc.txt"


def test_a_named_pipe_is_refused_without_waiting_for_a_writer(bundle: Path) -> None:
    (bundle / "card.md").unlink()
    os.mkfifo(bundle / "card.md")
    with pytest.raises(BundleError, match="plain file") as refused:
        load_bundle(bundle)
    assert refused.value.file == "card.md"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "report/../../secret", ".", "", "nul\0l", "report"])
def test_a_name_that_leads_out_or_nowhere_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("x")
    reseal(bundle, files={**manifest_of(bundle).files, name: "0" * 64})
    with pytest.raises(BundleError) as refused:
        load_bundle(bundle)
    assert refused.value.file == name


@pytest.mark.parametrize("name", ["extra.txt", "report/extra.txt", ".hidden"])
def test_a_file_that_the_manifest_does_not_name_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_text("x")
    with pytest.raises(BundleError, match="does not name") as refused:
        verify_bundle(bundle)
    assert refused.value.file == name


def test_a_linked_folder_that_the_manifest_does_not_name_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle / "extra").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="does not name") as refused:
        verify_bundle(bundle)
    assert refused.value.file == "extra"


def test_a_signature_beside_the_manifest_is_no_stranger(bundle: Path) -> None:
    (bundle / "model.sig").write_text("{}")
    verify_bundle(bundle)


def test_a_manifest_without_a_model_is_refused(bundle: Path) -> None:
    reseal(bundle, files={"card.md": manifest_of(bundle).files["card.md"]})
    with pytest.raises(BundleError, match=r"names no model\.onnx"):
        load_bundle(bundle)


def test_branches_that_do_not_add_up_are_refused(bundle: Path) -> None:
    reseal(bundle, embedding_dim=25)
    with pytest.raises(BundleError, match="add up"):
        load_bundle(bundle)


def test_parts_of_a_branch_that_do_not_add_up_are_refused(bundle: Path) -> None:
    first, *rest = manifest_of(bundle).branches
    for parts in ((6, 2), (5, 2)):
        reseal(bundle, branches=(first.model_copy(update={"parts": parts}), *rest))
        if sum(parts) == first.embedding_dim:
            assert load_bundle(bundle).manifest.branches[0].parts == parts
        else:
            with pytest.raises(BundleError, match="the parts of victim do not add up"):
                load_bundle(bundle)


def test_a_graph_that_is_not_self_contained_is_refused_on_loading(tmp_path: Path) -> None:
    elsewhere, odd = tiny_graph(), tiny_graph()
    elsewhere.graph.initializer[0].external_data.add(key="location", value="weights.bin")
    odd.graph.node[0].domain = "my.ops"
    for graph, words in ((elsewhere, "another file"), (odd, "my.ops.Cast")):
        bundle = make_tiny_bundle(tmp_path, model=graph.SerializeToString(), calibration_n=9)
        with pytest.raises(BundleError, match=words) as refused:
            load_bundle(bundle)
        assert refused.value.file == MODEL_FILE


def test_a_graph_of_another_size_is_refused(tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path, model=tiny_graph(64).SerializeToString())
    loaded = load_bundle(other)  # every hash is right
    with pytest.raises(BundleError, match="inputs") as refused:
        GateSession(loaded)
    assert refused.value.file == MODEL_FILE


def test_bytes_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path, model=b"not a graph")
    with pytest.raises(BundleError) as refused:
        verify_bundle(other)
    assert refused.value.file == MODEL_FILE


def test_a_graph_that_answers_differently_is_refused(tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path, model=tiny_graph(seed=99).SerializeToString())
    GateSession(load_bundle(other))  # hashes and signature are right
    with pytest.raises(BundleError, match="golden embedding") as refused:
        verify_bundle(other)
    assert refused.value.file == MODEL_FILE


@pytest.mark.parametrize("changed", ["embedding", "confidence", "score"])
@pytest.mark.parametrize("by", [0.01, math.nan])
def test_every_golden_answer_is_compared(bundle: Path, changed: str, by: float) -> None:
    images, *answers = manifest_of(bundle).golden.arrays()
    promised = dict(zip(("embedding", "confidence", "score"), answers, strict=True))
    scale = max(1.0, float(np.abs(promised[changed]).max()))
    promised[changed] = promised[changed] + np.float32(by * scale)
    reseal(bundle, golden=Golden.of(images, **promised))
    with pytest.raises(BundleError, match=f"golden {changed}: differs"):
        verify_bundle(bundle)


def test_a_graph_that_fails_on_the_golden_images_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: GateSession, images: object) -> None:
        raise RuntimeError("a shape that was fixed")

    monkeypatch.setattr(GateSession, "run", run)
    with pytest.raises(BundleError, match=r"cannot answer the golden vector \(RuntimeError\)"):
        verify_bundle(bundle)


def test_a_golden_vector_that_cannot_be_run_is_refused(bundle: Path) -> None:
    golden = manifest_of(bundle).golden
    for change in (
        {"images": "!!"},
        {"images": golden.images[:-4]},
        {"shape": (golden.shape[0], 16, 64, 3)},
        {"shape": (0, 32, 32, 3), "images": "", "embedding": "", "confidence": "", "score": ""},
        {"score": golden.score * 2},
        {"embedding": golden.confidence},
    ):
        reseal(bundle, golden=golden.model_copy(update=change))
        with pytest.raises(BundleError, match="golden"):
            verify_bundle(bundle)


def test_a_manifest_is_no_longer_valid_when_edited_by_hand(bundle: Path) -> None:
    raw = json.loads((bundle / MANIFEST_FILE).read_bytes())
    raw["calibration"]["scores"][-1] += 1.0  # every image would look a little less suspicious
    (bundle / MANIFEST_FILE).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="changed after it was written"):
        load_bundle(bundle)


def test_batch_neighbours_do_not_change_an_answer(tiny_bundle: Path) -> None:
    loaded = load_bundle(tiny_bundle)
    session = GateSession(loaded, threads=1)
    images, *_ = loaded.manifest.golden.arrays()
    together = session.run(images)
    for index in range(len(images)):
        alone = session.run(images[index : index + 1])
        assert np.abs(alone.embedding[0] - together.embedding[index]).max() <= 1e-5
        assert abs(alone.score[0] - together.score[index]) <= 1e-5
