"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: it says first what is the matter, and names the operation, variables and the way out; it
is short however many variables there are.
"""

from __future__ import annotations

from collections.abc import Sequence

from cabs.gradients.errors import UncoveredParameterError, listed


def uncovered(problem: str, names: Sequence[str]) -> UncoveredParameterError:
    """Return the error for variables and what is the matter with them.

    Args:
        problem: What is the matter, up to where the variables are named.
        names: What they are called.
    """
    return UncoveredParameterError(
        f"{problem} {listed(names)}. Estimate the variance from groups of examples instead, with "
        "cabs_tensorflow.PartialStatistics, or leave out such sources"
    )
