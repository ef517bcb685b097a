"""Convex problems whose gradients of single examples are known in closed form.

Guarantees: statistics are exact over the examples of a batch; a batch as large as a data set holds
each of its examples once, and its gradient is the full one; a quadratic's batches have exactly the
distribution of as many examples drawn one by one, at the price of one.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

import cabs
from pages import Vector

# Weight of half the squared norm in the logistic regressions.
REGULARISATION = 1e-3
FEATURES = {"a9a": 123, "mushrooms": 112}
DIMENSION = 100


class Batch(NamedTuple):
    """What a step is given of the examples that it drew."""

    gradient: Vector
    loss: float
    statistics: cabs.GradientStatistics


class Sizes(NamedTuple):
    """What three rules ask for, in examples, where everything is known."""

    rule: float
    """CABS."""
    bound: float
    """What maximises the paper's lower bound of a step's gain, for each example."""
    exact: float
    """What maximises the step's expected gain itself, for each example."""


class Problem(Protocol):
    """A convex function that is the mean over examples."""

    start: Vector
    largest: int
    """Size of the largest batch."""
    curvature: float
    """L, the largest of the Hessian's eigenvalues, or a bound of it."""
    floor: float
    """F*, the smallest loss."""

    def batch(self, weights: Vector, size: int, random: np.random.Generator) -> Batch:
        """Draw so many examples without replacement."""

    def whole(self, weights: Vector) -> tuple[float, float]:
        """Return the loss and the gradient's norm, of all examples."""

    def pool(self, random: np.random.Generator) -> Any:
        """Return examples in random order, or what draws so many."""

    def gradients(self, weights: Vector, examples: Any) -> npt.NDArray[np.float64]:
        """Return one gradient for each example, shape (n, dimension)."""


class Logistic:
    """Logistic regression with a penalty of half the squared norm of the weights."""

    def __init__(self, inputs: Vector, labels: Vector, regularisation: float) -> None:
        self._signed = labels[:, None] * inputs
        self._squares = (inputs**2).sum(axis=1)
        self._regularisation = regularisation
        self.largest, dimension = inputs.shape
        self.start = np.zeros(dimension)
        moments = inputs.T @ inputs / self.largest
        # The logistic function's slope is at most a quarter.
        self.curvature = float(np.linalg.eigvalsh(moments)[-1]) / 4.0 + regularisation

    @cached_property
    def minimum(self) -> Vector:
        """The weights of the smallest loss, by Newton's method with halved steps."""
        weights = self.start
        loss, gradient = self._loss_and_gradient(weights)
        while np.linalg.norm(gradient) > 1e-13:
            slopes = _logistic(self._signed @ weights)
            slopes *= 1.0 - slopes
            hessian = (self._signed * slopes[:, None]).T @ self._signed / self.largest
            hessian += self._regularisation * np.eye(len(weights))
            step = np.linalg.solve(hessian, gradient)
            scale = 1.0
            while self._loss_and_gradient(weights - scale * step)[0] > loss and scale > 1e-4:
                scale /= 2.0
            if scale <= 1e-4:
                break
            weights = weights - scale * step
            loss, gradient = self._loss_and_gradient(weights)
        return weights

    @cached_property
    def floor(self) -> float:
        """F*, the smallest loss."""
        return self._loss_and_gradient(self.minimum)[0]

    def batch(self, weights: Vector, size: int, random: np.random.Generator) -> Batch:
        """Draw so many examples without replacement."""
        if size >= self.largest:
            return self.of(weights, slice(None))
        return self.of(weights, random.choice(self.largest, size, replace=False, shuffle=False))

    def of(self, weights: Vector, chosen: Any) -> Batch:
        """Return gradient, loss and statistics of these examples."""
        signed = self._signed[chosen]
        margins = signed @ weights
        residuals = -_logistic(-margins)
        penalty, square = self._regularisation, float(weights @ weights)
        gradient = residuals @ signed / len(signed) + penalty * weights
        # |r a + p w|^2, with a.w the margin.
        squares = residuals**2 * self._squares[chosen] + 2.0 * penalty * residuals * margins
        statistics = cabs.GradientStatistics(
            examples=len(signed),
            groups=len(signed),
            group_square_sum=float(squares.sum()) + len(signed) * penalty**2 * square,
            gradient_norm_squared=float(gradient @ gradient),
        )
        loss = float(np.logaddexp(0.0, -margins).mean()) + penalty / 2.0 * square
        return Batch(gradient, loss, statistics)

    def whole(self, weights: Vector) -> tuple[float, float]:
        """Return the loss and the gradient's norm, of all examples."""
        loss, gradient = self._loss_and_gradient(weights)
        return loss, float(np.linalg.norm(gradient))

    def pool(self, random: np.random.Generator) -> Any:
        """Return the numbers of all examples in random order."""
        return random.permutation(self.largest)

    def gradients(self, weights: Vector, examples: Any) -> npt.NDArray[np.float64]:
        """Return one gradient for each of these numbers of examples."""
        signed = self._signed[examples]
        return -_logistic(-signed @ weights)[:, None] * signed + self._regularisation * weights

    def _loss_and_gradient(self, weights: Vector) -> tuple[float, Vector]:
        margins = self._signed @ weights
        gradient = -_logistic(-margins) @ self._signed / self.largest
        loss = np.logaddexp(0.0, -margins).mean() + self._regularisation / 2.0 * weights @ weights
        return float(loss), gradient + self._regularisation * weights


class Quadratic:
    """F(w) = F* + w'Hw / 2 with diagonal H; an example z adds z'w, z normal, also diagonal."""

    # No step of ours needs more.
    largest = 2**24

    def __init__(self, eigenvalues: Vector, variances: Vector, floor: float = 0.0) -> None:
        self.eigenvalues, self.variances, self.floor = eigenvalues, variances, floor
        self.start = np.ones(len(eigenvalues))
        self.curvature = float(eigenvalues.max())
        self._deviations = np.sqrt(variances)

    def batch(self, weights: Vector, size: int, random: np.random.Generator) -> Batch:
        """Draw the mean of so many examples, and their scatter around it, which is independent."""
        noise = self._deviations * random.standard_normal(len(weights)) / np.sqrt(size)
        gradient = self.eigenvalues * weights + noise
        square = float(gradient @ gradient)
        scatter = float(self.variances @ random.chisquare(size - 1, len(weights)))
        statistics = cabs.GradientStatistics(size, size, size * square + scatter, square)
        return Batch(gradient, self.whole(weights)[0] + float(noise @ weights), statistics)

    def whole(self, weights: Vector) -> tuple[float, float]:
        """Return the loss and the gradient's norm, in expectation."""
        gradient = self.eigenvalues * weights
        return self.floor + float(gradient @ weights) / 2.0, float(np.sqrt(gradient @ gradient))

    def pool(self, random: np.random.Generator) -> Callable[[int], npt.NDArray[np.float64]]:
        """Return what draws so many examples."""
        return lambda size: self._deviations * random.standard_normal((size, len(self.start)))

    def gradients(self, weights: Vector, examples: Any) -> npt.NDArray[np.float64]:
        """Return one gradient for each of these examples."""
        return self.eigenvalues * weights + examples

    def gain(self, weights: Vector, rate: float, size: float) -> float:
        """Return by how much a step lowers the loss, in expectation, for each of its examples."""
        signal, noise = self._gain(weights, rate)
        return (signal - noise / size) / size

    def sizes(self, weights: Vector, rate: float) -> Sizes:
        """Return what the three rules ask for here; ``inf`` where a step gains nothing."""
        trace, curvature = float(self.variances.sum()), self.curvature
        loss, norm = self.whole(weights)
        signal, noise = self._gain(weights, rate)
        of_bound = (2.0 - curvature * rate) * norm**2
        return Sizes(
            rate * trace / (loss - self.floor) if loss > self.floor else np.inf,
            2.0 * curvature * rate * trace / of_bound if of_bound > 0.0 else np.inf,
            2.0 * noise / signal if signal > 0.0 else np.inf,
        )

    def _gain(self, weights: Vector, rate: float) -> tuple[float, float]:
        """Return what a step gains without noise, and what the noise of one example takes."""
        gradient = self.eigenvalues * weights
        noise = rate**2 / 2.0 * float(self.eigenvalues @ self.variances)
        bent = rate**2 / 2.0 * float(self.eigenvalues @ gradient**2)
        return rate * float(gradient @ gradient) - bent, noise


def problem(name: str, data_dir: Path | None) -> Problem:
    """Return a problem by name: a quadratic, or the regression on a data set of LIBSVM."""
    if name in QUADRATICS:
        return QUADRATICS[name]()
    if data_dir is None:
        raise SystemExit(f"{name} needs --data-dir, the folder that holds the folder libsvm")
    inputs, labels = read_libsvm(data_dir / "libsvm" / f"{name}.gz", FEATURES[name])
    return Logistic(inputs, labels, REGULARISATION)


def quadratic(condition: float, *, is_noise_like_hessian: bool, floor: float = 0.0) -> Quadratic:
    """Return a quadratic with L = 1 and a noise whose trace is the dimension."""
    eigenvalues = np.geomspace(1.0 / condition, 1.0, DIMENSION)
    variances = eigenvalues / eigenvalues.mean() if is_noise_like_hessian else np.ones(DIMENSION)
    return Quadratic(eigenvalues, variances, floor)


QUADRATICS: dict[str, Callable[[], Quadratic]] = {
    "isotropic": lambda: quadratic(1.0, is_noise_like_hessian=False),
    "condition 100": lambda: quadratic(100.0, is_noise_like_hessian=False),
    "condition 100, noise like H": lambda: quadratic(100.0, is_noise_like_hessian=True),
    "isotropic, floor 1": lambda: quadratic(1.0, is_noise_like_hessian=False, floor=1.0),
}


def read_libsvm(path: Path, features: int) -> tuple[Vector, Vector]:
    """Return inputs of shape (n, features), and labels of -1 and 1, of a file in LIBSVM's format.

    Raises:
        SystemExit: If there is no such file.
        ValueError: If a label or a feature is none.
    """
    if not path.exists():
        raise SystemExit(f"there is no {path}")
    with gzip.open(path, "rt", encoding="ascii") as file:
        lines = [line.split() for line in file if line.strip()]
    labels = np.array([float(label) for label, *_ in lines])
    if not set(labels) <= {-1.0, 1.0}:
        raise ValueError(f"labels must be -1 and 1, got {sorted(set(labels))} in {path}")
    inputs = np.zeros((len(lines), features))
    for row, (_, *pairs) in zip(inputs, lines, strict=True):
        for pair in pairs:
            number, _, value = pair.partition(":")
            if not 1 <= int(number) <= features:
                raise ValueError(f"features must be 1 to {features}, got {number} in {path}")
            row[int(number) - 1] = float(value)
    return inputs, labels


def _logistic(values: Vector) -> Vector:
    # The same for both signs without overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * values))
