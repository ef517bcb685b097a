"""Why a decision chose its batch size, in a word that logs keep."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a decision chose its batch size. In the last seven nothing was decided: it was held.

    Example:
        >>> Reason.MAXIMUM.value, Reason.MAXIMUM.held
        ('maximum', False)
        >>> Reason("loss at floor").held
        True
    """

    RULE = "rule"
    """The allowed size nearest to the rule's value."""
    MINIMUM = "minimum"
    """The rule asks for less than the smallest size."""
    MAXIMUM = "maximum"
    """The rule asks for more than the largest size."""
    HYSTERESIS = "hysteresis"
    """The rule asks for a change too small to be made."""
    GROWTH = "growth limit"
    """The rule asks for more growth than one step may bring."""
    EXPLORING = "exploring"
    """The size is varied, so that the clock shows what a step costs."""
    LEARNING_RATE_NOT_FINITE = "learning rate not finite"
    """The observation was left out."""
    VARIANCE_NOT_FINITE = "variance not finite"
    """The observation was left out; one example alone shows no variance."""
    LOSS_NOT_FINITE = "loss not finite"
    """The observation was left out."""
    GRADIENT_NOT_FINITE = "gradient not finite"
    """The observation was left out."""
    NO_PROGRESS = "no progress"
    """The loss does not fall and is not positive, so that the rule for the least time has none."""
    LOSS_AT_FLOOR = "loss at floor"
    """The averaged loss is at or under the floor, where the rule has no value."""
    RULE_NOT_FINITE = "rule not finite"
    """The observations are finite and the rule's terms overflow in opposite directions."""

    @property
    def held(self) -> bool:
        """Whether the batch size was held for want of a value of the rule."""
        return self in _HELD


_HELD = frozenset(
    {
        Reason.LEARNING_RATE_NOT_FINITE,
        Reason.VARIANCE_NOT_FINITE,
        Reason.LOSS_NOT_FINITE,
        Reason.GRADIENT_NOT_FINITE,
        Reason.NO_PROGRESS,
        Reason.LOSS_AT_FLOOR,
        Reason.RULE_NOT_FINITE,
    }
)
