"""Attacks made on the public victim alone, by name, for attackers who know nothing of the defence."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hardening.attacks.advencoder import Patch, apply_patch, pat, per
from hardening.attacks.features import apply_universal, pgd_features, uap_features
from hardening.attacks.pap import pap
from hardening.attacks.ssp import ssp
from hardening.attacks.targeted import targeted_features
from hardening.graph import GraphEncoder
from hardening.measure.sizes import Size
from hardening.progress import Bars
from model_store.errors import TwogateError

NOISE, TARGETED = "noise", "targeted"
UNIVERSAL = ("uap", "per", "pat", "pap-base", "pap-fuse", "pap-ugs", "ssp")
PER_IMAGE = ("pgd", TARGETED)
OBLIVIOUS = (*PER_IMAGE, *UNIVERSAL)
ATTACKS = (NOISE, *OBLIVIOUS)
FLOOR = {**dict.fromkeys(PER_IMAGE, 0.5), **dict.fromkeys(UNIVERSAL, 0.2)}
"""What share of the undefended victim's answers an attack has to change before a defence that stands it has shown anything:
half where each image has an attack of its own, a fifth where one perturbation or patch has to do for all."""


class AttackError(TwogateError):
    """There is no such attack, or it lacks something."""


def check_names(names: tuple[str, ...]) -> None:
    """AttackError where a name is not an attack's."""
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise AttackError(f"there is no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")


def check_budget(*epsilons: float) -> None:
    """AttackError where a budget, in 1/255, is not whole: attacked images are 8-bit files, and 2.5 would be rounded to 3."""
    for epsilon in epsilons:
        if not (1 <= epsilon <= 255 and epsilon == int(epsilon)):
            raise AttackError(f"a budget is a whole number of 8-bit steps, 1 to 255, and not {epsilon:g}")


def craft_universal(
    name: str,
    victim: nn.Module,
    surrogate: NDArray[np.uint8],
    epsilon: float,
    seed: int,
    size: Size,
    file: Path,
    device: str,
    bars: Bars,
) -> None:
    """Make one perturbation for all images, from the attacker's own, and keep it in `file`, unless it is there.

    `epsilon` in 1/255; a patch (`pat`) is bounded by its area instead.
    """
    common: Any = {"seed": seed, "device": device, "bars": bars}

    def make() -> dict[str, NDArray[Any]]:
        match name:
            case "pat":
                patch = pat(victim, surrogate, epochs=size.generator_epochs, **common)
                return {"pixels": patch.pixels, "mask": patch.mask}
            case "uap":
                delta = uap_features(victim, surrogate, epsilon=epsilon, epochs=size.uap_epochs, **common)
            case "per":
                delta = per(victim, surrogate, epsilon=epsilon, epochs=size.generator_epochs, **common)
            case "pap-base" | "pap-fuse" | "pap-ugs":
                variant: Any = name.removeprefix("pap-")
                delta = pap(victim, surrogate, variant=variant, epsilon=epsilon, iterations=size.iterations, **common)
            case _:
                delta = ssp(victim, surrogate, epsilon=epsilon, iterations=size.iterations, **common)
        return {"delta": delta}

    kept(file, make)


def load_universal(file: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """What applies the perturbation or patch in `file` to images [N, H, W, 3]."""
    with np.load(file) as saved:
        arrays = {name: saved[name] for name in saved.files}
    if "mask" in arrays:
        return lambda images: apply_patch(images, Patch(arrays["pixels"], arrays["mask"]))
    return lambda images: apply_universal(images, arrays["delta"])


def craft(
    name: str,
    victim: nn.Module,
    images: NDArray[np.uint8],
    targets: NDArray[np.uint8],
    epsilon: float,
    seed: int,
    size: Size,
    device: str,
    bars: Bars,
) -> NDArray[np.uint8]:
    """Attack each image on its own: `noise`, `pgd` or `targeted`; uint8 [N, H, W, 3]."""
    if name == NOISE:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=images.shape)
        return np.asarray(np.clip(np.rint(images + epsilon * signs), 0, 255), dtype=np.uint8)
    if name == "pgd":
        return pgd_features(
            victim,
            images,
            epsilon=epsilon,
            steps=size.pgd_steps,
            restarts=size.restarts,
            seed=seed,
            device=device,
            bars=bars,
        )
    return targeted_features(
        victim,
        images,
        targets,
        epsilon=epsilon,
        steps=size.pgd_steps,
        restarts=size.restarts,
        seed=seed,
        device=device,
        bars=bars,
    )


def kept(file: Path, make: Callable[[], Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The arrays in `file`; made first where it is missing, and once only where two processes want them at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                beside = file.with_name(f".{file.stem}.partial.npz")
                np.savez(beside, allow_pickle=False, **make())
                beside.replace(file)
    with np.load(file) as saved:
        return {name: saved[name] for name in saved.files}


def fingerprint(victim: nn.Module, *images: NDArray[np.uint8]) -> str:
    """Names what is made for these weights and images: bundles of one public victim share its attacks."""
    # Of a graph, state_dict has the convolutions alone; its normalisation counts too.
    values = [*victim.state_dict().values(), *(victim.constants if isinstance(victim, GraphEncoder) else ())]
    return digest_of(*(value.detach().cpu().numpy() for value in values), *images)


@cache
def code_of(package: str) -> str:
    """8 hexadecimal digits of a package's code, comments and docstrings aside: what other code makes is made anew."""
    (place,) = importlib.import_module(package).__path__
    digest = hashlib.sha256()
    for file in sorted(Path(place).glob("*.py")):
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                node.body = [part for part in node.body if not _is_text(part)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:8]


def _is_text(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


def digest_of(*arrays: NDArray[Any]) -> str:
    """16 hexadecimal digits of a sha256."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
