"""What a controller is told, remembers and decides, at one step.

Guarantees: immutable values; every decision says why.
"""

from __future__ import annotations

from typing import NamedTuple

from cabs.control.averages import Averages
from cabs.control.configuration import Configuration
from cabs.control.costs import Clock
from cabs.control.curve import Curve
from cabs.control.reasons import Reason


class Observation(NamedTuple):
    """What one training step told the controller.

    Example:
        >>> Observation(learning_rate=(0.1,), variance_trace=(900.0,), loss=1.5).loss
        1.5
    """

    learning_rate: tuple[float, ...]
    """One for all parameters, or one per parameter group."""
    variance_trace: tuple[float, ...] | None
    """One per parameter group; None at a step without a measurement."""
    loss: float
    """Mean loss of the batch."""
    expected_gradient_norm_squared: float | None = None
    """That of all parameters, unbiased; None unless the rule needs it."""
    seconds: float | None = None
    """What the step took; None where nobody timed it."""
    examples: int | None = None
    """How many examples it was, if it was timed."""


class State(NamedTuple):
    """All that a controller remembers between two steps.

    Example:
        >>> initial_state(Configuration(16)).batch_size
        16
    """

    step: int
    """How many observations there have been."""
    held: int
    """At how many of them the batch size was held."""
    age: int
    """How many observations ago the variance was measured, that one included."""
    batch_size: int
    """Size of the next batch."""
    learning_rate_factor: float
    """That of the last decision."""
    averages: Averages
    curve: Curve = ()
    """The loss over all steps, if the rule needs it."""
    clock: Clock = Clock()
    """What steps took, if the rule needs it."""


class Decision(NamedTuple):
    """What the controller decided at one step, and why.

    Example:
        >>> from cabs.control import decide
        >>> _, decision = decide(
        ...     Configuration(16),
        ...     initial_state(Configuration(16)),
        ...     Observation(learning_rate=(0.1,), variance_trace=(900.0,), loss=1.5),
        ... )
        >>> decision.raw, decision.batch_size, decision.held
        (60.0, 60, False)
    """

    step: int
    """Counted from 0."""
    batch_size: int
    """Size of the next batch, in examples."""
    raw: float | None
    """The rule's value, in examples, before it was moved to an allowed size; None if held."""
    average_variance_trace: float | None
    """The averaged trace, summed over parameter groups; None before the first measurement."""
    average_loss: float | None
    """The averaged loss; None before the first."""
    reason: Reason
    """Why this size."""
    learning_rate_factor: float
    """At the learning rate times this factor, the rule would ask for exactly the size chosen.

    Below 1 where it asks for more than the largest size, and its value depends on the rate: chosen
    size over raw value for the paper's. A held decision keeps the last. Go on reporting the
    learning rate without it.
    """
    observation: Observation
    """What was decided upon."""

    @property
    def held(self) -> bool:
        """Whether the batch size was held for want of a value of the rule."""
        return self.reason.held


def initial_state(configuration: Configuration) -> State:
    """Return the state before the first observation.

    Example:
        >>> initial_state(Configuration(16)).step
        0
    """
    # The published averages start at a variance of 0 and a loss of 1; the debiased ones at none.
    return State(
        step=0,
        held=0,
        age=configuration.every,
        batch_size=configuration.batch_size,
        learning_rate_factor=1.0,
        averages=Averages((), 0.0, 0.0 if configuration.debias else 1.0, 0.0, 0.0, 0.0),
    )


def is_due(configuration: Configuration, state: State) -> bool:
    """Return whether the next observation must hold the variance."""
    return state.age >= configuration.every
