"""The rule for the least time: what a step costs against what noise costs.

Guarantees: the size minimises the loss that is left after a given time, under the power law that
:doc:`/progress` derives it from; no floor of the loss has to be known, nor the cost of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cabs.control.curve import decay_exponent, decrease
from cabs.control.reasons import Reason
from cabs.control.rules import Known, Rule, coupled
from cabs.control.sizes import BatchSizes
from cabs.values.scalars import as_bool, as_finite, as_integer


@dataclass(frozen=True, slots=True)
class Progress(Rule):
    r"""The rule for the least time, :math:`m^2 = q (h + m)` with :math:`q = \eta V / 2 D`.

    :math:`V` is the variance trace, :math:`D` the decrease of the loss per e-fold of steps, and
    :math:`h` what a step costs besides its examples, in examples. A step that costs more is worth
    more examples; noise is allowed in proportion to the progress that is made. For h = 0 and a loss
    that falls as :math:`F_* + B k^{-1/2}` it is CABS. Derived in :doc:`/progress`.

    Args:
        overhead: :math:`h`, from the time of a step, :math:`c (h + m)`: how many examples take as
            long as the part of a step that does not depend on their number. The first batch is as
            large. None measures it: give :meth:`cabs.Controller.update` a :class:`cabs.Stopwatch`,
            or seconds. Sizes are then varied in the first 16 to 96 steps that are timed, three at a
            time, between half of what is asked for and four times as much; at first up to 16 times
            the smallest size.
        loss_floor: :math:`F_*`, if it is known. It is not needed. None where the loss can be
            negative, as for densities: the rule then takes its differences alone.
        adaptive: Whether the optimizer divides by the root of a second moment that the batch is in,
            as Adam does. Then variance and gradient are those in the metric of its step,
            :math:`P = 1 / (\sqrt{\hat v} + \epsilon)`, and
            ``expected_gradient_norm_squared`` is needed too.
        seconds: In place of ``overhead``, what a step takes, in seconds, for each size that may be
            asked for: a mapping. For compiled models, whose cost has steps.
        steps_before: How many steps the model was trained for already, where a run goes on from a
            checkpoint that holds no state of a controller.

    Raises:
        ValueError: If a number is out of its range, or both ``overhead`` and ``seconds`` are given.

    Example:
        >>> import cabs
        >>> controller = cabs.Controller(16, rule=cabs.Progress(overhead=512))
        >>> controller.update(learning_rate=0.1, variance_trace=900.0, loss=1.5).batch_size
        140
        >>> rule = cabs.Progress(seconds={64: 0.010, 128: 0.011, 160: 0.019})
        >>> controller = cabs.Controller(64, sizes=[64, 128, 160], rule=rule)
        >>> controller.update(learning_rate=0.1, variance_trace=900.0, loss=1.5).batch_size
        128
    """

    needs_curve = True
    overhead: float | None = None
    loss_floor: float | None = 0.0
    adaptive: bool = False
    seconds: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    steps_before: int = 0

    def __post_init__(self) -> None:
        if self.loss_floor is not None:
            object.__setattr__(self, "loss_floor", as_finite(self.loss_floor, "loss_floor"))
        as_bool(self.adaptive, "adaptive")
        as_integer(self.steps_before, "steps_before", 0)
        if self.overhead is not None:
            object.__setattr__(self, "overhead", as_finite(self.overhead, "overhead"))
            if self.overhead < 0.0:
                raise ValueError(f"overhead must be at least 0, got overhead = {self.overhead}")
            if self.seconds is not None:
                raise ValueError(
                    "overhead and seconds must not both be given, since seconds say what a step of "
                    "each size costs"
                )
        if self.seconds is not None:
            object.__setattr__(self, "seconds", _table(self.seconds))

    @property
    def in_metric(self) -> bool:
        """Whether it takes norms in the metric of an optimizer's step."""
        return self.adaptive

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes the squared norm of the expected gradient."""
        return self.adaptive

    @property
    def needs_clock(self) -> bool:
        """Whether it takes the seconds of a step."""
        return self.overhead is None and self.seconds is None

    def first_size(self, sizes: BatchSizes) -> int:
        """Return a size near the overhead; without one, the smallest, or 8 times that for Adam.

        The step then takes twice the time of a small one at most, and is not lost to noise. Adam's
        second moment remembers that noise for as long as it remembers anything.
        """
        if self.seconds is not None:
            # As many examples as take twice as long as the smallest size.
            table = dict(self.seconds)
            least = table[min(table)]
            return sizes.nearest(max(m for m, time in table.items() if time <= 2.0 * least))
        if self.overhead is None:
            return sizes.nearest((8.0 if self.adaptive else 1.0) * sizes.minimum)
        return sizes.nearest(self.overhead)

    def asked(self, rates: tuple[float, ...], known: Known) -> float | Reason:
        """Return the size, or that the loss is not above its floor, and does not fall."""
        averages, curve, floor = known.averages, known.curve, self.loss_floor
        before = known.steps_before + self.steps_before
        if floor is not None and averages.loss > floor:
            falls = decay_exponent(curve, floor, before) * (averages.loss - floor)
        else:
            falls = decrease(curve, before)
        if not falls > 0.0:
            return Reason.NO_PROGRESS
        if falls == math.inf:
            return math.nan
        traces = averages.variance_trace
        noise = coupled(rates, traces, 2.0 * falls)
        if not noise >= 0.0:
            return noise
        grown = 0.0
        if self.adaptive:
            # The second moment holds noise too, which a larger batch takes out of it.
            trace, square = sum(traces), max(averages.gradient_square, 0.0)
            grown = trace / (trace + 2.0 * known.batch_size * square) if trace > 0.0 else 0.0
        if self.seconds is not None:
            return _least(self.seconds, noise, grown)
        overhead = self._overhead(known.overhead)
        half = 0.5 * (grown * overhead + noise)
        return half + math.hypot(half, math.sqrt(noise) * math.sqrt(overhead))

    def rate_factor(self, size: int, asked: float, overhead: float) -> float:
        """Return the factor for which the rule asks for the size, the decrease being the same.

        1 for Adam, whose noise in the second moment asks for a large batch at any rate, and for a
        table of seconds.
        """
        if self.adaptive or self.seconds is not None:
            return 1.0
        overhead = self._overhead(overhead)
        return (size / asked) * (size / (overhead + size)) * (1.0 + overhead / asked)

    def _overhead(self, measured: float) -> float:
        return measured if self.overhead is None else self.overhead


def check_metric(rule: Rule, statistics: object) -> None:
    """Raise ValueError for statistics that say they are in another metric than the rule's."""
    in_metric = getattr(statistics, "in_metric", None)
    if in_metric is None or rule.in_metric in (None, in_metric):
        return
    if in_metric:
        raise ValueError(
            "statistics are in the metric of an adaptive optimizer's step, and the rule is "
            "cabs.Progress(adaptive=False), which takes plain ones; for Adam and its like give "
            "cabs.Progress(adaptive=True), otherwise measure without the optimizer or its metric"
        )
    raise ValueError(
        "statistics are not in the metric of an optimizer's step, which "
        "cabs.Progress(adaptive=True) needs; measure with cabs_torch.backward(losses, "
        "optimizer=optimizer), tape.gradient(..., optimizer=optimizer) or "
        "cabs_jax.value_and_grad(..., metric=...), and for SGD, with momentum or without, give "
        "cabs.Progress()"
    )


def _table(seconds: object) -> tuple[tuple[int, float], ...]:
    """Return the seconds of each size, by size."""
    pairs = seconds.items() if isinstance(seconds, Mapping) else seconds
    try:
        table = {as_integer(m, "a size", 1): as_finite(t, "seconds") for m, t in pairs}  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(f"seconds must be a mapping of sizes to seconds: {error}") from error
    if not table or min(table.values()) <= 0.0:
        raise ValueError(f"seconds must hold sizes, each with a time above 0, got {seconds!r}")
    return tuple(sorted(table.items()))


def _least(seconds: object, noise: float, grown: float) -> float:
    """Return the size for which ln(time) and noise together are least, in units of D."""
    # With elasticity e of P in m, r = e / (1 - e), D ln(t / m^e) + (1 - e) D q / m has the
    # derivative of zero that the formula solves, for a time of c (h + m).
    elasticity = grown / (1.0 + grown)

    def left(pair: tuple[int, float]) -> float:
        size, time = pair
        return math.log(time) - elasticity * math.log(size) + (1.0 - elasticity) * noise / size

    return float(min(seconds, key=left)[0])  # type: ignore[call-overload]
