"""How the study's numbers are kept, tabulated and drawn.

Guarantees: the same runs give the same bytes; a value that is not finite is said to be none.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file, one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def short(value: float | None) -> float | None:
    """Return a number as logs keep it, in four digits; what is not finite is none."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.4g}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for cells in (header, *rows):
        lines += [f"   {'  -' if place else '* -'} {cell}" for place, cell in enumerate(cells)]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], form: str) -> str:
    """Return a median, and the least and the most; ``never`` if not one is finite."""
    if len(set(values)) == 1 and math.isfinite(values[0]):
        return f"{values[0]:{form}}"
    said = [
        f"{value:{form}}" if math.isfinite(value) else "never"
        for value in (statistics.median(values), min(values), max(values))
    ]
    return "never" if said[1] == "never" else f"{said[0]} ({said[1]} to {said[2]})"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, with text as text, and without a date."""
    import matplotlib as mpl
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,g}" if super().__call__(x, pos) else ""

    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        for axis in (panel.xaxis, panel.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(Plain())
                # Other ticks than powers of ten have numbers where there are few of these.
                axis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.6)))
    with mpl.rc_context({"svg.hashsalt": "cabs", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
