"""The report of an evaluation, from its records alone: `report.md` with pictures, and a self-contained `report.html`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.metrics import roc_curve

from hardening.files import write_atomically
from hardening.measure.baselines import BASELINES
from hardening.measure.knowing import HEAD_AWARE
from hardening.measure.oblivious import ATTACKS, FLOOR, NOISE, OBLIVIOUS
from hardening.measure.records import CLEAN, Record, mean_and_spread
from hardening.measure.rivals import FORWARDS, OWN_FORWARDS
from hardening.measure.sizes import SIZES
from hardening.measure.suite import BUDGETS, LESS_EFFORT, NEIGHBOURS, RETURNED
from hardening.measure.tasks import GUARDED, SYSTEMS, UNDEFENDED

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_SHOWN = ("#2a6f97", "#c1121f", "#f4a261", "#6a994e", "#7b2cbf", "#8a8a8a", "#bc6c25", "#219ebc", "#ff006e", "#283618")
_TARGET_RATIO, _TARGET_AUROC, _TARGET_TPR = 0.9, 0.99, {"0.001": 0.8, "0.01": 0.95}
_LEVEL = 1e-9
"""Means that are this near are the same but for the order in which they were summed."""
_AVERAGE = "three branches, plain average"
_FAMILIES = {
    "PGD": ("pgd", "targeted"),
    "UAP": ("uap",),
    "AdvEncoder": ("per", "pat"),
    "PAP": ("pap-base", "pap-fuse", "pap-ugs"),
    "SSP": ("ssp",),
}
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#1d2733}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .7rem;border-bottom:1px solid #d8dee4;text-align:right}td{white-space:nowrap}th{vertical-align:bottom}
th:first-child,td:first-child{text-align:left}th{background:#f3f6f8}img{max-width:100%}.miss{color:#b00020}
"""


class _Numbers:
    """Records by what they say, averaged over runs (bundles of other seeds, and attack seeds)."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self._by: dict[tuple[str, str, str, str, float], list[Record]] = {}
        for r in self.records:
            self._by.setdefault((r.metric, r.subject, r.task, r.attack, r.epsilon), []).append(r)
        self.tasks = list(dict.fromkeys(r.task for r in self.records))
        self.attacks = sorted({r.attack for r in self.records if r.epsilon}, key=_order)
        self.epsilons = sorted({r.epsilon for r in self.records if r.epsilon})
        subjects = {r.subject for r in self.records}
        self.baselines = [system for system in BASELINES.values() if system in subjects]
        self.systems = [*SYSTEMS, *self.baselines]

    def values(self, metric: str, subject: str, task: str, attack: str, epsilon: float = 0.0) -> list[float]:
        found = self._by.get((metric, subject, task, attack, epsilon), [])
        return [r.value for r in found if not isinstance(r.value, list)]

    def images(self, metric: str, subject: str, task: str, attack: str, epsilon: float = 0.0) -> int:
        """How many one run measured; the fewest, where runs differ."""
        return min(r.images for r in self._by[metric, subject, task, attack, epsilon])

    def lists(self, metric: str, task: str, attack: str, epsilon: float = 0.0) -> list[float]:
        found = self._by.get((metric, "detector", task, attack, epsilon), [])
        return [value for r in found if isinstance(r.value, list) for value in r.value]

    def cell(self, metric: str, subject: str, task: str, attack: str, epsilon: float = 0.0, *, scale: float = 100) -> str:
        return _cell(self.values(metric, subject, task, attack, epsilon), scale)


def _cell(values: list[float], scale: float = 100) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    digits = 1 if scale == 100 else 3
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if len(values) > 1 else "")


def _order(attack: str) -> tuple[int, str]:
    return (ATTACKS.index(attack) if attack in ATTACKS else len(ATTACKS), attack)


class _Page:
    """Headings, paragraphs, tables and figures, written as Markdown and as HTML alike."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.markdown: list[str] = []
        self.html: list[str] = []

    def heading(self, level: int, text: str) -> None:
        self.markdown.append(f"{'#' * level} {text}")
        self.html.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        self.markdown.append(text)
        self.html.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if not rows:
            return
        lines = [header, ["---"] * len(header), *rows]
        self.markdown.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self.html.append(f"<table><tr>{head}</tr>{body}</table>")

    def picture(self, name: str, content: bytes, caption: str) -> None:
        write_atomically(self._out / name, content)
        self.markdown.append(f"![{caption}]({name})")
        data = base64.b64encode(content).decode("ascii")
        self.html.append(f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">')
        self.html.append(f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def write_report(records: Sequence[Record], out: Path) -> Path:
    """Render records into `out`; returns the HTML page. Examples are the PNG files of `out/examples`, if there are any."""
    numbers, page = _Numbers(records), _Page(out)
    _origin(numbers, page)
    _accuracy(numbers, page)
    _strength(numbers, page)
    _persistence(numbers, page)
    _defences(numbers, page)
    _detection(numbers, page)
    _rivals(numbers, page)
    _quiet(numbers, page)
    _convergence(numbers, page)
    _knowing(numbers, page)
    _embedding(numbers, page)
    _plots(numbers, page)
    for file in sorted((out / "examples").rglob("*.png")) if (out / "examples").is_dir() else []:
        task, attack = file.parent.name, file.stem
        page.picture(f"example-{task}-{attack}.png", file.read_bytes(), f"{task}, {attack}: clean, attacked, difference x 10")
    write_atomically(out / "report.md", ("\n\n".join(page.markdown) + "\n").encode())
    document = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Twogate: evaluation</title><style>{_STYLE}</style><body>" + "\n".join(page.html) + "</body></html>\n"
    )
    write_atomically(out / "report.html", document.encode())
    return out / "report.html"


def _origin(numbers: _Numbers, page: _Page) -> None:
    page.heading(1, "Evaluation")
    bundles = list(dict.fromkeys((r.bundle, r.digest[:12], r.size, r.commit) for r in numbers.records))
    page.text(
        "Every number is a record in records/; a plus or minus is the standard deviation over runs (bundles of other seeds "
        "and attack seeds). Attacked images are clipped and rounded to 8 bits. Budgets of attacks are L-infinity, in 1/255."
    )
    page.table(["bundle", "digest", "size", "commit"], [list(row) for row in bundles])
    for command in dict.fromkeys(r.command for r in numbers.records if r.command):
        page.text(f"Measured by: {command}")


def _accuracy(numbers: _Numbers, page: _Page) -> None:
    page.heading(2, "Zero sacrifice: clean_acc of task heads, %")
    page.text(f"Target: {GUARDED} at least as good as the {UNDEFENDED} on every task.")
    rows = [
        [system, *(numbers.cell("clean_acc", system, task, CLEAN) for task in numbers.tasks)] for system in numbers.systems
    ]
    verdict = []
    for task in numbers.tasks:
        ours, theirs = (numbers.values("clean_acc", s, task, CLEAN) for s in (GUARDED, UNDEFENDED))
        verdict.append(_verdict(mean_and_spread(ours)[0] - mean_and_spread(theirs)[0], 0.0) if ours and theirs else "-")
    page.table(["system", *numbers.tasks], [*rows, ["target", *verdict]])


def _verdict(value: float, least: float, *, scale: float = 100) -> str:
    """A tie is met; what rounds to nothing is not said to be missed by nothing."""
    if value >= least - _LEVEL:
        return "met"
    digits = 1 if scale == 100 else 3
    missing, smallest = scale * (least - value), 10.0**-digits
    return f"missed by {missing:.{digits}f}" if missing >= smallest / 2 else f"missed by less than {smallest:g}"


def _strength(numbers: _Numbers, page: _Page) -> None:
    rows = []
    for task in numbers.tasks:
        for attack in (a for a in numbers.attacks if a in FLOOR):
            for epsilon in numbers.epsilons:
                key = (UNDEFENDED, task, attack, epsilon)
                rates = numbers.values("fooling_rate", *key)
                if not rates:
                    continue
                noise = numbers.values("fooling_rate", UNDEFENDED, task, NOISE, epsilon)
                rate = mean_and_spread(rates)[0]
                # What random signs do as well is no attack, whatever its rate.
                weak = rate < FLOOR[attack] - _LEVEL or (noise and rate <= mean_and_spread(noise)[0])
                rows.append(
                    [
                        task,
                        attack,
                        f"{epsilon:g}",
                        _cell(rates),
                        _cell(noise),
                        numbers.cell("clean_acc", UNDEFENDED, task, CLEAN),
                        numbers.cell("robust_acc", *key),
                        "weak here: its other rows prove little" if weak else "reached",
                    ]
                )
    if not rows:
        return
    page.heading(2, "Strength of the attacks: what they do to the undefended victim")
    page.text(
        "An attack that hardly troubles the undefended victim proves little of a defence that stands it. Floor: it changes "
        f"at least {100 * FLOOR['pgd']:g} % of the victim's answers where each image has an attack of its own, "
        f"{100 * FLOOR['uap']:g} % where one perturbation or patch is for all; and more than random signs of the same "
        "budget do, where these were measured."
    )
    header = ["task", "attack", "eps", "answers changed, %", "by noise, %", "victim's clean_acc, %", "victim's robust_acc, %"]
    page.table([*header, "floor"], rows)


def _persistence(numbers: _Numbers, page: _Page) -> None:
    page.heading(2, "Persistent robustness: robust_acc / clean_acc")
    page.text(f"Attacks made on the public victim alone. Target: at least {_TARGET_RATIO} for {GUARDED}, on every task.")
    for task in numbers.tasks:
        page.heading(3, task)
        header = ["attack", "eps", *numbers.systems, "target"]
        rows = []
        for attack in (a for a in numbers.attacks if a in ATTACKS):
            for epsilon in numbers.epsilons:
                cells = [numbers.cell("robust/clean", system, task, attack, epsilon, scale=1) for system in numbers.systems]
                ours = numbers.values("robust/clean", GUARDED, task, attack, epsilon)
                if ours:
                    rows.append([attack, f"{epsilon:g}", *cells, _verdict(mean_and_spread(ours)[0], _TARGET_RATIO)])
        page.table(header, rows)


def _defences(numbers: _Numbers, page: _Page) -> None:
    page.heading(2, "Beside other defences: robust_acc by attack family, %")
    if numbers.baselines:
        page.text(
            f"{', '.join(numbers.baselines)}: one encoder each, trained from the public victim on the first task's images, "
            "by the budget of the bundle's recipe, and a head for each task."
        )
    page.text(f"Mean over a family's attacks and budgets. Target: {GUARDED} above every other column.")
    beside = [_AVERAGE, *numbers.baselines]
    rows = []
    for task in numbers.tasks:
        for family, attacks in _FAMILIES.items():
            cells = [(a, e) for a in attacks for e in numbers.epsilons if numbers.values("robust_acc", GUARDED, task, a, e)]
            found = {
                system: [numbers.values("robust_acc", system, task, a, e) for a, e in cells] for system in [GUARDED, *beside]
            }
            # Means are compared over the same cells alone.
            means = {s: np.mean([np.mean(v) for v in values]) for s, values in found.items() if cells and all(values)}
            if GUARDED not in means or len(means) == 1:
                continue
            row = [f"{100 * means[s]:.1f}" if s in means else "-" for s in [GUARDED, *beside]]
            best = max((s for s in beside if s in means), key=lambda s: means[s])
            verdict = _verdict(float(means[GUARDED]), float(means[best]))
            if verdict != "met":
                verdict += f" ({best})"
            elif means[GUARDED] - means[best] <= _LEVEL:
                verdict = f"level with {best}"
            rows.append([task, family, *row, verdict if len(means) == len(found) else "-"])
    page.table(["task", "attacks", GUARDED, *beside, "target"], rows)


def _detection(numbers: _Numbers, page: _Page) -> None:
    page.heading(2, "Detection of attacks on the public victim")
    page.text(
        "Thresholds are fixed on clean images before any attack: the bundle's calibration as it ships, and recalibrated to "
        f"clean images of the task. Target: AUROC {_TARGET_AUROC}, which needs no threshold; "
        + ", ".join(f"{100 * least:g} % at {budget}" for budget, least in _TARGET_TPR.items())
        + ". On a domain that the bundle was not calibrated on, the recalibrated table is what its operator has, so that "
        "one is judged where it has the images for a budget, else the bundle's. Each verdict says which."
    )
    header = ["task", "attack", "eps", "AUROC", "flagged at 0.001, %", "at 0.01, %", "at 0.05, %", "of fooled, at 0.01, %"]
    header += ["recalibrated, at 0.001, %", "recalibrated, at 0.01, %", "target AUROC"]
    header += [f"target at {budget}" for budget in _TARGET_TPR]
    rows = []
    for task in numbers.tasks:
        for attack in (a for a in numbers.attacks if a in OBLIVIOUS):
            for epsilon in numbers.epsilons:
                key = (task, attack, epsilon)
                auroc = numbers.values("auroc", "detector", *key)
                if not auroc:
                    continue
                rows.append(
                    [
                        task,
                        attack,
                        f"{epsilon:g}",
                        _cell(auroc, scale=1),
                        *(numbers.cell(f"tpr@{b}", "bundle's calibration", *key) for b in ("0.001", "0.01", "0.05")),
                        numbers.cell("tpr_fooled@0.01", "bundle's calibration", *key),
                        *(numbers.cell(f"tpr@{b}", "recalibrated", *key) for b in ("0.001", "0.01")),
                        _verdict(mean_and_spread(auroc)[0], _TARGET_AUROC, scale=1),
                        *(_flagged_enough(numbers, budget, key) for budget in _TARGET_TPR),
                    ]
                )
    page.table(header, rows)


def _flagged_enough(numbers: _Numbers, budget: str, key: tuple[str, str, float]) -> str:
    """The verdict on what is flagged at a budget, and by which table."""
    for table in ("recalibrated", "bundle's calibration"):
        if found := numbers.values(f"tpr@{budget}", table, *key):
            return f"{_verdict(mean_and_spread(found)[0], _TARGET_TPR[budget])}, {table}"
    return "-"


def _rivals(numbers: _Numbers, page: _Page) -> None:
    found = [r for r in numbers.records if r.metric == "auroc" and r.subject != "detector"]
    if not found:
        return
    page.heading(2, "Other detectors on the same images: AUROC, and flagged at 0.05, %")
    page.text(
        "Each calibrated on clean images of the task. Encoder passes on top of an embedding: "
        + ", ".join(f"{name} {passes}" for name, passes in FORWARDS.items())
        + "; Mahalanobis and nearest neighbours one, the victim's; the paper's rule and the divergence of the branches none. "
        f"This detector: {OWN_FORWARDS}, and its sentinel, where it has one."
    )
    names = list(dict.fromkeys(r.subject for r in found))
    rows = []
    for task, attack, epsilon in dict.fromkeys((r.task, r.attack, r.epsilon) for r in found):
        key = (task, attack, epsilon)
        cells = [(numbers.cell("auroc", n, *key, scale=1), numbers.cell("tpr@0.05", n, *key)) for n in names]
        ours = (numbers.cell("auroc", "detector", *key, scale=1), numbers.cell("tpr@0.05", "recalibrated", *key))
        rows.append([task, attack, f"{epsilon:g}", *(f"{auroc}, {tpr}" for auroc, tpr in [ours, *cells])])
    page.table(["task", "attack", "eps", "this detector", *names], rows)


def _quiet(numbers: _Numbers, page: _Page) -> None:
    page.heading(2, "Quiet on honest change: clean images flagged, %")
    page.text("Target after recalibration to the domain: at most twice the budget.")
    conditions = [CLEAN, *dict.fromkeys(r.attack for r in numbers.records if r.attack.startswith("change: "))]
    for subject in ("bundle's calibration", "recalibrated"):
        page.heading(3, subject)
        header = ["images", *(f"{task}, at {b}" for task in numbers.tasks for b in ("0.01", "0.05"))]
        rows = [
            [
                condition.removeprefix("change: "),
                *(numbers.cell(f"fpr@{b}", subject, task, condition) for task in numbers.tasks for b in ("0.01", "0.05")),
            ]
            for condition in conditions
        ]
        page.table(header, rows)


def _knowing(numbers: _Numbers, page: _Page) -> None:
    boxed = [a for a in numbers.attacks if a not in ATTACKS]
    if not boxed:
        return
    page.heading(2, "Attackers who know the method")
    page.text(
        "Success: of the images that were classified right, those that are now wrong and not flagged (SR at that FPR). "
        "White box: everything known. Grey box: aimed at a bundle that the attacker made by the same code, without our "
        "weights. Targets at 0.05: grey box at most 20 %, white box below 50 %. Attacks that mind the flag aim at 0.05, "
        "where no @fpr says otherwise: what they reach at 0.01 is a lower bound. Two aim at something else: T6 moves the "
        "returned embedding without being flagged, and is read by the last column, where the class of the nearest clean "
        "images was right and is wrong, unflagged; T9 wants a flag on a picture whose class stays. Every attack: a picture "
        "counts where one of them succeeds within the budget, as for an attacker who tries them all; the patches of T10 "
        "have none, and are left out (older records do not say). Behind an @ stand the steps, where they are not those of "
        "the size."
    )
    header = ["task", "attack", "eps", "images", "robust_acc, %", "kNN accuracy, %", "AUROC", "flagged at 0.05, %"]
    header += ["success at 0.01, %", "success at 0.05, %", "neighbours' class, at 0.05, %"]
    rows = []
    for task in numbers.tasks:
        for attack in boxed:
            for epsilon in numbers.epsilons:
                key = (task, attack, epsilon)
                if not numbers.values("robust_acc", GUARDED, *key):
                    continue
                rows.append(
                    [
                        task,
                        attack,
                        f"{epsilon:g}",
                        str(numbers.images("robust_acc", GUARDED, *key)),
                        numbers.cell("robust_acc", GUARDED, *key),
                        numbers.cell("knn_acc", RETURNED, *key),
                        numbers.cell("auroc", "detector", *key, scale=1),
                        numbers.cell("tpr@0.05", "bundle's calibration", *key),
                        *(numbers.cell(f"success@{b}", "bundle's calibration", *key) for b in ("0.01", "0.05")),
                        numbers.cell("knn_success@0.05", "bundle's calibration", *key),
                    ]
                )
        for box in dict.fromkeys(attack.partition(" box ")[0] for attack in boxed):
            rows += _every_attack(numbers, task, f"{box} box ")
    page.table(header, rows)
    _defences_known(numbers, page)


def _defences_known(numbers: _Numbers, page: _Page) -> None:
    """Other defences, attacked as the bundle is by who knows everything."""
    rows = []
    for task in numbers.tasks:
        for epsilon in numbers.epsilons:
            for system in (GUARDED, *numbers.baselines):
                key = (system, task, f"white box {HEAD_AWARE}", epsilon)
                if numbers.values("robust_acc", *key):
                    cells = [numbers.cell(metric, *key) for metric in ("robust_acc", "fooling_rate")]
                    rows.append([task, system, f"{epsilon:g}", str(numbers.images("robust_acc", *key)), *cells])
    if any(row[1] in numbers.baselines for row in rows):
        page.text(f"Each defence under {HEAD_AWARE} aimed at itself, detectors aside:")
        page.table(["task", "defence", "eps", "images", "robust_acc, %", "fooling rate, %"], rows)


def _every_attack(numbers: _Numbers, task: str, box: str) -> list[list[str]]:
    """Rows of the worst case image by image over the attacks of one box, where there are several."""
    rows = []
    for epsilon in numbers.epsilons:
        cells, count = [], 0
        for budget in ("0.01", "0.05"):
            by_run: dict[tuple[str, int], list[list[float]]] = {}
            for record in numbers.records:
                there = (record.task, record.epsilon, record.subject) == (task, epsilon, "bundle's calibration")
                within = record.attack.startswith(box) and not record.attack.startswith(f"{box}T10")
                if there and record.metric == f"broken@{budget}" and within:
                    assert isinstance(record.value, list)
                    by_run.setdefault((record.bundle, record.seed), []).append(record.value)
            runs = [found for found in by_run.values() if len(found) > 1]
            cells.append(_cell([sum(map(max, zip(*found, strict=True))) / len(found[0]) for found in runs]))
            count = max((len(found[0]) for found in runs), default=count)
        if count:
            rows.append([task, f"{box}every attack", f"{epsilon:g}", str(count), "-", "-", "-", "-", *cells, "-"])
    return rows


def _convergence(numbers: _Numbers, page: _Page) -> None:
    epsilon, attacks = _converging(numbers)
    if not attacks:
        return
    page.heading(2, "Do the attacks converge? Fooling rate of the undefended victim, %")
    page.text(
        f"Each attack with a share of its steps or epochs; eps {epsilon:g}. Where the last doubling of the effort still "
        "brings much, a stronger attacker than the one measured is easy to have."
    )
    shares = (*LESS_EFFORT, 1)
    for task in numbers.tasks:

        def cells(attack: str, task: str = task) -> list[list[float]]:
            return [numbers.values(f"fooling_rate@effort {s:g}", UNDEFENDED, task, attack, epsilon) for s in shares]

        there = [attack for attack in attacks if all(cells(attack))]
        if not there:
            continue
        rows = [[a, *(f"{100 * mean_and_spread(v)[0]:.1f}" for v in cells(a))] for a in there]
        page.table([f"{task}: attack", *(f"effort {share:g}" for share in shares)], rows)

        def curves(axes: Axes, there: Sequence[str] = there, cells: Callable[[str], list[list[float]]] = cells) -> None:
            for colour, attack in zip(_SHOWN, there, strict=False):
                rates = [100 * mean_and_spread(values)[0] for values in cells(attack)]
                axes.plot(shares, rates, marker="o", markersize=3, color=colour, label=attack)
            axes.set_xscale("log", base=2)
            axes.set_xticks(shares, [f"{share:g}" for share in shares])
            axes.set_xlabel("share of the attack's steps or epochs")
            axes.set_ylabel("fooling rate of the undefended victim, %")
            axes.set_ylim(0, 100)

        title = f"Convergence: {task}, eps {epsilon:g}/255"
        page.picture(f"convergence-{task}.png", _plot(curves, title), title)


def _converging(numbers: _Numbers) -> tuple[float, list[str]]:
    """The budget at which convergence was measured (the smallest, if there are several), and the attacks."""
    found = [r for r in numbers.records if r.metric.startswith("fooling_rate@effort")]
    epsilon = min((r.epsilon for r in found), default=0.0)
    return epsilon, sorted({r.attack for r in found if r.epsilon == epsilon}, key=_order)


def _embedding(numbers: _Numbers, page: _Page) -> None:
    page.heading(2, "The returned embedding, %")
    page.text("Nearest neighbours among clean images. Target: attacked at least 0.90 of clean, for each attack above.")
    header = ["task", "attack", "eps", "knn_acc, returned", "knn_acc, undefended", "recall@10, returned"]
    header += ["recall@10, undefended"]
    rows = []
    for task in numbers.tasks:
        for attack, epsilon in [(CLEAN, 0.0), *((a, e) for a in numbers.attacks if a in ATTACKS for e in numbers.epsilons)]:
            cells = [
                numbers.cell(metric, subject, task, attack, epsilon)
                for metric in ("knn_acc", "recall@10")
                for subject in ("returned embedding", UNDEFENDED)
            ]
            if cells[0] != "-":
                rows.append([task, attack, f"{epsilon:g}" if epsilon else "", *cells])
    page.table(header, rows)


def _plots(numbers: _Numbers, page: _Page) -> None:
    page.heading(2, "Plots")
    for task in numbers.tasks:
        # The largest budget of this task: another may have been measured at more of them.
        budgets = [e for e in numbers.epsilons if any(numbers.lists("scores", task, a, e) for a in OBLIVIOUS)]
        epsilon = budgets[-1] if budgets else 0.0
        clean = numbers.lists("scores", task, CLEAN)
        attacked = {a: numbers.lists("scores", task, a, epsilon) for a in numbers.attacks if a in ATTACKS}
        attacked = {name: scores for name, scores in attacked.items() if scores}
        if not clean or not attacked:
            continue

        def curve(axes: Axes, task: str = task) -> None:
            names = [a for a in numbers.attacks if a in ATTACKS and a != NOISE]
            for colour, name in zip(_SHOWN, names, strict=False):
                for system, style in ((GUARDED, "-"), (UNDEFENDED, ":")):
                    points = [(0.0, numbers.values("clean_acc", system, task, CLEAN))]
                    points += [(e, numbers.values("robust_acc", system, task, name, e)) for e in numbers.epsilons]
                    drawn = [(e, 100 * mean_and_spread(v)[0]) for e, v in points if v]
                    label = name if system == GUARDED else None
                    axes.plot(*zip(*drawn, strict=True), style, marker="o", markersize=3, color=colour, label=label)
            axes.set_xlabel("eps, 1/255 (solid: defended; dotted: undefended)")
            axes.set_ylabel("accuracy, %")
            axes.set_ylim(0, 100)

        title = f"{task}, eps {epsilon:g}/255"
        roc, histogram = partial(_roc, clean, attacked), partial(_histogram, clean, attacked)
        page.picture(f"roc-{task}.png", _plot(roc, f"ROC: {title}"), f"ROC: {title}")
        page.picture(f"scores-{task}.png", _plot(histogram, f"Scores: {title}"), f"Scores: {title}")
        if numbers.values("clean_acc", GUARDED, task, CLEAN):
            page.picture(f"epsilon-{task}.png", _plot(curve, f"Budget and accuracy: {task}"), f"Budget and accuracy: {task}")


def card_sections(records: Sequence[Record], folder: Path, detector: str) -> str:
    """What a bundle's card shows of the only task and budget in `records`, as Markdown; the plots go into `folder`/report.

    `detector` is the name of the bundle's own.
    """
    numbers, page = _Numbers(records), _Page(folder)
    (task,), (epsilon,) = numbers.tasks, numbers.epsilons
    conditions = [(CLEAN, 0.0), *((attack, epsilon) for attack in numbers.attacks)]
    columns = [(metric, attack) for attack in numbers.attacks for metric in ("robust_acc", "fooling_rate")]
    attacks = [attack for attack in numbers.attacks if attack != NOISE]
    size, images = SIZES[records[0].size], next(r.images for r in records if r.metric == "scores")
    budgets = [b for b in BUDGETS if numbers.values(f"fpr@{b:g}", "bundle's calibration", task, CLEAN)]
    systems = [system for system in SYSTEMS if numbers.values("clean_acc", system, task, CLEAN)]

    page.heading(2, "What was measured")
    said = {
        NOISE: "random signs",
        "pgd": f"away from an image's own features, {size.pgd_steps} steps, best of {size.restarts} random starts",
        "uap": f"one perturbation for all images, {size.uap_epochs} epochs over at most {size.surrogate} tuning images",
    }
    what = (
        f"{images} test images; eps {epsilon:g}/255, L-infinity, made on the undefended public victim, clipped and rounded "
        "to 8 bits"
    )
    page.text("; ".join([what, *(f"{attack}: {said[attack]}" for attack in numbers.attacks if attack in said)]) + ".")
    if systems:
        page.heading(2, "Accuracy of task heads, %")
        rows = [
            [system, numbers.cell("clean_acc", system, task, CLEAN)]
            + [numbers.cell(metric, system, task, attack, epsilon) for metric, attack in columns]
            for system in systems
        ]
        page.table(["task head on", "clean_acc", *(f"{metric}, {attack}" for metric, attack in columns)], rows)
        page.heading(2, f"Embedding: accuracy of the {NEIGHBOURS} nearest neighbours, %")
        rows = [[s, *(numbers.cell("knn_acc", s, task, a, e) for a, e in conditions)] for s in (UNDEFENDED, RETURNED)]
        page.table(["embedding", *(a for a, _ in conditions)], rows)

    page.heading(2, "Detection")
    page.text("The thresholds were fixed on the calibration images before any attack was run.")
    rows = []
    for subject in dict.fromkeys(r.subject for r in records if r.metric == "auroc"):
        name, table = (detector, "bundle's calibration") if subject == "detector" else (subject, subject)
        for attack in attacks:
            found = [numbers.cell(f"tpr@{b:g}", table, task, attack, epsilon) for b in budgets]
            rows.append([name, attack, numbers.cell("auroc", subject, task, attack, epsilon, scale=1), *found])
    page.table(["detector", "attack", "AUROC", *(f"flagged at max_fpr {b:g}, %" for b in budgets)], rows)
    clean = numbers.lists("scores", task, CLEAN)
    scores = {attack: numbers.lists("scores", task, attack, epsilon) for attack in numbers.attacks}
    page.picture("report/scores.png", _plot(partial(_histogram, clean, scores), "Scores of test images"), "scores")
    scores.pop(NOISE, None)
    page.picture("report/roc.png", _plot(partial(_roc, clean, scores), "Attacks on the public victim"), "ROC")

    page.heading(2, "False alarms, %")
    page.text(f"Clean test images, as they are and after honest changes (made at the input's size). Detector: {detector}.")
    changes = dict.fromkeys(r.attack for r in records if r.metric.startswith("fpr@"))
    rows = [
        [c.removeprefix("change: "), *(numbers.cell(f"fpr@{b:g}", "bundle's calibration", task, c) for b in budgets)]
        for c in changes
    ]
    page.table(["images", *(f"flagged at max_fpr {b:g}" for b in budgets)], rows)
    return "\n\n".join(page.markdown)


def _roc(clean: list[float], attacked: dict[str, list[float]], axes: Axes) -> None:
    for colour, (name, scores) in zip(_SHOWN, attacked.items(), strict=False):
        truth = np.repeat([0, 1], [len(clean), len(scores)])
        fpr, tpr, _ = roc_curve(truth, np.concatenate([clean, scores]))
        axes.plot(np.maximum(fpr, 1e-4), tpr, color=colour, label=name)
    diagonal = np.logspace(-4, 0, 50)
    axes.plot(diagonal, diagonal, color="#bbbbbb", linewidth=1, label="coin")
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 1)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("false-positive rate on clean test images")
    axes.set_ylabel("attacked images flagged")


def _histogram(clean: list[float], attacked: dict[str, list[float]], axes: Axes) -> None:
    every = np.concatenate([clean, *attacked.values()])
    bins = np.linspace(every.min(), max(np.quantile(every, 0.95), every.min() + 1e-6), 50).tolist()
    shown = {CLEAN: clean, **attacked}
    for colour, (name, scores) in zip(_SHOWN, shown.items(), strict=False):
        axes.hist(np.clip(scores, bins[0], bins[-1]), bins=bins, density=True, histtype="step", color=colour, label=name)
    axes.set_xlabel("score, higher is more suspicious (the last bin holds the rest)")
    axes.set_ylabel("density")


def _plot(draw: Callable[[Axes], None], title: str) -> bytes:
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    draw(axes)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
