"""A picture of a run: the loss and the batch size over the examples seen.

Guarantees: draws what the log holds and nothing else; what is not finite, or is more than an axis
can hold, is left out. Needs Matplotlib, and imports it when it is called.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

from cabs.runs.replay import Run, counted_examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Numbers beyond these, whose squares and sums overflow where axes are laid out, are not drawn.
_TINIEST, _HUGEST = 1e-100, 1e100
# To look for the emptiest place takes longer than all else where there are more decisions.
_MANY = 20_000


def plot_run(run: Run) -> Figure:
    """Draw a run.

    Args:
        run: What :func:`cabs.read_run` returned. Where the loop wrote ``examples``, the horizontal
            axis is the number of examples seen, elsewhere the step.

    Returns:
        A Matplotlib figure with two panels; save it with ``figure.savefig(path)``.

    Raises:
        ValueError: If the run holds no decision.
        ModuleNotFoundError: If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plotting needs Matplotlib: pip install 'cabs-batch-size[plot]'"
        ) from error
    if not run.decisions:
        raise ValueError("the run holds no decision to be drawn")
    counts = [count for count in map(counted_examples, run.measurements) if count is not None]
    counted = len(counts) == len(run.decisions)
    steps = [float(decision.step) for decision in run.decisions]
    seen = list(accumulate(map(float, counts))) if counted else steps
    # The size that a step was to have is the one chosen at the step before; the last batch of an
    # epoch can be shorter.
    chosen = [run.start.batch_size, *(decision.batch_size for decision in run.decisions[:-1])]

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    losses, sizes = figure.subplots(2, sharex=True)
    observed = [_drawn(decision.observation.loss) for decision in run.decisions]
    losses.plot(seen, observed, ".", markersize=2, color="0.75", label="of each batch")
    pairs = zip(seen, run.decisions, strict=True)
    averaged = [(x, _drawn(d.average_loss)) for x, d in pairs if d.average_loss is not None]
    if averaged:
        losses.plot(*zip(*averaged, strict=True), color="C0", label="averaged")
    if not any(loss <= 0.0 for loss in observed):
        losses.set_yscale("log")
    losses.set_ylabel("loss")
    asked = [
        (x, _drawn(d.raw)) for x, d in zip(seen, run.decisions, strict=True) if d.raw is not None
    ]
    if asked:
        sizes.plot(*zip(*asked, strict=True), color="0.75", label="asked for by the rule")
    sizes.step(seen, chosen, where="pre", color="C1", label="chosen")
    sizes.set_ylim(0.0, 1.15 * max(chosen))
    sizes.set_ylabel("batch size")
    sizes.set_xlabel("examples seen" if counted else "step")
    for panel in (losses, sizes):
        panel.legend(frameon=False, loc="best" if len(seen) < _MANY else "upper right")
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _drawn(value: float) -> float:
    return value if value == 0.0 or _TINIEST < abs(value) < _HUGEST else math.nan
