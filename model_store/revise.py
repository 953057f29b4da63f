"""A new version from an old one: some of it changed, everything else byte for byte, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model_store.bundle import Bundle, read_sealed
from model_store.manifest import MODEL_FILE
from model_store.store import StoreError, publishing

CARD_FILE = "card.md"
OWN_STORE = "copy the bundle's folder, under its name and number, into a store of your own, and name that one with --store"
"""What to do where the store that holds a bundle takes no version of it."""


def revise(
    bundle: Bundle,
    store: Path,
    *,
    fields: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    card: str,
    record: Mapping[str, Any],
    only_newest: bool = False,
) -> Path:
    """Publish a new version of `bundle` in `store` and return its folder; the old one stays as it is.

    `fields` replace those of the manifest, `files` are added or replaced, `card` is appended to the model card, and
    `record` joins the manifest's `provenance.revisions` beside the digest of the version that it was made from. A
    signature is not taken along: it was given for the old version. BundleError where a file of the old version is no
    longer what its manifest says. StoreError where the store cannot be written, and, with `only_newest`, where `bundle` is
    not its newest version any more.
    """
    old, changed = bundle.manifest, dict(files or {})
    revision = {"from": bundle.label, "digest": old.digest, **record}
    provenance = {**old.provenance, "revisions": [*old.provenance.get("revisions", []), revision]}
    manifest = old.model_copy(
        update={**fields, "created": datetime.now(UTC).replace(microsecond=0), "provenance": provenance}
    )
    text = f"# {old.name}"
    if CARD_FILE in old.files:
        text = read_sealed(bundle.path, old, CARD_FILE).decode("utf-8", "replace").rstrip()
    changed[CARD_FILE] = f"{text}\n\n{card.strip()}\n".encode()
    try:
        with publishing(store, old.name) as publication:
            for name in {**old.files, **changed}:
                target = publication.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if name in changed:
                    target.write_bytes(changed[name])
                elif name == MODEL_FILE:
                    target.write_bytes(bundle.model)
                else:
                    target.write_bytes(read_sealed(bundle.path, old, name))
            return publication.seal(manifest, old.version if only_newest else None)
    except OSError as error:
        raise StoreError(f"the store {store} cannot be written ({error.strerror}); {OWN_STORE}") from None
