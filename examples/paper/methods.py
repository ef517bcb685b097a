"""The methods that are compared: what decides upon the next batch, and how it trains.

Guarantees: each is given the numbers of the step before, and nothing of the future.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import cabs
import measures
from cabs import GradientStatistics

SIZES = cabs.BatchSizes.range(16, 2048)
FROM_FOUR = cabs.BatchSizes.range(4, 2048)
FIRST, SMOOTHING = 16, 0.95
# Relative deviations of the gradient that the norm test allows.
THETAS = (0.5, 0.9)
# As many steps as an average remembers.
HELD = round(1.0 / (1.0 - SMOOTHING))
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-3


class Method(Protocol):
    """Decides upon the size of the next batch, and tells what its rule asked for."""

    batch_size: int
    asked: float | None

    def update(self, rate: float, loss: float, statistics: GradientStatistics | None) -> None:
        """Take in what the last step showed."""


class Constant:
    """Always as many examples."""

    asked = None

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def update(self, rate: float, loss: float, statistics: GradientStatistics | None) -> None:
        """Keep the size."""


class Cabs(Constant):
    """The paper's rule.

    Args:
        controller: What decides.
        factor: By what the rule's learning rate is multiplied, for momentum.
        is_biased: Whether it is given the variance with m in place of m - 1.
    """

    def __init__(
        self, controller: cabs.Controller, *, factor: float = 1.0, is_biased: bool = False
    ) -> None:
        super().__init__(controller.batch_size)
        self._controller, self._factor, self._is_biased = controller, factor, is_biased

    def update(self, rate: float, loss: float, statistics: GradientStatistics | None) -> None:
        """Let the controller decide."""
        assert statistics is not None
        name = "biased_variance_trace" if self._is_biased else "variance_trace"
        decision = self._controller.update(
            learning_rate=rate * self._factor, variance_trace=getattr(statistics, name), loss=loss
        )
        self.batch_size, self.asked = decision.batch_size, decision.raw


class Ratio(Constant):
    """A rule over averages of the variance and of a square of the gradient.

    Args:
        rule: What it asks for.
        square: The name of the square among the statistics.
        held: Steps at the beginning at which the size stays. The unbiased square is a difference:
            of few steps it can be negative, or so small that the rule asks for everything.
    """

    def __init__(self, rule: Callable[..., float], square: str, held: int = 0) -> None:
        super().__init__(FIRST)
        self._rule, self._name, self._held = rule, square, held
        self._trace, self._square = (cabs.control.DebiasedAverage(SMOOTHING) for _ in range(2))

    def update(self, rate: float, loss: float, statistics: GradientStatistics | None) -> None:  # noqa: ARG002
        """Take the nearest size to what the rule asks for."""
        assert statistics is not None
        trace, square = statistics.variance_trace, getattr(statistics, self._name)
        # As the controller does: what is not finite, as before a run diverges, is held.
        if not (math.isfinite(trace) and math.isfinite(square)):
            return
        self._trace.update(trace)
        self._square.update(square)
        self.asked = self._rule(
            variance_trace=self._trace.value, gradient_norm_squared=self._square.value
        )
        if self._held:
            self._held -= 1
        else:
            self.batch_size = SIZES.nearest(self.asked)


class Recipe(NamedTuple):
    """A method, and how it trains and measures."""

    method: Callable[[], Method]
    measure: measures.Measure = measures.exact
    momentum: float = 0.0
    weight_decay: float = 0.0
    # Whether half a cosine takes the learning rate to 0.
    is_decayed: bool = False
    # Whether the rule is given the loss with half the decay times the weights' square.
    is_penalty_told: bool = False

    def rate(self, initial: float, progress: float) -> float:
        """Return the learning rate where that share of the budget has been seen.

        Loshchilov, Hutter: "SGDR: stochastic gradient descent with warm restarts", arXiv
        1608.03983, equation 5, without restarts.
        """
        return initial * (1.0 + math.cos(math.pi * progress)) / 2.0 if self.is_decayed else initial


def coupled(
    factor: float = 1.0, sizes: cabs.BatchSizes = SIZES, loss_floor: float = 0.0
) -> Callable[[], Method]:
    """Return what makes the paper's rule, with debiased averages."""

    def made() -> Method:
        rule = cabs.CABS(loss_floor)
        controller = cabs.Controller(FIRST, sizes=sizes, smoothing=SMOOTHING, rule=rule)
        return Cabs(controller, factor=factor)

    return made


def constant(size: int, **training: Any) -> Recipe:
    """Return the recipe of a constant batch size."""
    return Recipe(lambda: Constant(size), measures.nothing, **training)


def norm_test(theta: float) -> Recipe:
    """Return the recipe of the norm test that allows a relative deviation."""
    rule = partial(cabs.control.norm_test, theta=theta)
    return Recipe(lambda: Ratio(rule, "gradient_norm_squared"))


def as_published() -> Method:
    """Return the paper's rule as the authors' code has it, average by average."""
    return Cabs(cabs.Controller.as_published(FIRST), is_biased=True)


# Smoothed labels cost this much at least: the entropy of a label.
SMOOTHED_FLOOR = -(0.91 * math.log(0.91) + 9 * 0.01 * math.log(0.01))

RECIPES: dict[str, Recipe] = {
    "CABS": Recipe(coupled()),
    **{f"norm test {theta}": norm_test(theta) for theta in THETAS},
    "noise scale": Recipe(
        lambda: Ratio(cabs.control.noise_scale_rule, "expected_gradient_norm_squared", HELD)
    ),
    **{f"constant {size}": constant(size) for size in (4, 16, 32, 64, 128, 256, 512)},
    "constant 16, decay": constant(16, is_decayed=True),
    "CABS, decay": Recipe(coupled(), is_decayed=True),
    "CABS, published moments": Recipe(coupled(), measures.published),
    **{
        f"CABS, {count} groups": Recipe(coupled(), measures.groups(count))
        for count in (2, 4, 8, 16)
    },
    "CABS, published averages": Recipe(as_published),
    "CABS, floor of the labels": Recipe(coupled(loss_floor=SMOOTHED_FLOOR)),
    # An example of text is many characters, so that few will do.
    "CABS from 4": Recipe(coupled(sizes=FROM_FOUR)),
    **{
        f"CABS from 4, floor {floor:g}": Recipe(coupled(sizes=FROM_FOUR, loss_floor=floor))
        for floor in (1.0, 1.4)
    },
    "CABS, momentum": Recipe(coupled(), momentum=MOMENTUM),
    "CABS, momentum, effective rate": Recipe(coupled(1.0 / (1.0 - MOMENTUM)), momentum=MOMENTUM),
    **{f"constant {size}, momentum": constant(size, momentum=MOMENTUM) for size in (16, 128)},
    "CABS, weight decay": Recipe(coupled(), weight_decay=WEIGHT_DECAY),
    "CABS, weight decay, penalty in the loss": Recipe(
        coupled(), weight_decay=WEIGHT_DECAY, is_penalty_told=True
    ),
}
