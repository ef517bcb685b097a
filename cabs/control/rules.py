"""Batch-size rules: each maps a few numbers about the gradient to the size it asks for.

Guarantees: pure functions of floats; the value is raw, that is neither smoothed, rounded nor
clipped. A function is infinite where it asks for more than any batch. A rule that drives a
controller is an immutable object with its settings, which gives a size, or a reason to have none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from cabs.control.averages import Averages
from cabs.control.curve import Curve
from cabs.control.reasons import Reason
from cabs.control.sizes import BatchSizes
from cabs.values.scalars import Scalar, Scalars, as_finite, as_float, as_floats

# Batch sizes, in examples. A denominator at or under zero leaves nothing to divide the noise by.


def cabs_rule(
    *, learning_rate: Scalars, variance_trace: Scalars, loss: Scalar, loss_floor: Scalar = 0.0
) -> float:
    r"""Return the CABS batch size, :math:`m = \eta \, \mathrm{tr}(\Sigma) / (F - F_*)`.

    Balles, Romero, Hennig: "Coupling Adaptive Batch Sizes with Learning Rates", UAI 2017, arXiv
    1612.05086, equation 22.

    Args:
        learning_rate: :math:`\eta`, one number, or one per parameter group.
        variance_trace: :math:`\mathrm{tr}(\Sigma)` of one example's gradient, or one per group;
            then the rule's numerator is the sum of their products.
        loss: :math:`F`, the mean loss.
        loss_floor: :math:`F_*`, the smallest loss that can be reached.

    Returns:
        The size in examples; ``inf`` for a loss at or under the floor.

    Raises:
        ValueError: If the numbers of learning rates and traces differ.

    Example:
        >>> cabs_rule(learning_rate=0.1, variance_trace=1000.0, loss=2.0)
        50.0
        >>> cabs_rule(learning_rate=[0.1, 0.01], variance_trace=[1000.0, 500.0], loss=2.0)
        52.5
    """
    rates = as_floats(learning_rate, "learning_rate")
    traces = as_floats(variance_trace, "variance_trace")
    excess = as_float(loss, "loss") - as_float(loss_floor, "loss_floor")
    asked = coupled(rates, traces, excess if excess > 0.0 else 1.0)
    return asked if excess > 0.0 else _everything_unless_nan(excess + asked)


def coupled(rates: tuple[float, ...], traces: tuple[float, ...], excess_loss: float) -> float:
    """Return sum_j lr_j tr_j / excess for values already read; one rate serves all traces."""
    if len(rates) == 1:
        return rates[0] * (traces[0] if len(traces) == 1 else sum(traces)) / excess_loss
    if len(rates) != len(traces):
        raise ValueError(
            f"learning_rate and variance_trace must have one number per parameter group, "
            f"got {len(rates)} learning rates and {len(traces)} traces"
        )
    weighted = [rate * trace for rate, trace in zip(rates, traces, strict=True)]
    return sum(weighted) / excess_loss


def norm_test(
    *, variance_trace: Scalar, gradient_norm_squared: Scalar, theta: float = 1.0
) -> float:
    r"""Return the size of the norm test, :math:`\mathrm{tr}(\Sigma) / (\theta^2 |g|^2)`.

    Byrd, Chin, Nocedal, Wu: "Sample size selection in optimization methods for machine learning",
    Mathematical Programming 134 (2012), the dynamic sample size criterion: the smallest batch
    whose gradient's relative standard deviation is at most ``theta``.

    Args:
        variance_trace: :math:`\mathrm{tr}(\Sigma)`.
        gradient_norm_squared: :math:`|g|^2`; the paper takes the batch's own
            (``GradientStatistics.gradient_norm_squared``).
        theta: Relative standard deviation allowed, above 0.

    Returns:
        The size in examples; ``inf`` for a gradient square at or under zero.

    Example:
        >>> norm_test(variance_trace=100.0, gradient_norm_squared=4.0, theta=0.5)
        100.0
    """
    theta = as_float(theta, "theta")
    if not 0.0 < theta < math.inf:
        raise ValueError(f"theta must be above 0 and finite, got theta = {theta}")
    scale = noise_scale_rule(
        variance_trace=variance_trace, gradient_norm_squared=gradient_norm_squared
    )
    return scale / theta / theta


def noise_scale_rule(*, variance_trace: Scalar, gradient_norm_squared: Scalar) -> float:
    r"""Return the simple gradient noise scale, :math:`\mathrm{tr}(\Sigma) / |G|^2`.

    McCandlish, Kaplan, Amodei: "An Empirical Model of Large-Batch Training", arXiv 1812.06162,
    B_simple.

    Args:
        variance_trace: :math:`\mathrm{tr}(\Sigma)`, best averaged over steps.
        gradient_norm_squared: :math:`|G|^2`, the unbiased estimate
            (:attr:`cabs.GradientStatistics.expected_gradient_norm_squared`), best averaged over
            steps.

    Returns:
        The size in examples; ``inf`` for a gradient square at or under zero.

    Example:
        >>> noise_scale_rule(variance_trace=100.0, gradient_norm_squared=4.0)
        25.0
    """
    trace = as_float(variance_trace, "variance_trace")
    square = as_float(gradient_norm_squared, "gradient_norm_squared")
    if square > 0.0:
        return trace / square
    return _everything_unless_nan(square + trace)


def _everything_unless_nan(sum_of_values: float) -> float:
    """Return what a rule asks for when its denominator is not positive."""
    return math.nan if math.isnan(sum_of_values) else math.inf


class Known(NamedTuple):
    """What a rule may ask for a size with."""

    averages: Averages
    curve: Curve
    """The loss over all steps; empty unless the rule needs it."""
    steps_before: int
    """How many steps there were before those of the curve."""
    batch_size: int
    """That of the last batch."""
    overhead: float
    """What a step was measured to cost besides its examples, in examples; 0 where it was not."""


class Rule(ABC):
    """What drives a controller: from the averages of what it was told, the size to ask for.

    A rule is an immutable dataclass, whose fields are its settings.
    """

    __slots__ = ()

    @property
    def in_metric(self) -> bool | None:
        """Whether it takes norms in the metric of an optimizer's step; None: it takes either."""
        return None

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes the squared norm of the expected gradient."""
        return False

    @property
    def needs_curve(self) -> bool:
        """Whether it takes the loss over all steps."""
        return False

    @property
    def needs_clock(self) -> bool:
        """Whether it takes the seconds of a step."""
        return False

    def first_size(self, sizes: BatchSizes) -> int:
        """Return the size of the first batch, where none is given: the smallest."""
        return sizes.minimum

    @abstractmethod
    def asked(self, rates: tuple[float, ...], known: Known) -> float | Reason:
        """Return the size that it asks for, in examples, or why it has none.

        Args:
            rates: Learning rates, one, or one per parameter group.
            known: The averages, and what else the rule needs.
        """

    def rate_factor(self, size: int, asked: float, overhead: float) -> float:  # noqa: ARG002
        """Return by how much to lower the learning rate where a size is smaller than asked.

        1 for a rule that does not depend on the learning rate.
        """
        return 1.0


@dataclass(frozen=True, slots=True)
class CABS(Rule):
    r"""The rule of the paper, :math:`m = \eta \, \mathrm{tr}(\Sigma) / (F - F_*)`.

    Balles, Romero, Hennig: "Coupling Adaptive Batch Sizes with Learning Rates", UAI 2017, arXiv
    1612.05086, equation 22: the most gain in loss for each example, by plain SGD.

    Args:
        loss_floor: :math:`F_*`, the smallest loss that can be reached: 0 for cross-entropy with
            plain labels.

    Example:
        >>> import cabs
        >>> controller = cabs.Controller(16, rule=cabs.CABS(loss_floor=0.5))
        >>> controller.update(learning_rate=0.1, variance_trace=900.0, loss=1.5).raw
        90.0
    """

    loss_floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_floor", as_finite(self.loss_floor, "loss_floor"))

    def asked(self, rates: tuple[float, ...], known: Known) -> float | Reason:
        """Return the size that the rule asks for, or that the loss is at the floor."""
        excess = known.averages.loss - self.loss_floor
        if excess <= 0.0:
            return Reason.LOSS_AT_FLOOR
        traces = known.averages.variance_trace
        return coupled(rates, traces, excess) if excess < math.inf else math.nan

    def rate_factor(self, size: int, asked: float, overhead: float) -> float:  # noqa: ARG002
        """Return the factor for which the rule asks for the size."""
        return size / asked


@dataclass(frozen=True, slots=True)
class NormTest(Rule):
    """The norm test, as :func:`cabs.control.norm_test` has it, over the averages.

    Args:
        theta: Relative standard deviation of the batch's gradient that is allowed, above 0.

    Example:
        >>> import cabs
        >>> controller = cabs.Controller(16, rule=cabs.NormTest(theta=0.5))
        >>> measured = {"variance_trace": 100.0, "expected_gradient_norm_squared": 4.0}
        >>> controller.update(learning_rate=0.1, loss=1.5, **measured).raw
        100.0
    """

    needs_gradient = True
    theta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", as_float(self.theta, "theta"))
        norm_test(variance_trace=1.0, gradient_norm_squared=1.0, theta=self.theta)

    def asked(self, rates: tuple[float, ...], known: Known) -> float:  # noqa: ARG002
        """Return the size that the rule asks for."""
        trace, square = sum(known.averages.variance_trace), known.averages.gradient_square
        return norm_test(variance_trace=trace, gradient_norm_squared=square, theta=self.theta)


@dataclass(frozen=True, slots=True)
class NoiseScale(Rule):
    """The simple gradient noise scale, as :func:`cabs.control.noise_scale_rule` has it.

    Example:
        >>> import cabs
        >>> controller = cabs.Controller(16, rule=cabs.NoiseScale())
        >>> measured = {"variance_trace": 100.0, "expected_gradient_norm_squared": 4.0}
        >>> controller.update(learning_rate=0.1, loss=1.5, **measured).raw
        25.0
    """

    needs_gradient = True

    def asked(self, rates: tuple[float, ...], known: Known) -> float:  # noqa: ARG002
        """Return the size that the rule asks for."""
        trace, square = sum(known.averages.variance_trace), known.averages.gradient_square
        return noise_scale_rule(variance_trace=trace, gradient_norm_squared=square)


PAPER = CABS()
