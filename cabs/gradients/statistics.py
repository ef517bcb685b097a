r"""Gradient statistics of one batch, from groups of examples whose gradients were averaged.

Guarantees: one formula for every source of estimates, and no way to merge them that forgets that
the square of a mean is not the mean of squares. Refuses to wait for a device: the two sums may be
0-d tensors and are not looked at until somebody asks for a Python number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import NoReturn

import numpy as np

from cabs.values.scalars import Scalar, as_float, as_floats, as_integer


@dataclass(frozen=True, slots=True)
class PartialStatistics:
    r"""What can be added over microbatches and ranks: m, K and :math:`\sum_k m_k |g_k|^2`.

    There is no variance in it, since the squared norm of the mean gradient is missing;
    :meth:`complete` takes that, once the gradients themselves have been summed.

    Args:
        examples: :math:`m`, how many examples the groups hold together.
        groups: :math:`K`, how many groups, at most ``examples``.
        group_square_sum: :math:`\sum_k m_k |g_k|^2`, with :math:`g_k` the mean gradient of group
            :math:`k`; squared units of the gradient.
        estimated: How many of the groups were not measured themselves, as
            :class:`GradientStatistics` describes.

    Example:
        Two microbatches of 2 and 4 examples, whose mean gradients are (3, 0) and (0, 3):

        >>> parts = PartialStatistics.of_group(2, 9.0) + PartialStatistics.of_group(4, 9.0)
        >>> statistics = parts.complete(gradient_norm_squared=1.0**2 + 2.0**2)
        >>> statistics.variance_trace
        24.0
    """

    examples: int = 0
    groups: int = 0
    group_square_sum: Scalar = 0.0
    estimated: int = 0

    def __post_init__(self) -> None:
        examples = as_integer(self.examples, "examples", 0)
        groups = as_integer(self.groups, "groups", 0)
        as_integer(self.estimated, "estimated", 0)
        if groups > examples or (groups == 0 and examples > 0):
            raise ValueError(
                f"groups must hold at least one example each and every example one group, "
                f"got groups = {groups}, examples = {examples}"
            )

    @classmethod
    def of_group(cls, examples: int, square: Scalar) -> PartialStatistics:
        """Return the part of one group: its size, and the squared norm of its mean gradient."""
        return cls(examples, 1, examples * square)

    def __add__(self, other: PartialStatistics) -> PartialStatistics:
        if not isinstance(other, PartialStatistics):
            return NotImplemented
        return PartialStatistics(
            self.examples + other.examples,
            self.groups + other.groups,
            self.group_square_sum + other.group_square_sum,
            self.estimated + other.estimated,
        )

    def __radd__(self, other: object) -> PartialStatistics:
        # What sum() starts with.
        return self if type(other) is int and other == 0 else NotImplemented

    def complete(
        self, *, gradient_norm_squared: Scalar, loss: Scalar | None = None
    ) -> GradientStatistics:
        r"""Return the statistics of all examples together.

        Args:
            gradient_norm_squared: :math:`|g|^2` of the mean gradient over all ``examples``, taken
                after the gradients were averaged, never an average of squares.
            loss: The mean loss over all ``examples``, to be kept with the statistics.

        Raises:
            ValueError: If numbers are given that no gradients can have; see
                :class:`GradientStatistics`.
        """
        return GradientStatistics(
            self.examples,
            self.groups,
            self.group_square_sum,
            gradient_norm_squared,
            self.estimated,
            loss,
        )


@dataclass(frozen=True, slots=True)
class GradientStatistics:
    r"""Variance and signal of a batch gradient, from K groups of averaged examples.

    With groups of sizes :math:`m_k` and mean gradients :math:`g_k`, and :math:`g` the mean over
    all :math:`m` examples, the between-group mean square of a one-way analysis of variance,

    .. math:: \widehat{\mathrm{tr}\,\Sigma} = \frac{\sum_k m_k |g_k|^2 - m |g|^2}{K - 1},

    is unbiased for any sizes. A group is one example, a microbatch, or a replica's share; groups
    of one give the within-batch estimate of Balles, Romero, Hennig (arXiv 1612.05086),
    with m - 1 in place of m.

    Two of these cannot be added; add their :attr:`partial` and complete the sum with the squared
    norm of the gradient averaged over all examples.

    Args:
        examples: :math:`m`.
        groups: :math:`K`, at most ``examples``.
        group_square_sum: :math:`\sum_k m_k |g_k|^2`.
        gradient_norm_squared: :math:`|g|^2`.
        estimated: How many of the groups were not measured themselves: their squares are estimated
            from those of the others, as with a sample of the examples.
        loss: Mean loss of the examples, None if it is not known.
        in_metric: Whether the squares are norms in the metric of an adaptive optimizer's step, as a
            rule may need; None if nobody has said.

    The two squares may be 0-d tensors, or hold one value for each parameter group; estimates then
    do too, except :attr:`noise_scale`, which is that of all parameters together.

    Raises:
        ValueError: If there is no example, or there are more groups than examples; if numbers are
            given that no gradients can have, since :math:`m |g|^2 \le \sum_k m_k |g_k|^2` unless
            some are estimated. The variance would be negative; the usual cause is a gradient that
            was summed and not averaged, or is not that of these examples. Tensors of a device are
            looked at when they are read.

    Example:
        Four examples with gradients 1, 2, 3, 6:

        >>> statistics = GradientStatistics(4, 4, group_square_sum=50.0, gradient_norm_squared=9.0)
        >>> round(statistics.variance_trace, 6), statistics.biased_variance_trace
        (4.666667, 3.5)
        >>> round(statistics.expected_gradient_norm_squared, 6)
        7.833333
    """

    examples: int
    groups: int
    group_square_sum: Scalar
    gradient_norm_squared: Scalar
    estimated: int = 0
    loss: Scalar | None = None
    in_metric: bool | None = None

    def __post_init__(self) -> None:
        examples = as_integer(self.examples, "examples", 1)
        PartialStatistics(examples, self.groups, estimated=self.estimated)
        squares = self.group_square_sum, self.gradient_norm_squared
        if all(map(_is_at_hand, squares)):
            _check_squares(examples, *squares, is_exact=self.estimated == 0)

    @property
    def partial(self) -> PartialStatistics:
        """The part that can be added to that of other batches."""
        return PartialStatistics(self.examples, self.groups, self.group_square_sum, self.estimated)

    @property
    def variance_trace(self) -> Scalar:
        r"""Unbiased estimate of :math:`\mathrm{tr}(\Sigma)`, for one example's gradient.

        ``nan`` for a single group, which shows no variance.
        """
        if self.groups == 1:
            return math.nan
        return (self.group_square_sum - self.examples * self.gradient_norm_squared) / (
            self.groups - 1
        )

    @property
    def biased_variance_trace(self) -> Scalar:
        """The same with m in place of m - 1, as the authors' code computes it; 0 for m = 1."""
        if self.examples == 1:
            return 0.0
        return self.variance_trace * ((self.examples - 1) / self.examples)

    @property
    def expected_gradient_norm_squared(self) -> Scalar:
        r"""Unbiased estimate of the squared norm of the expected gradient; can be negative."""
        return self.gradient_norm_squared - self.variance_trace / self.examples

    @property
    def noise_scale(self) -> float:
        """Gradient noise scale, in examples: variance trace over gradient square.

        ``inf`` where the gradient square is not positive: the noise hides the gradient. Over many
        steps, divide the averages rather than average the quotients.
        """
        trace = sum(as_floats(self.variance_trace, "variance_trace"))
        square = sum(as_floats(self.expected_gradient_norm_squared, "gradient_norm_squared"))
        return math.inf if square <= 0.0 else trace / square

    def read(self) -> GradientStatistics:
        """Return the same as Python numbers, or NumPy arrays of one a parameter group.

        An adapter's statistics have this method too, so that a loop can treat all alike.

        Raises:
            ValueError: If no gradients can have these numbers, which are looked at now.
        """
        return GradientStatistics(
            self.examples,
            self.groups,
            _plain(self.group_square_sum, "group_square_sum"),
            _plain(self.gradient_norm_squared, "gradient_norm_squared"),
            self.estimated,
            None if self.loss is None else as_float(self.loss, "loss"),
            self.in_metric,
        )

    def __add__(self, other: object) -> NoReturn:
        raise TypeError(
            "statistics of batches cannot be added: the squared norm of a mean gradient is not a "
            "mean of squared norms. Write (a.partial + b.partial).complete("
            "gradient_norm_squared=...) with the squared norm of the gradient averaged over all "
            "examples"
        )

    __radd__ = __add__


# Room for gradients that were rounded to 8 bits before they were squared.
_ROUNDED = 1.1


def _plain(square: Scalar, name: str) -> float | np.ndarray:
    """Return a float, or an array where there is one number for each parameter group."""
    numbers = as_floats(square, name)
    return numbers[0] if len(numbers) == 1 else np.array(numbers)


def _is_at_hand(square: Scalar) -> bool:
    """Return whether a number, or an array of some, can be read without waiting for a device."""
    if isinstance(square, (Real, np.ndarray)):
        return True
    # PyTorch's own, since tensors of other classes may have no values.
    is_tensor = type(square).__qualname__ == "Tensor" and type(square).__module__ == "torch"
    return is_tensor and square.device.type == "cpu"


def _check_squares(
    examples: int, group_square_sum: Scalar, gradient_norm_squared: Scalar, *, is_exact: bool
) -> None:
    """Raise ValueError for numbers that no gradients can have."""
    sums = as_floats(group_square_sum, "group_square_sum")
    means = as_floats(gradient_norm_squared, "gradient_norm_squared")
    for group, mean in zip(sums, means, strict=True):
        if mean < 0.0:
            raise ValueError(
                f"gradient_norm_squared must be at least 0, got gradient_norm_squared = {mean}"
            )
        if is_exact and examples * mean > _ROUNDED * group:
            raise ValueError(
                f"gradient_norm_squared = {mean} is too large for the mean of gradients with sum "
                f"of m_k |g_k|^2 = {group} over {examples} examples, so that their variance would "
                "be negative; average the gradients over all examples before squaring them, set "
                "them to zero before a step, and let nothing else add to them"
            )
