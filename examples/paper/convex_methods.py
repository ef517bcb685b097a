"""What chooses the batch sizes of the convex problems.

Guarantees: a step is given the numbers of the steps before, and nothing else, but for the methods
that are told; every gradient of an example at a point is counted, wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import cabs
from convex_problems import Batch, Problem, Quadratic
from pages import Vector

# The size of the first batch, and the least with a variance.
FIRST, LEAST = 16, 2
# By so many evaluations a falling rate is at half of where it began.
HALVED = 10_000


class Step(NamedTuple):
    """Where a run is after a step."""

    evaluations: int
    """Gradients of one example at one point, from the beginning."""
    size: int
    """How many of them this step took."""
    weights: Vector


class Constant:
    """Always as many examples."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self, problem: Problem, weights: Vector, rate: float) -> int:  # noqa: ARG002
        """Return the size of the next batch."""
        return min(self._size, problem.largest)

    def update(self, rate: float, batch: Batch) -> None:
        """Take in what the step showed."""


class NormTest(Constant):
    """The norm test on each batch alone; a size that fails it grows, and none shrinks."""

    def __init__(self, largest: int, theta: float) -> None:
        super().__init__(FIRST)
        self._largest, self._theta = largest, theta

    def update(self, rate: float, batch: Batch) -> None:  # noqa: ARG002
        """Grow if the batch fails the test."""
        found = batch.statistics
        asked = cabs.control.norm_test(
            variance_trace=found.variance_trace,
            gradient_norm_squared=found.gradient_norm_squared,
            theta=self._theta,
        )
        self._size = int(np.ceil(min(max(asked, self._size), self._largest)))


class Cabs(Constant):
    """The paper's rule, as the library's controller has it."""

    def __init__(self, largest: int, loss_floor: float, smoothing: float) -> None:
        self._controller = cabs.Controller(
            FIRST,
            sizes=cabs.BatchSizes.range(LEAST, largest),
            rule=cabs.CABS(loss_floor),
            smoothing=smoothing,
        )
        super().__init__(FIRST)

    def update(self, rate: float, batch: Batch) -> None:
        """Let the controller decide."""
        trace = batch.statistics.variance_trace
        decision = self._controller.update(
            learning_rate=rate, variance_trace=trace, loss=batch.loss
        )
        self._size = decision.batch_size


class Told(Constant):
    """One of a quadratic's :class:`Sizes`, from what only an experiment can know."""

    def __init__(self, kind: str) -> None:
        super().__init__(FIRST)
        self._kind = kind

    def size(self, problem: Problem, weights: Vector, rate: float) -> int:
        """Return the size of the next batch."""
        assert isinstance(problem, Quadratic)
        asked = getattr(problem.sizes(weights, rate), self._kind)
        return round(min(max(asked, LEAST), problem.largest))


class Recipe(NamedTuple):
    """A method, and whether its learning rate falls."""

    method: Callable[[Problem], Constant]
    is_falling: bool = False


def coupled(*, is_floor_known: bool, smoothing: float = 0.95) -> Callable[[Problem], Constant]:
    """Return what makes the paper's rule for a problem."""
    return lambda problem: Cabs(
        problem.largest, problem.floor if is_floor_known else 0.0, smoothing
    )


RECIPES: dict[str, Recipe] = {
    **{
        f"constant {size}": Recipe(lambda _, size=size: Constant(size))
        for size in (2, 4, 8, 16, 128, 1024)
    },
    "constant 16, falling rate": Recipe(lambda _: Constant(16), is_falling=True),
    "full gradient": Recipe(lambda problem: Constant(problem.largest)),
    **{
        f"norm test, {theta}": Recipe(lambda problem, theta=theta: NormTest(problem.largest, theta))
        for theta in (0.5, 0.9)
    },
    "CABS": Recipe(coupled(is_floor_known=False)),
    "CABS, smoothing 0.5": Recipe(coupled(is_floor_known=False, smoothing=0.5)),
    "CABS, falling rate": Recipe(coupled(is_floor_known=False), is_falling=True),
    "CABS, known floor": Recipe(coupled(is_floor_known=True)),
    "CABS, known floor, smoothing 0.5": Recipe(coupled(is_floor_known=True, smoothing=0.5)),
    "rule, told": Recipe(lambda _: Told("rule")),
    "optimum of the bound, told": Recipe(lambda _: Told("bound")),
    "exact optimum, told": Recipe(lambda _: Told("exact")),
}


def descend(problem: Problem, name: str, rate: float, seed: int) -> Iterator[Step]:
    """Yield the steps of a method of ours, without end."""
    random = np.random.default_rng(seed)
    recipe = RECIPES[name]
    method = recipe.method(problem)
    weights, evaluations = problem.start, 0
    while True:
        now = rate / (1.0 + evaluations / HALVED) if recipe.is_falling else rate
        size = method.size(problem, weights, now)
        batch = problem.batch(weights, size, random)
        weights = weights - now * batch.gradient
        evaluations += size
        yield Step(evaluations, size, weights)
        method.update(now, batch)


def mice() -> Any:
    """Return the module of MICE, or None where it is not installed.

    Carlon, Espath, Holdorf, Tempone: "Multi-iteration stochastic optimizers", Applied Mathematics &
    Optimization 93 (2026).
    """
    try:
        import mice as module
    except ImportError:
        return None
    return module


def descend_by_mice(problem: Problem, rate: float, seed: int, budget: int) -> Iterator[Step]:
    """Yield the steps of gradient descent along MICE's estimates, as its documentation has it."""
    from mice.policy import DropRestartClipPolicy

    random = np.random.default_rng(seed)
    evaluations = 0

    def gradients(weights: Vector, examples: Any) -> npt.NDArray[np.float64]:
        nonlocal evaluations
        evaluations += len(examples)
        return problem.gradients(weights, examples)

    is_finite = not isinstance(problem, Quadratic)
    estimator = mice().MICE(
        grad=gradients,
        sampler=problem.pool(random),
        min_batch=10,
        max_cost=budget,
        # Where every example was seen, what came before can be let go; for finite sums only.
        policy=DropRestartClipPolicy(
            max_hierarchy_size=100, clip_type="full" if is_finite else None
        ),
    )
    estimator.rng = random
    weights = problem.start
    while not estimator.terminate:
        before = evaluations
        weights = weights - rate * estimator(weights)
        if not estimator.terminate:
            yield Step(evaluations, evaluations - before, weights)
