"""Make `photos/*-attacked.png` and `photos/README.md` again, for the default bundle as it is now.

    .venv-dev/bin/python -m examples.make_photos

Each `photos/*-clean.jpg` is attacked at its own size by an attacker who knows how the service resizes (`twogate probe`).
"""

from __future__ import annotations

from pathlib import Path

from hardening.attacks.resize import through_resize_rule
from hardening.branches import TRIPWIRE
from hardening.graph import Graph
from hardening.measure.photographs import photograph, stored
from model_store.bundle import load_bundle
from model_store.store import DEFAULT_BUNDLE, EMBEDDED_STORE, resolve
from service.engine.local import LocalGate

PHOTOS = Path(__file__).parent / "photos"
EPSILON, STEPS = 8, 40
README = """\
Photographs from [alexeygrigorev/clothing-dataset-small](https://github.com/alexeygrigorev/clothing-dataset-small),
CC0 1.0 (public domain), and what an attack made of them, CC0 too. Written by

    .venv-dev/bin/python -m examples.make_photos

which attacks each on the public victim of the default bundle: PGD on features through the resizing, in the photograph's own
pixels, eps {epsilon}/255, {steps} steps. PNG, because JPEG takes off part of the perturbation.

p-values of {label} (graph {sha}); flagged at the default budget where p is at most 0.01:

| picture | clean | attacked |
| --- | --- | --- |
{rows}
"""


def main() -> None:
    """Attack every clean photograph, ask the gate about both, and write what it said."""
    bundle = load_bundle(resolve(EMBEDDED_STORE, DEFAULT_BUNDLE))
    victim = Graph(bundle.model).encoder(TRIPWIRE)
    gate = LocalGate.open(EMBEDDED_STORE, DEFAULT_BUNDLE)
    rows = []
    for clean in sorted(PHOTOS.glob("*-clean.jpg")):
        name = clean.stem.removesuffix("-clean")
        attacked = through_resize_rule(
            victim, photograph(clean), bundle.manifest.pixels, epsilon=EPSILON, steps=STEPS, seed=0, device="cpu"
        )
        file = PHOTOS / f"{name}-attacked.png"
        file.write_bytes(stored(attacked, "PNG"))
        said = []
        for path in (clean, file):
            verdict = gate.judge([gate.decode(path.read_bytes())])[0].verdict
            said.append(f"{verdict.p_value:.3f}, {'flagged' if verdict.flagged else 'passes'}")
        rows.append(f"| {name} | {' | '.join(said)} |")
    text = README.format(epsilon=EPSILON, steps=STEPS, label=bundle.label, sha=bundle.model_sha256[:12], rows="\n".join(rows))
    (PHOTOS / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
