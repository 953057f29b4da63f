"""The model card and its plots, rendered from the records of a run and from nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from sklearn.metrics import roc_curve

from hardening.evaluate import ATTACKS, BUDGETS, CLEAN, NOISE, PGD, RETURNED, UAP, UNDEFENDED, Evaluation

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_COLOURS = {CLEAN: "#2a6f97", PGD: "#c1121f", UAP: "#f4a261", NOISE: "#8a8a8a"}


def write_report(folder: Path, evaluation: Evaluation, card: Mapping[str, Any]) -> None:
    """Write `card.md` and `report/` (metrics.json, plots) into a bundle in the making."""
    report = folder / "report"
    report.mkdir()
    (report / "metrics.json").write_text(json.dumps(evaluation.as_json(), indent=1) + "\n", encoding="utf-8")
    _save(_histogram(evaluation), report / "scores.png")
    _save(_roc(evaluation), report / "roc.png")
    (folder / "card.md").write_text(render_card(evaluation, card), encoding="utf-8")


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    plt.close(figure)
    path.write_bytes(buffer.getvalue())


def _histogram(evaluation: Evaluation) -> Figure:
    figure: Figure
    figure, axes = plt.subplots(figsize=(7, 3.6))
    # The tail of the score has no end; the last bin holds all that lies beyond.
    every = np.concatenate(list(evaluation.scores.values()))
    low, high = float(every.min()), float(np.quantile(every, 0.98))
    bins = np.linspace(low, max(high, low + 1e-6), 60)
    for name in (CLEAN, NOISE, *ATTACKS):
        values = np.clip(evaluation.scores[name], low, bins[-1])
        axes.hist(
            values, bins=bins.tolist(), density=True, histtype="stepfilled", alpha=0.45, color=_COLOURS[name], label=name
        )
    axes.set_xlabel("score (higher = more suspicious; the last bin holds the rest)")
    axes.set_ylabel("density")
    axes.set_title("Scores of test images, clean and attacked")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _roc(evaluation: Evaluation) -> Figure:
    figure: Figure
    figure, axes = plt.subplots(figsize=(4.6, 4.2))
    clean = evaluation.scores[CLEAN]
    for name in ATTACKS:
        attacked = evaluation.scores[name]
        truth = np.repeat([0, 1], [len(clean), len(attacked)])
        fpr, tpr, _ = roc_curve(truth, np.concatenate([clean, attacked]))
        axes.plot(np.maximum(fpr, 1e-4), tpr, color=_COLOURS[name], label=name)
    diagonal = np.logspace(-4, 0, 50)
    axes.plot(diagonal, diagonal, color="#bbbbbb", linewidth=1, label="coin")
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 1)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("false-positive rate on clean test images")
    axes.set_ylabel("attacked images flagged")
    axes.set_title("Detection of attacks on the public victim")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def render_card(evaluation: Evaluation, card: Mapping[str, Any]) -> str:
    """The model card as Markdown. `card` says what no measurement knows: see `pipeline`."""
    settings = evaluation.settings
    attack = (
        f"eps {settings['epsilon']:g}/255, L-infinity, made on the undefended public victim, clipped and rounded to 8 bits; "
        f"PGD: {settings['pgd_steps']} steps, best of {settings['pgd_restarts']} random starts per image; "
        "universal: one perturbation for "
        f"all images, {settings['uap_epochs']} epochs over the tuning images"
    )
    systems = list(dict.fromkeys(r.subject for r in evaluation.records if r.metric == "clean_acc"))
    # The bundle's own detector first.
    detectors = sorted(
        {r.subject for r in evaluation.records if r.metric == "auroc"}, key=lambda d: d != settings["detector"]
    )
    changes = [r.condition for r in evaluation.records if r.metric == "fpr@0.05" and r.subject == detectors[0]]
    budgets = [b for b in BUDGETS if evaluation.value(f"fpr@{b:g}", detectors[0], CLEAN) is not None]

    def percent(metric: str, subject: str, condition: str) -> str:
        value = evaluation.value(metric, subject, condition)
        return "-" if value is None else f"{100 * value:.1f}"

    parts = [f"# {card['name']}\n\n{card['description']}\n\n{card['facts']}"]
    if systems:
        rows = [
            [s, percent("clean_acc", s, CLEAN)]
            + [x for a in (NOISE, *ATTACKS) for x in (percent("robust_acc", s, a), percent("fooling_rate", s, a))]
            for s in systems
        ]
        header = ["task head on", "clean_acc"] + [
            x for a in (NOISE, *ATTACKS) for x in (f"robust_acc, {a}", f"fooling_rate, {a}")
        ]
        parts.append(f"## Accuracy of task heads, %\n\n{settings['images']} test images; {attack}.\n\n{_table(header, rows)}")
        rows = [[s, *(percent("knn_acc", s, c) for c in (CLEAN, NOISE, *ATTACKS))] for s in (UNDEFENDED, RETURNED)]
        parts.append(
            f"## Embedding: accuracy of the {settings['neighbours']} nearest neighbours, %\n\n"
            + _table(["embedding", CLEAN, NOISE, *ATTACKS], rows)
        )
    rows = []
    for d in detectors:
        for a in ATTACKS:
            auroc = evaluation.value("auroc", d, a)
            rows.append([d, a, f"{auroc:.3f}", *(percent(f"tpr@{b:g}", d, a) for b in budgets)])
    parts.append(
        "## Detection\n\nThe thresholds were fixed on the calibration images before any attack was run.\n\n"
        + _table(["detector", "attack", "AUROC", *(f"flagged at max_fpr {b:g}, %" for b in budgets)], rows)
        + "\n\n![scores](report/scores.png) ![ROC](report/roc.png)"
    )
    rows = [[c, *(percent(f"fpr@{b:g}", detectors[0], c) for b in budgets)] for c in changes]
    parts.append(
        "## False alarms, %\n\nClean test images, as they are and after honest changes (made at the input's size). "
        f"Detector: {detectors[0]}.\n\n" + _table(["images", *(f"flagged at max_fpr {b:g}" for b in budgets)], rows)
    )
    parts.append(f"## What it does not withstand\n\n{card['limits']}")
    parts.append(f"## How it was made\n\n{card['making']}")
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
