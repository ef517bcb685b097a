"""Batch-size rules: each maps a few numbers about the gradient to the size it asks for.

Guarantees: pure functions of floats; the value is raw, that is neither smoothed, rounded nor
clipped, and infinite where the rule asks for more than any batch.
"""

from __future__ import annotations

import math

from cabs.values.scalars import Scalar, Scalars, as_float, as_floats

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
