from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model_store.bundle import load_bundle, verify_bundle
from model_store.calibration import Calibration
from model_store.errors import BundleError
from model_store.manifest import MODEL_FILE
from model_store.revise import revise
from model_store.store import Publication, StoreError, publishing, versions
from tests.conftest import REPOSITORY
from tests.support.tiny_bundle import make_tiny_bundle

TABLE = Calibration(source="others", scores=tuple(float(n) for n in range(200)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def again(place: Path, **changes: object) -> Path:
    arguments = {"fields": {"calibration": TABLE}, "card": "## Again\n\nWords.", "record": {"why": "a test"}, **changes}
    return revise(load_bundle(place), place.parents[1], **arguments)  # type: ignore[arg-type]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "store", files={"report/metrics.json": b"{}"})


def test_all_but_what_was_asked_for_stays(old: Path) -> None:
    before, was = load_bundle(old).manifest, contents(old)
    new = again(old, files={"extra/note.txt": b"new"})
    assert new == old.parent / "2"
    verify_bundle(new)
    after = load_bundle(new).manifest
    assert after.calibration == TABLE
    assert after.created > before.created
    kept = {"version", "created", "digest", "files", "calibration", "provenance"}
    assert after.model_dump(exclude=kept) == before.model_dump(exclude=kept)
    assert set(after.files) == {*before.files, "extra/note.txt"}
    assert {name for name, sha in before.files.items() if after.files[name] != sha} == {"card.md"}
    assert (new / MODEL_FILE).read_bytes() == (old / MODEL_FILE).read_bytes()
    assert (new / "card.md").read_text() == (old / "card.md").read_text().rstrip() + "\n\n## Again\n\nWords.\n"
    assert contents(old) == was


def test_revisions_are_on_record_one_after_another(old: Path) -> None:
    second = again(old)
    third = again(second)
    provenance = load_bundle(third).manifest.provenance
    assert provenance["seed"] == 0
    assert [(one["from"], one["why"]) for one in provenance["revisions"]] == [("tiny/1", "a test"), ("tiny/2", "a test")]
    assert provenance["revisions"][0]["digest"] == load_bundle(old).manifest.digest


def test_what_another_one_published_meanwhile_is_not_lost(old: Path) -> None:
    assert again(old, only_newest=True).name == "2"
    with pytest.raises(StoreError, match=r"tiny/2 was published meanwhile.* run this again, or name tiny/1"):
        again(old, only_newest=True)
    assert versions(old.parents[1], "tiny") == [1, 2]
    assert again(old).name == "3"


def test_of_two_at_once_that_start_from_the_newest_one_is_refused(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one takes the number between the look at the store and the move into place."""
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        again(old)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(StoreError, match="tiny/2 was published meanwhile"):
        again(old, only_newest=True)
    assert versions(old.parents[1], "tiny") == [1, 2]


def test_a_file_in_the_way_is_named(old: Path) -> None:
    (old.parent / "2").write_text("in the way")
    with pytest.raises(StoreError, match="/tiny/2 is in the way"):
        again(old)


def test_a_signature_is_not_taken_along(old: Path) -> None:
    (old / "model.sig").write_bytes(b"signed")
    assert not (again(old) / "model.sig").exists()


def test_into_another_store_it_is_the_first_version(old: Path, tmp_path: Path) -> None:
    new = revise(load_bundle(old), tmp_path / "other", fields={}, card="## Moved", record={})
    assert new == tmp_path / "other/tiny/1"
    verify_bundle(new)


def test_a_bundle_without_a_card_gets_one(tmp_path: Path) -> None:
    manifest = load_bundle(make_tiny_bundle(tmp_path)).manifest
    with publishing(tmp_path, "tiny") as publication:
        (publication.path / MODEL_FILE).write_bytes((tmp_path / "tiny/1" / MODEL_FILE).read_bytes())
        bare = publication.seal(manifest)
    assert (again(bare) / "card.md").read_text() == "# tiny\n\n## Again\n\nWords.\n"


def test_a_file_that_changed_since_it_was_loaded_is_not_published(old: Path) -> None:
    bundle = load_bundle(old)
    (old / "report/metrics.json").write_bytes(b"[]")
    with pytest.raises(BundleError, match=r"report/metrics\.json: its sha256"):
        revise(bundle, old.parents[1], fields={}, card="", record={})
    assert [entry.name for entry in old.parent.iterdir()] == ["1"]


def test_a_failure_leaves_no_trace(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    was = contents(old.parents[1])
    monkeypatch.setattr(Publication, "seal", full)
    with pytest.raises(StoreError, match="No space left on device"):
        again(old)
    assert contents(old.parents[1]) == was
    assert [entry.name for entry in old.parent.iterdir()] == ["1"]


def test_a_store_that_cannot_be_written_says_what_to_do(old: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("a file where the store would be")
    with pytest.raises(StoreError, match="a store of your own"):
        revise(load_bundle(old), tmp_path / "other", fields={}, card="", record={})


KILLED = """
import sys, time
from pathlib import Path
from model_store.bundle import load_bundle
from model_store.revise import revise
from model_store.store import Publication
def slow(*_):
    print("sealing", flush=True)
    time.sleep(60)
Publication.seal = slow
place = Path(sys.argv[1])
revise(load_bundle(place), place.parents[1], fields={}, card="", record={})
"""


def test_a_kill_leaves_the_old_version_alone(old: Path) -> None:
    was = contents(old)
    command = [sys.executable, "-c", KILLED, str(old)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sealing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert versions(old.parents[1], "tiny") == [1]
    assert contents(old) == was
    assert again(old).name == "2"
