"""A picture of a run: the loss and the batch size over the examples seen.

Guarantees: draws what the log holds and nothing else. Needs Matplotlib, and imports it when it is
called.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from cabs.log import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    counted = all("examples" in numbers for numbers in run.measurements)
    steps = [float(decision.step) for decision in run.decisions]
    seen = (
        list(accumulate(numbers["examples"] for numbers in run.measurements)) if counted else steps
    )
    # The size that a step was to have is the one chosen at the step before; the last batch of an
    # epoch can be shorter.
    chosen = [run.start.batch_size, *(decision.batch_size for decision in run.decisions[:-1])]

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    losses, sizes = figure.subplots(2, sharex=True)
    observed = [decision.observation.loss for decision in run.decisions]
    losses.plot(seen, observed, ".", markersize=2, color="0.75", label="of each batch")
    pairs = zip(seen, run.decisions, strict=True)
    averaged = [(x, d.average_loss) for x, d in pairs if d.average_loss is not None]
    if averaged:
        losses.plot(*zip(*averaged, strict=True), color="C0", label="averaged")
    if not any(loss <= 0.0 for loss in observed):
        losses.set_yscale("log")
    losses.set_ylabel("loss")
    asked = [(x, d.raw) for x, d in zip(seen, run.decisions, strict=True) if d.raw is not None]
    if asked:
        sizes.plot(*zip(*asked, strict=True), color="0.75", label="asked for by the rule")
    sizes.step(seen, chosen, where="pre", color="C1", label="chosen")
    sizes.set_ylim(0.0, 1.15 * max(chosen))
    sizes.set_ylabel("batch size")
    sizes.set_xlabel("examples seen" if counted else "step")
    for panel in (losses, sizes):
        panel.legend(frameon=False, loc="best")
        panel.spines[["top", "right"]].set_visible(False)
    return figure
