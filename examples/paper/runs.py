"""One training run, and what is kept of it.

Guarantees: runs of a problem with the same seed begin with the same weights and see the examples in
the same order; seconds are those of steps, decisions included, without what feeds and tests; a run
whose loss is no longer finite has diverged, and ends there.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cabs
from methods import RECIPES, SIZES, Method, Recipe
from pages import short
from problems import FINAL, ON_THE_WAY, Problem

# How many points of a curve are kept, and at every which of them the accuracy is tested.
POINTS, TESTED = 25, 5


class Setting(NamedTuple):
    """What tells runs apart."""

    problem: str
    recipe: str
    learning_rate: float
    seed: int
    budget: int
    device: str


class Point(NamedTuple):
    """A stretch of a run, told at its end."""

    examples: int
    steps: int
    # Of the processor if one thread trains, by the clock otherwise.
    seconds: float
    # Mean over the examples of the stretch, each at its own step.
    loss: float
    # What the rule asked for at last, in examples, before limits.
    asked: float | None
    accuracy: float | None


def train(setting: Setting, problem: Problem) -> dict[str, Any]:
    """Train until so many examples were seen; return the curve as plain values."""
    recipe = RECIPES[setting.recipe]
    method = recipe.method()
    torch.manual_seed(setting.seed)
    run = _Run(setting, recipe, problem.network())
    random = torch.Generator().manual_seed(setting.seed)
    # What is left at the end of an epoch can be two examples where the rule asks for a hundred.
    # The bundled digits are fewer than the largest size.
    drop_last = problem.examples >= SIZES.maximum
    sampler = cabs.BatchSampler(problem.examples, method, seed=setting.seed, drop_last=drop_last)
    is_alone = setting.device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_alone else time.perf_counter
    curve: list[Point] = []
    seen = steps = since = 0
    seconds = losses = 0.0
    loss = 0.0
    while seen < setting.budget and math.isfinite(loss):
        for indices in sampler:
            inputs, targets = problem.batch(indices, random)
            start = clock()
            rate = recipe.rate(setting.learning_rate, seen / setting.budget)
            loss = run.step(problem, method, inputs, targets, rate)
            seconds += clock() - start
            steps, seen, since = steps + 1, seen + len(indices), since + len(indices)
            losses += loss * len(indices)
            is_over = seen >= setting.budget or not math.isfinite(loss)
            if is_over or seen >= setting.budget * (len(curve) + 1) / POINTS:
                is_tested = is_over or (len(curve) + 1) % TESTED == 0
                size = FINAL if is_over else ON_THE_WAY
                accuracy = problem.accuracy(run.model, size) if is_tested else None
                curve.append(Point(seen, steps, seconds, losses / since, method.asked, accuracy))
                losses, since = 0.0, 0
            if is_over:
                break
    final = problem.final_loss(run.model) if math.isfinite(loss) else math.inf
    points = [[short(value) for value in point] for point in curve]
    return {**setting._asdict(), "final_loss": short(final), "curve": points}


class _Run:
    """A network and its optimizer."""

    def __init__(self, setting: Setting, recipe: Recipe, model: nn.Module) -> None:
        self.model, self._recipe = model, recipe
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.SGD(
            self._parameters,
            setting.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def step(
        self, problem: Problem, method: Method, inputs: Tensor, targets: Tensor, rate: float
    ) -> float:
        """Take a step, let the method decide, and return the loss."""
        self._optimizer.zero_grad()
        mean, statistics = self._recipe.measure(self.model, problem.losses, inputs, targets)
        penalty = 0.0
        if self._recipe.is_penalty_told:
            squares = sum(float((one.detach() ** 2).sum()) for one in self._parameters)
            penalty = self._recipe.weight_decay / 2.0 * squares
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        loss = float(mean)
        # A loss that is not finite ends the run.
        if math.isfinite(loss):
            method.update(rate, loss + penalty, statistics)
        return loss
