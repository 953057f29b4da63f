from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cli.options import bundle_folder
from model_store.errors import BundleError


def test_a_named_store_goes_before_a_folder_of_the_same_name(
    own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(own_store, "here")
    shutil.copytree("here/tiny", "tiny")
    for store in (own_store, None):
        for path in ("./tiny/1", "here/tiny/1", tmp_path / "tiny/1"):
            assert bundle_folder(str(path), store) == Path(path)
        assert bundle_folder("~/tiny/1", store) == tmp_path / "tiny/1"
    assert bundle_folder("tiny/1", own_store) == own_store / "tiny/1"
    assert bundle_folder("tiny", own_store) == own_store / "tiny/2"
    assert bundle_folder("tiny/1", None) == Path("tiny/1")
    with pytest.raises(BundleError, match="there is no bundle of this name"):
        bundle_folder("here/tiny", own_store)
