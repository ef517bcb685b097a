"""Batch-size rules: each maps a few numbers about the gradient to the size it asks for.

Guarantees: pure functions of floats; the value is raw, that is neither smoothed, rounded nor
clipped, and infinite where the rule asks for more than any batch. A rule that drives a controller
is an immutable object with its settings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

from cabs.control.averages import Averages
from cabs.control.curve import Curve, decay_exponent, decrease
from cabs.values.scalars import Scalar, Scalars, as_bool, as_float, as_floats

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


def _finite(value: Scalar, name: str) -> float:
    number = as_float(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {name} = {number}")
    return number


class Rule(Protocol):
    """What drives a controller, from the averages of what it was told."""

    name: ClassVar[str]
    needs_gradient: ClassVar[bool]
    """Whether it takes the squared norm of the expected gradient."""
    needs_curve: ClassVar[bool]
    """Whether it takes the loss over all steps."""

    def asked(
        self, rates: tuple[float, ...], averages: Averages, curve: Curve, batch_size: int
    ) -> float | None:
        """Return the size that it asks for; None where it has no value."""

    def rate_factor(self, size: int, asked: float) -> float:
        """Return by how much to lower the learning rate, where a size is smaller than asked."""


@dataclass(frozen=True, slots=True)
class CABS:
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

    name: ClassVar[str] = "CABS"
    needs_gradient: ClassVar[bool] = False
    needs_curve: ClassVar[bool] = False
    loss_floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_floor", _finite(self.loss_floor, "loss_floor"))

    def asked(
        self,
        rates: tuple[float, ...],
        averages: Averages,
        curve: Curve,  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
    ) -> float | None:
        """Return the size that the rule asks for; None where it has no value."""
        excess = averages.loss - self.loss_floor
        return coupled(rates, averages.variance_trace, excess) if 0.0 < excess < math.inf else None

    def rate_factor(self, size: int, asked: float) -> float:
        """Return the factor for which the rule asks for the size."""
        return size / asked


@dataclass(frozen=True, slots=True)
class Progress:
    r"""The rule for the least time, :math:`m^2 = q (h + m)` with :math:`q = \eta V / 2 D`.

    :math:`V` is the variance trace, :math:`D` the decrease of the loss per e-fold of steps, and
    :math:`h` what a step costs besides its examples, in examples. A step that costs more is worth
    more examples; noise is allowed in proportion to the progress that is made. For h = 0 and a loss
    that falls as :math:`F_* + B k^{-1/2}` it is CABS. Derived in :doc:`/progress`.

    Args:
        overhead: :math:`h`, from the time of a step, :math:`c (h + m)`: how many examples take as
            long as the part of a step that does not depend on their number.
        loss_floor: :math:`F_*`, if it is known. It is not needed.
        adaptive: Whether the optimizer divides by the root of a second moment that the batch is in,
            as Adam does. Then variance and gradient are those in the metric of its step,
            :math:`P = 1 / (\sqrt{\hat v} + \epsilon)`, and
            ``expected_gradient_norm_squared`` is needed too.

    Example:
        >>> import cabs
        >>> controller = cabs.Controller(16, rule=cabs.Progress(overhead=512))
        >>> controller.update(learning_rate=0.1, variance_trace=900.0, loss=1.5).batch_size
        140
    """

    name: ClassVar[str] = "Progress"
    needs_curve: ClassVar[bool] = True
    overhead: float
    loss_floor: float = 0.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_floor", _finite(self.loss_floor, "loss_floor"))
        object.__setattr__(self, "overhead", _finite(self.overhead, "overhead"))
        as_bool(self.adaptive, "adaptive")
        if self.overhead < 0.0:
            raise ValueError(f"overhead must be at least 0, got overhead = {self.overhead}")

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes the squared norm of the expected gradient."""
        return self.adaptive

    def asked(
        self, rates: tuple[float, ...], averages: Averages, curve: Curve, batch_size: int
    ) -> float | None:
        """Return the size; None where the loss is not above its floor, and does not fall."""
        excess = averages.loss - self.loss_floor
        is_positive = excess > 0.0
        exponent = decay_exponent(curve, self.loss_floor) if is_positive else 0.0
        falls = exponent * excess if is_positive else decrease(curve)
        if not 0.0 < falls < math.inf:
            return None
        traces, overhead = averages.variance_trace, self.overhead
        noise = coupled(rates, traces, 2.0 * falls)
        if not noise > 0.0:
            return noise
        grown = 0.0
        if self.adaptive:
            # The second moment holds noise too, which a larger batch takes out of it.
            trace, square = sum(traces), max(averages.gradient_square, 0.0)
            grown = trace / (trace + 2.0 * batch_size * square)
        half = 0.5 * (grown * overhead + noise)
        return half + math.hypot(half, math.sqrt(noise) * math.sqrt(overhead))

    def rate_factor(self, size: int, asked: float) -> float:
        """Return the factor for which the rule asks for the size, the decrease being the same."""
        overhead = self.overhead
        return (size / asked) * (size / (overhead + size)) * (1.0 + overhead / asked)


class _OfGradient(ABC):
    """What takes the squared norm of the expected gradient, and nothing but averages."""

    __slots__ = ()
    needs_gradient: ClassVar[bool] = True
    needs_curve: ClassVar[bool] = False

    def asked(
        self,
        rates: tuple[float, ...],  # noqa: ARG002
        averages: Averages,
        curve: Curve,  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
    ) -> float | None:
        """Return the size that the rule asks for."""
        return self._of(sum(averages.variance_trace), averages.gradient_square)

    @abstractmethod
    def _of(self, trace: float, square: float) -> float:
        """Return the size for an averaged variance and squared gradient."""

    def rate_factor(self, size: int, asked: float) -> float:  # noqa: ARG002
        """Return 1: what the rule asks for does not depend on the learning rate."""
        return 1.0


@dataclass(frozen=True, slots=True)
class NormTest(_OfGradient):
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

    name: ClassVar[str] = "NormTest"
    theta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", as_float(self.theta, "theta"))
        norm_test(variance_trace=1.0, gradient_norm_squared=1.0, theta=self.theta)

    def _of(self, trace: float, square: float) -> float:
        return norm_test(variance_trace=trace, gradient_norm_squared=square, theta=self.theta)


@dataclass(frozen=True, slots=True)
class NoiseScale(_OfGradient):
    """The simple gradient noise scale, as :func:`cabs.control.noise_scale_rule` has it.

    Example:
        >>> import cabs
        >>> controller = cabs.Controller(16, rule=cabs.NoiseScale())
        >>> measured = {"variance_trace": 100.0, "expected_gradient_norm_squared": 4.0}
        >>> controller.update(learning_rate=0.1, loss=1.5, **measured).raw
        25.0
    """

    name: ClassVar[str] = "NoiseScale"

    def _of(self, trace: float, square: float) -> float:
        return noise_scale_rule(variance_trace=trace, gradient_norm_squared=square)


PAPER = CABS()

RULES: dict[str, type[Any]] = {one.name: one for one in (CABS, NoiseScale, NormTest, Progress)}


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """Return a rule's name and settings as plain values."""
    settings: Any = rule
    return {"name": rule.name, **asdict(settings)}


def rule_from_json(values: Any) -> Rule:
    """Return the rule that :func:`rule_to_json` wrote; ValueError if it is none."""
    if not isinstance(values, dict) or values.get("name") not in RULES:
        raise ValueError(f"a rule has a name, one of {sorted(RULES)}, got {values!r}")
    kind = RULES[values["name"]]
    settings = {name: value for name, value in values.items() if name != "name"}
    names = {field.name for field in fields(kind)}
    if settings.keys() != names:
        raise ValueError(f"the rule {kind.name} holds {sorted(names)}, got {settings!r}")
    try:
        rule: Rule = kind(**settings)
    except TypeError as error:
        raise ValueError(f"this is no rule: {error}") from error
    return rule
