from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_store.bundle import verify_bundle
from model_store.errors import BundleError
from model_store.manifest import MANIFEST_FILE, parse_manifest
from model_store.store import StoreError, names, publishing, resolve, try_store, versions
from tests.support.tiny_bundle import make_tiny_bundle


def test_versions_count_up(tmp_path: Path) -> None:
    assert [make_tiny_bundle(tmp_path).name for _ in range(3)] == ["1", "2", "3"]
    make_tiny_bundle(tmp_path, "another")
    assert versions(tmp_path, "tiny") == [1, 2, 3]
    assert names(tmp_path) == ["another", "tiny"]
    assert parse_manifest((tmp_path / "tiny/3" / MANIFEST_FILE).read_bytes()).version == 3


def test_versions_sort_as_numbers(tmp_path: Path) -> None:
    for name in ("2", "9"):
        (tmp_path / "b" / name).mkdir(parents=True)
    assert make_tiny_bundle(tmp_path, "b").name == "10"
    assert versions(tmp_path, "b") == [2, 9, 10]
    assert resolve(tmp_path, "b").name == "10"


def test_what_is_no_version_is_ignored(tmp_path: Path) -> None:
    for name in ("0", "01", "-1", "1.0", "v1", "²", ".incoming-x", " 1"):
        (tmp_path / "b" / name).mkdir(parents=True)
    (tmp_path / "b" / "7").write_text("a file")
    assert versions(tmp_path, "b") == []
    assert names(tmp_path) == []


def test_resolve_finds_newest_or_named(tmp_path: Path) -> None:
    for _ in range(2):
        make_tiny_bundle(tmp_path)
    assert resolve(tmp_path, "tiny") == tmp_path / "tiny/2"
    assert resolve(tmp_path, "tiny/1") == tmp_path / "tiny/1"


@pytest.mark.parametrize("place", ["tiny/9", "mine/1"])
def test_a_bundle_under_another_name_or_number_is_refused(tmp_path: Path, place: str) -> None:
    shutil.copytree(make_tiny_bundle(tmp_path), tmp_path / place)
    said = f"{place}: the folder holds tiny/1, and a bundle keeps .* `twogate bundle import FOLDER`"
    for wanted in (place, place.partition("/")[0]):
        with pytest.raises(BundleError, match=said):
            resolve(tmp_path, wanted)
    assert resolve(tmp_path, "tiny/1") == tmp_path / "tiny/1"


def test_a_stray_folder_with_the_highest_number_is_named(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path)
    (tmp_path / "tiny/20250101").mkdir()
    with pytest.raises(BundleError) as refused:
        resolve(tmp_path, "tiny")
    assert str(refused.value) == (
        "tiny/20250101: manifest.json: cannot be read (No such file or directory); that is the highest number, "
        "there are also tiny/1"
    )


@pytest.mark.parametrize("wanted", ["", ".", "..", "/", "/etc", "../store/tiny", "missing", "tiny\0", "Tiny"])
def test_resolve_says_what_there_is_instead(tmp_path: Path, wanted: str) -> None:
    make_tiny_bundle(tmp_path / "store")
    with pytest.raises(BundleError, match="the store holds tiny"):
        resolve(tmp_path / "store", wanted)


@pytest.mark.parametrize("version", ["2", "01", "..", "../tiny/1", "1/", "1/..", "²", "latest"])
def test_resolve_names_the_versions_there_are(tmp_path: Path, version: str) -> None:
    make_tiny_bundle(tmp_path)
    with pytest.raises(BundleError, match="there are 1"):
        resolve(tmp_path, f"tiny/{version}")


def test_an_empty_or_absent_store_holds_nothing(tmp_path: Path) -> None:
    assert names(tmp_path / "absent") == []
    with pytest.raises(BundleError, match="the store holds nothing"):
        resolve(tmp_path / "absent", "tiny")


def test_a_failure_while_publishing_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk on fire"), publishing(tmp_path, "tiny") as publication:
        (publication.path / "model.onnx").write_bytes(b"half")
        raise RuntimeError("disk on fire")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_versions_that_were_there(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path)
    with pytest.raises(RuntimeError), publishing(tmp_path, "tiny") as publication:
        (publication.path / "model.onnx").write_bytes(b"half")
        raise RuntimeError
    assert [entry.name for entry in (tmp_path / "tiny").iterdir()] == ["1"]


def test_others_may_read_what_was_published(tmp_path: Path) -> None:
    """Who hardens is seldom who serves; `mkdtemp` makes folders for their owner alone."""
    made = make_tiny_bundle(tmp_path)
    assert stat.S_IMODE(made.stat().st_mode) == 0o755


def test_what_was_not_sealed_is_not_published(tmp_path: Path) -> None:
    with publishing(tmp_path, "tiny") as publication:
        (publication.path / "model.onnx").write_bytes(b"whole, but not sealed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "Photos", "-x", "x" * 65, ".hidden"])
def test_a_name_that_could_not_be_found_again_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="name"), publishing(tmp_path / "store", name):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_for_another_name_is_refused(tmp_path: Path) -> None:
    manifest = parse_manifest((make_tiny_bundle(tmp_path, "one") / MANIFEST_FILE).read_bytes())
    with pytest.raises(BundleError, match="'one', not for 'two'"), publishing(tmp_path, "two") as publication:
        publication.seal(manifest)
    assert names(tmp_path) == ["one"]


def test_a_link_is_not_published(tmp_path: Path) -> None:
    manifest = parse_manifest((make_tiny_bundle(tmp_path) / MANIFEST_FILE).read_bytes())
    with pytest.raises(BundleError, match=r"card\.md: is a link"), publishing(tmp_path, "tiny") as publication:
        (publication.path / "card.md").symlink_to("/etc/hostname")
        publication.seal(manifest)
    assert versions(tmp_path, "tiny") == [1]


def test_a_nested_file_named_like_the_manifest_is_hashed_too(tmp_path: Path) -> None:
    verify_bundle(make_tiny_bundle(tmp_path, files={"report/manifest.json": b"{}"}))


def test_concurrent_publishers_get_a_version_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda _: make_tiny_bundle(tmp_path, calibration_n=50), range(8)))
    assert sorted(int(place.name) for place in places) == list(range(1, 9))
    for place in places:
        verify_bundle(place)
        assert parse_manifest((place / MANIFEST_FILE).read_bytes()).version == int(place.name)
    assert len(list((tmp_path / "tiny").iterdir())) == 8


def test_a_file_in_the_way_of_a_version_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "1").write_text("in the way")
    with pytest.raises(StoreError, match=r"/tiny/1 is in the way, and is no version: move it elsewhere"):
        make_tiny_bundle(tmp_path)
    assert [entry.name for entry in (tmp_path / "tiny").iterdir()] == ["1"]


def test_trying_a_store_leaves_no_trace(tmp_path: Path) -> None:
    try_store(tmp_path / "a" / "b" / "store", "tiny")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    try_store(tmp_path / "a" / "b", "tiny")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["a"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"file cannot be written \(.*\); wait"):
        try_store(tmp_path / "file", "tiny", "wait")


def test_what_was_left_a_day_ago_is_swept(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path)
    for name, hours in ((".incoming-old", 25), (".incoming-new", 23), (".other", 25)):
        left = tmp_path / "tiny" / name
        left.mkdir()
        (left / "model.onnx").write_bytes(b"half")
        os.utime(left, times=(time.time() - 3600 * hours,) * 2)
    make_tiny_bundle(tmp_path)
    assert sorted(entry.name for entry in (tmp_path / "tiny").iterdir()) == [".incoming-new", ".other", "1", "2"]


def test_two_publishers_at_once_where_one_gives_up(tmp_path: Path) -> None:
    with publishing(tmp_path, "tiny"):
        place = make_tiny_bundle(tmp_path)
    assert place.is_dir()
    assert [entry.name for entry in (tmp_path / "tiny").iterdir()] == ["1"]


KILLED_WHILE_PUBLISHING = """
import sys, time
from pathlib import Path
from model_store.store import publishing
with publishing(Path(sys.argv[1]), "tiny") as publication:
    (publication.path / "model.onnx").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_kill_while_publishing_leaves_no_version(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_PUBLISHING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert versions(tmp_path, "tiny") == []
    assert names(tmp_path) == []
    assert [entry.name[0] for entry in (tmp_path / "tiny").iterdir()] == ["."]  # hidden from Triton, too
    # And the next publisher is not disturbed by what was left.
    assert make_tiny_bundle(tmp_path).name == "1"
