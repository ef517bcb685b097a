"""Writes the tables and figures of the convex problems out of their runs, without training.

Guarantees: the same runs give the same bytes; what did not reach a norm within its budget is said
to be never there, and what was not installed is said to be missing; of rates that are chosen, those
at an end of what was tried are marked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convex_problems import FEATURES, QUADRATICS, Quadratic
from pages import Vector, middle_curve, read, save, spread, table

Run = dict[str, Any]
# For each method and rate, in the order in which they were run, one run for each seed.
Runs = dict[tuple[str, float], list[Run]]

# The norm at which the rates of a quadratic are compared, and that whose best rate is drawn.
COMPARED, DRAWN = "0.1", "0.01"
STALLED = "isotropic, floor 1"
DRAWN_METHODS = {
    "full gradient": "0.8",
    "constant 8": "0.6",
    "constant 128": "0.3",
    "norm test, 0.5": "C2",
    "norm test, 0.9": "C8",
    "MICE": "C4",
    "CABS": "C1",
    "CABS, known floor": "C3",
}
DRAWN_RATES = (0.1, 1.0)


def write(folder: Path) -> None:
    """Write what there is to say of convex.jsonl into the same folder; nothing without it."""
    path = folder / "convex.jsonl"
    if not path.exists():
        return
    found = runs_of(read(path))
    for name, runs in found.items():
        stem = f"convex-{name.replace(',', '').replace(' ', '-').lower()}"
        tabulate = {STALLED: of_stall}.get(name, of_norms if name in FEATURES else of_rates)
        (folder / f"{stem}.inc").write_text(tabulate(runs), encoding="utf-8")
    known = {name: runs for name, runs in found.items() if name in QUADRATICS and name != STALLED}
    if known:
        (folder / "convex-optimum.inc").write_text(of_optimum(known), encoding="utf-8")
        draw_sizes(known, folder / "convex-optimum.svg")
    finite = {name: found[name] for name in FEATURES if name in found}
    if finite:
        draw_norms(finite, folder / "convex-norms.svg")


def runs_of(lines: Sequence[Run]) -> dict[str, Runs]:
    """Return the runs of each problem with its largest budget; of equal settings the last."""
    budgets: dict[str, int] = {}
    for one in lines:
        budgets[one["problem"]] = max(one["budget"], budgets.get(one["problem"], 0))
    last = {
        (one["problem"], one["method"], one["rate"], one["seed"]): one
        for one in lines
        if one["budget"] == budgets[one["problem"]]
    }
    found: dict[str, Runs] = {}
    for (name, method, rate, _), one in last.items():
        found.setdefault(name, {}).setdefault((method, rate), []).append(one)
    return found


def of_norms(runs: Runs) -> str:
    """Tabulate the evaluations to each norm, at the rate that is best for it."""
    norms, rates = _norms(runs), _rates(runs)
    rows = []
    for method in _methods(runs):
        if not _is_there(runs, method):
            rows.append([method, *("not installed" for _ in norms)])
            continue
        cells = []
        for norm in norms:
            rate = best_rate(runs, method, norm)
            said = spread(_thousands(runs[method, rate], norm), ".3g")
            chosen = f"{rate:g}{_end(rate, rates)}"
            cells.append(said if said == "never" else f"{chosen}: {said}")
        rows.append([method, *cells])
    return table(["method", *(f"η L: thousands to {norm}" for norm in norms)], rows)


def of_rates(runs: Runs) -> str:
    """Tabulate the evaluations to one norm, at every rate; the best is in bold."""
    rates = _rates(runs)
    rows = []
    for method in _methods(runs):
        if not _is_there(runs, method):
            rows.append([method, *("not installed" for _ in rates)])
            continue
        best = best_rate(runs, method, COMPARED)
        cells = []
        for rate in rates:
            some = runs.get((method, rate), [])
            said = spread(_thousands(some, COMPARED), ".3g") if some else ""
            is_best = rate == best and not said.startswith("never")
            cells.append(f"**{said}**{_end(rate, rates)}" if is_best else said)
        rows.append([method, *cells])
    return table(["method", *(f"η L = {rate:g}" for rate in rates)], rows)


def of_optimum(found: dict[str, Runs]) -> str:
    """Tabulate how many times the exact optimum the rule and the bound ask for, on CABS's way."""
    rows = []
    for name, runs in found.items():
        for (method, rate), some in runs.items():
            if method != "CABS":
                continue
            told = [_told(one) for one in some]
            cells = [
                spread([round(ends[place][kind] / ends[place][2], 2) for ends in told], ".2f")
                for kind in (0, 1)
                for place in (0, -1)
            ]
            rows.append([name, f"{rate:g}", *cells])
    names = ("rule", "bound's optimum")
    header = [f"{kind}, {place}" for kind in names for place in ("at the start", "at the end")]
    return table(["quadratic", "η L", *header], rows)


def of_stall(runs: Runs) -> str:
    """Tabulate by how much the loss stays above its floor, and what theory has for it."""
    quadratic = QUADRATICS[STALLED]()
    rows = []
    for (method, rate), some in runs.items():
        expected = expected_excess(quadratic, method, rate)
        said = "" if expected is None else f"{expected:.3g}"
        sizes = spread([one["curve"][-1][2] for one in some], ".0f")
        excess = spread([_excess(one) for one in some], ".3g", "diverged")
        rows.append([method, f"{rate:g}", said, excess, sizes])
    return table(["method", "η L", "expected excess", "excess", "size at the end"], rows)


def expected_excess(quadratic: Quadratic, method: str, rate: float) -> float | None:
    """Return where the loss of an isotropic quadratic comes to rest above its floor, or None.

    A constant size m keeps it at lr tr / (2 m (2 - lr L)); CABS puts m = lr tr / F.
    """
    if method == "CABS":
        return quadratic.floor / (3.0 - 2.0 * rate)
    if method == "constant 16":
        trace = float(quadratic.variances.sum())
        return rate / quadratic.curvature * trace / (2.0 * 16.0 * (2.0 - rate))
    return None


def best_rate(runs: Runs, method: str, norm: str) -> float:
    """Return the rate with which a method needs the fewest evaluations to a norm, by the median.

    Of rates that never reach it, the one that comes closest in the end.
    """
    rates = [rate for name, rate in runs if name == method]

    def order(rate: float) -> tuple[float, float]:
        some = runs[method, rate]
        # A norm that overflowed was kept as none.
        ends = [math.inf if one["curve"][-1][1] is None else one["curve"][-1][1] for one in some]
        return statistics.median(_thousands(some, norm)), statistics.median(ends)

    return min(rates, key=order)


def middle_curves(some: Sequence[Run]) -> tuple[Vector, Vector, Vector]:
    """Return evaluations, and medians over seeds of norm and batch size, to where the first ends.

    Between the points of a run the logarithms are straight lines.
    """
    points = [[point for point in one["curve"][1:] if None not in point] for one in some]
    logarithms = [np.log(np.array(kept, dtype=float)).T for kept in points]
    at, norms = middle_curve([(across, norms) for across, norms, _ in logarithms])
    _, sizes = middle_curve([(across, sizes) for across, _, sizes in logarithms])
    return np.exp(at), np.exp(norms), np.exp(sizes)


def draw_norms(found: dict[str, Runs], path: Path) -> None:
    """Draw norms and batch sizes over evaluations, at the best rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, sharex="col", sharey="row")
    for column, (name, runs) in zip(panels.T, found.items(), strict=True):
        for method, colour in DRAWN_METHODS.items():
            if method not in _methods(runs) or not _is_there(runs, method):
                continue
            rate = best_rate(runs, method, DRAWN)
            evaluations, norms, sizes = middle_curves(runs[method, rate])
            width = 2.0 if method.startswith("CABS") else 1.2
            style = {"color": colour, "linewidth": width, "label": method}
            column[0].loglog(evaluations, norms, **style)
            column[1].loglog(evaluations, sizes, **style)
        column[0].set_title(name, fontsize=10)
        column[1].set_xlabel("gradient evaluations")
        column[0].axhline(float(DRAWN), color="0.9", linewidth=1, zorder=0)
    panels[0, 0].set_ylabel("norm of the full gradient")
    panels[1, 0].set_ylabel("batch size")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def draw_sizes(found: dict[str, Runs], path: Path) -> None:
    """Draw what the three rules ask for on CABS's way, and what its controller chose."""
    from matplotlib.figure import Figure

    rates = [rate for rate in DRAWN_RATES if any(("CABS", rate) in runs for runs in found.values())]
    if not rates:
        return
    figure = Figure(figsize=(9.0, 0.7 + 2.5 * len(rates)), layout="constrained")
    panels = figure.subplots(len(rates), len(found), squeeze=False, sharex=True, sharey="row")
    kinds = (("rule", "C1"), ("bound's optimum", "C0"), ("exact optimum", "0.2"))
    for row, rate in zip(panels, rates, strict=True):
        for panel, (name, runs) in zip(row, found.items(), strict=True):
            panel.set_title(f"{name}, η L = {rate:g}", fontsize=9)
            if ("CABS", rate) not in runs:
                continue
            one = runs["CABS", rate][0]
            evaluations = [point[0] for point in one["curve"]][1:]
            for place, (kind, colour) in enumerate(kinds):
                asked = [point[place] or math.nan for point in one["sizes"]]
                style = "--" if place == 2 else "-"
                panel.loglog(evaluations, asked[1:], style, color=colour, linewidth=1.5, label=kind)
            chosen = [point[2] for point in one["curve"]][1:]
            panel.loglog(evaluations, chosen, ".", color="C1", markersize=5, label="chosen")
        row[0].set_ylabel("batch size")
    for panel in panels[-1]:
        panel.set_xlabel("gradient evaluations")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def _methods(runs: Runs) -> list[str]:
    return list(dict.fromkeys(method for method, _ in runs))


def _norms(runs: Runs) -> list[str]:
    return list(next(one["reached"] for some in runs.values() for one in some if "reached" in one))


def _rates(runs: Runs) -> list[float]:
    return sorted({rate for _, rate in runs})


def _end(rate: float, rates: Sequence[float]) -> str:
    """Return a mark for a chosen rate beyond which none was tried."""
    if len(rates) < 2 or rate not in (rates[0], rates[-1]):
        return ""
    return ", lowest" if rate == rates[0] else ", highest"


def _is_there(runs: Runs, method: str) -> bool:
    return all(
        "reached" in one for (name, _), some in runs.items() if name == method for one in some
    )


def _thousands(some: Sequence[Run], norm: str) -> list[float]:
    reached = [one["reached"][norm] for one in some]
    return [math.inf if at is None else at / 1000.0 for at in reached]


def _told(one: Run) -> list[list[float]]:
    """Return the sizes that were finite."""
    return [point for point in one["sizes"] if None not in point]


def _excess(one: Run) -> float:
    return math.inf if one["late_excess"] is None else float(one["late_excess"])
