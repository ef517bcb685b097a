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

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Vector = npt.NDArray[np.float64]


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


def spread(values: Sequence[float], form: str, infinite: str = "never") -> str:
    """Return a median, and the least and the most; a word in place of what is infinite."""
    middle, least, most = (
        f"{value:{form}}" if math.isfinite(value) else infinite
        for value in (statistics.median(values), min(values), max(values))
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def middle_curve(
    curves: Sequence[tuple[Vector, Vector]], points: int = 40
) -> tuple[Vector, Vector]:
    """Return the median of curves at places that all of them reach, with straight lines between."""
    begin = max(across[0] for across, _ in curves)
    end = min(across[-1] for across, _ in curves)
    at = np.linspace(begin, max(begin, end), points)
    return at, np.median([np.interp(at, across, up) for across, up in curves], axis=0)


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
