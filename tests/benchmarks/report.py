"""The tables and figures of the documentation, out of what the benchmarks have written.

    python tests/benchmarks/report.py FOLDER

FOLDER holds a JSON file of each benchmark that was run; what is drawn and tabulated from it is
written beside it. No number in the documentation's tables has another source.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]

OURS = {
    "torch": ":func:`cabs_torch.backward`",
    "jax": ":func:`cabs_jax.value_and_grad`",
    "tensorflow": ":class:`cabs_tensorflow.GradientTape`",
}
# What else than Python and NumPy the numbers of a framework can depend on.
VERSIONS = {
    "torch": ("torch", "backpack-for-pytorch", "opacus", "cockpit-for-pytorch"),
    "jax": ("jax", "jaxlib", "jax-privacy"),
    "tensorflow": ("tensorflow", "keras"),
    "collectives": ("torch", "jax", "jaxlib", "tensorflow"),
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (header, *rows):
        starts = ("   * -", *("     -" for _ in row[1:]))
        lines += [f"{start} {cell}".rstrip() for start, cell in zip(starts, row, strict=True)]
    return "\n".join(lines) + "\n"


def framework_of(result: Result) -> str:
    """Return the framework in which a benchmark runs, or what stands for all of them."""
    return next((name for name in VERSIONS if name in result["benchmark"]), "torch")


def conditions(result: Result) -> str:
    """Return what the numbers depend on, in a sentence."""
    machine = result["machine"]
    wanted = ("python", "cabs-batch-size", "numpy", *VERSIONS[framework_of(result)])
    known = {name: number for name, number in result["versions"].items() if name in wanted}
    versions = ", ".join(f"{name} {number}" for name, number in known.items())
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    on = f"{machine['processor']}, {machine['cores']} cores, {machine['memory in GiB']} GiB"
    if result.get("device", "cpu") != "cpu":
        on = f"{result['device']}, {on}"
    return f"Measured on {result['date']}: {on}; {machine['system']}; {threads}; {versions}.\n"


def spread(found: Result) -> str:
    """Return a median and its quartiles."""
    return f"{found['median']:.2f} ({found['lower']:.2f} to {found['upper']:.2f})"


def time_and_memory(found: Result) -> str:
    """Return what a step took, on against off."""
    return f"{spread(found['on : off'])}; {found['memory, on : off']:.2f}"


def of_steps(result: Result) -> str:
    """Tabulate what statistics add to a step."""
    rows = []
    labels = list(next(iter(result["networks"].values())))
    labels = [label for label in labels if label != "relative error"]
    for network, found in result["networks"].items():
        rows.append([network, *(time_and_memory(found[label]) for label in labels)])
    return table(["network", *(f"{label}: time; memory" for label in labels)], rows)


def of_peers(result: Result) -> str:
    """Tabulate what others take beside us, and our overhead as a part of the best one's."""
    networks = result["networks"]
    rows, names = [], list(next(iter(networks.values())))
    for label in names:
        cells = []
        for found in networks.values():
            one = found[label]
            cells.append("refused" if "refused" in one else time_and_memory(one))
        rows.append([OURS[framework_of(result)] if label == "cabs" else label, *cells])
    parts = [part_of_best(found) for found in networks.values()]
    rows.append(["**our overhead, of the best other's**", *parts])
    return table(["time; memory", *networks], rows)


def part_of_best(found: Result) -> str:
    """Return our overhead as a part of that of the best of the others."""
    medians = {
        label: one["on : off"]["median"] for label, one in found.items() if "refused" not in one
    }
    ours = medians.pop("cabs")
    best = min(medians.values(), default=None)
    if best is None:
        return "no other does it"
    return "others cost nothing" if best <= 1.0 else f"{max(ours - 1.0, 0.0) / (best - 1.0):.2f}"


def of_rows(result: Result) -> str:
    """Tabulate measurements that have a unit each."""
    rows = [
        [name, f"{one['median']:.3g} ({one['lower']:.3g} to {one['upper']:.3g})", one["unit"]]
        for name, one in result["rows"].items()
    ]
    return table(["", "median (quartiles)", "unit"], rows)


def of_loader(result: Result) -> str:
    """Tabulate what feeding changing sizes costs."""
    rows = []
    for name, one in result["rows"].items():
        rate = one["examples a second, torch"]["median"]
        ratios = [one["time, against torch"], one["time without reseeding, against torch"]]
        rows.append([name, f"{rate:.3g}", *map(spread, ratios)])
    header = ["dataset", "``DataLoader``, examples a second", "time, of its", "``reseed=False``"]
    return table(header, rows)


def of_growth(result: Result) -> str:
    """Tabulate how the cost of a step grows."""
    rows = []
    for name, axis in result["axes"].items():
        first, last = axis["sizes"][0], axis["sizes"][-1]
        ends = [f"{one['on : off']['median']:.2f}" for one in (first, last)]
        bounds = f"{first['size']:,} to {last['size']:,}"
        exponents = [f"{axis['exponents'][label]:.2f}" for label in ("off", "on")]
        rows.append([name, bounds, *exponents, " to ".join(ends)])
    header = ["what grows", "from, to", "exponent, off", "exponent, on", "on : off, at the ends"]
    return table(header, rows)


def draw_peers(result: Result, path: Path) -> None:
    """Draw the time of a step with each, of a plain step's, a panel for each network."""
    from matplotlib.figure import Figure

    networks = result["networks"]
    labels = list(next(iter(networks.values())))[::-1]
    figure = Figure(figsize=(9.0, 0.9 + 0.28 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True)
    for panel, (network, found) in zip(panels, networks.items(), strict=True):
        for place, label in enumerate(labels):
            colour = "C1" if label == "cabs" else "0.45"
            one = found[label]
            if "refused" in one:
                panel.text(1.0, place, " refused", va="center", fontsize=7, color="0.6")
                continue
            middle, low, high = (one["on : off"][key] for key in ("median", "lower", "upper"))
            panel.plot([low, high], [place, place], color=colour, linewidth=1)
            panel.plot([middle], [place], "o", color=colour, markersize=5)
            panel.annotate(
                f"{middle:.3g}",
                (high, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=colour,
            )
        panel.axvline(1.0, color="0.85", linewidth=1, zorder=0)
        panel.set_xscale("log")
        panel.set_xlim(0.9, 1.8 * max(panel.get_xlim()[1], 2.0))
        panel.set_xticks([1, 10, 100], ["1", "10", "100"])
        panel.minorticks_off()
        panel.set_title(network, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    figure.supxlabel("time of a step, of a plain one's", fontsize=9)
    save(figure, path)


def draw_growth(result: Result, path: Path) -> None:
    """Draw the time of a step over what grows, with statistics and without."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 2.8), layout="constrained")
    panels = figure.subplots(1, len(result["axes"]))
    for panel, (name, axis) in zip(panels, result["axes"].items(), strict=True):
        sizes = [one["size"] for one in axis["sizes"]]
        off = [one["milliseconds off"] for one in axis["sizes"]]
        on = [a * one["on : off"]["median"] for a, one in zip(off, axis["sizes"], strict=True)]
        panel.loglog(sizes, off, "o-", color="0.45", markersize=3, label="plain step")
        panel.loglog(sizes, on, "o-", color="C1", markersize=3, label="with statistics")
        panel.set_xlabel(name.split(",")[0], fontsize=8)
        panel.set_title(name.partition(", ")[2], fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds", fontsize=8)
    panels[0].legend(frameon=False, fontsize=7)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure that depends on what it shows alone."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "cabs", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def of_gpu(result: Result) -> str:
    """Tabulate both for PyTorch on a GPU."""
    peers = {"benchmark": result["benchmark"], "networks": result["peers"]}
    return of_steps(result) + "\n" + of_peers(peers)


def of_kernels(result: Result) -> str:
    """Tabulate what statistics add to what a GPU is given to do."""
    rows = [
        [name, *(f"{one[key]:.3g}" for key in ("parameters", "plain", "added a parameter"))]
        for name, one in result["networks"].items()
    ]
    return table(["network", "parameters", "kernels of a plain step", "added a parameter"], rows)


def of_collectives(result: Result) -> str:
    """Tabulate what statistics add to what devices send each other."""
    keys = "plain", "added", "numbers added", "more in the first step"
    rows = [[name, *(f"{one[key]:,}" for key in keys)] for name, one in result["steps"].items()]
    header = ["step", "collectives of a plain one", "added", "numbers in them", "more at first"]
    return table(header, rows)


def of_checks(result: Result) -> str:
    """Tabulate what was checked."""
    known = ("benchmark", "date", "machine", "threads", "versions", "device")
    rows = [[name, str(found)] for name, found in result.items() if name not in known]
    return table(["checked", "found"], rows)


TABLES: dict[str, Callable[[Result], str]] = {
    "collectives": of_collectives,
    "core": of_rows,
    "gpu_feeding": of_checks,
    "gpu_jax": of_steps,
    "gpu_torch": of_gpu,
    "loader_torch": of_loader,
    "growth": of_growth,
    "kernels": of_kernels,
    "steps": of_steps,
    "peers": of_peers,
}
FIGURES: dict[str, Callable[[Result, Path], None]] = {"growth": draw_growth, "peers": draw_peers}


def results(folder: Path) -> Iterator[tuple[str, Result]]:
    """Yield the name and the result of each benchmark that was run."""
    for path in sorted(folder.glob("*.json")):
        yield path.stem, {"benchmark": path.stem, **json.loads(path.read_text(encoding="utf-8"))}


def text(name: str, result: Result) -> str:
    """Return the table of a benchmark, and what it depends on."""
    tabulate = next(make for start, make in TABLES.items() if name.startswith(start))
    return tabulate(result) + "\n" + conditions(result)


def main() -> None:
    """Write tables and figures."""
    folder = Path(sys.argv[1])
    for name, result in results(folder):
        (folder / f"{name}.inc").write_text(text(name, result), encoding="utf-8")
        for start, draw in FIGURES.items():
            if name.startswith(start):
                draw(result, folder / f"{name}.svg")


if __name__ == "__main__":
    main()
