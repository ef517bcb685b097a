"""What a compiled Keras model has to be for its steps to be measured.

Guarantees: what is decided here follows from how the model is made and compiled, not from numbers
that a step has found, so that there is an error before anything of the model has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

MEANS = ("sum_over_batch_size", "mean")
"""Reductions that are the mean over all values."""
_MIXIN = "cabs_tensorflow.keras.fitting"


def is_overridden(model: Any, name: str) -> bool:
    """Return whether a model has a method of its own in place of that of Keras, or of this package.

    Args:
        model: The model.
        name: ``"compute_loss"``, or ``"compute_losses"``.
    """
    if name in vars(model):
        return True
    classes = [one for one in type(model).__mro__ if name in vars(one)]
    if name == "compute_losses":
        return classes[0].__module__ != _MIXIN
    # That of the mixin stands for that of Keras.
    found = next(vars(one)[name] for one in classes if one.__module__ != _MIXIN)
    return found is not inspect.getattr_static(keras.Model, name)


def has_several_workers(model: Any) -> bool:
    """Return whether some of the replicas that train a model are those of other processes."""
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    # A strategy of one replica may not say where it is.
    return bool(replicas > 1 and replicas > len(strategy.extended.worker_devices))


def check_compiled(model: Any, microbatches: int | None) -> None:
    """Raise ValueError for a model whose steps could not be measured, and say what to do.

    Args:
        model: A compiled model.
        microbatches: Between how many of them the variance is taken, None for that of examples.
    """
    if model.run_eagerly or model.steps_per_execution != 1:
        raise ValueError(
            "the controller decides between steps of a compiled function, got "
            f"run_eagerly={model.run_eagerly}, steps_per_execution={model.steps_per_execution}; "
            "compile the model without both"
        )
    _check_strategy(model, microbatches)
    _check_accumulation(model.optimizer)
    if is_overridden(model, "compute_loss"):
        if microbatches is None:
            _say_what_to_override(model)
    elif microbatches is not None:
        _check_reductions(model)


def _check_strategy(model: Any, microbatches: int | None) -> None:
    """Raise ValueError for replicas that are not given shares of the same batch."""
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return
    known = tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy
    if not isinstance(strategy, known):
        raise ValueError(
            "fit knows the replicas of tf.distribute.MirroredStrategy and "
            f"MultiWorkerMirroredStrategy, got a {type(strategy).__name__} of {replicas}; write "
            "the loop, with cabs_tensorflow.GradientTape and all_reduce=True"
        )
    if model.distribute_strategy is not getattr(model, "_distribute_strategy", None):
        raise ValueError(
            f"model {model.name!r} must be created in the scope of the strategy that fit runs in, "
            f"got a {type(strategy).__name__} around fit; create it, and compile it, with "
            "strategy.scope()"
        )
    if microbatches is not None and microbatches % replicas:
        raise ValueError(
            f"microbatches must be a multiple of the number of replicas, {replicas}, each of which "
            f"takes as many of them, got {microbatches}"
        )


def _check_accumulation(optimizer: Any) -> None:
    """Raise ValueError for an optimizer that updates from several batches together."""
    while optimizer is not None:
        steps = getattr(optimizer, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                "each step must update with the gradient of its own batch, for which the "
                f"controller decides the size, got gradient_accumulation_steps={steps} in "
                f"{type(optimizer).__name__}; leave it out, and let the controller ask for batches "
                f"that are {steps} times as large: with microbatches={steps}, each is "
                "taken in as many parts, one after another"
            )
        # What scales the loss holds another one.
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _say_what_to_override(model: Any) -> None:
    name = type(model).__name__
    if is_overridden(model, "compute_losses"):
        raise ValueError(
            f"{name} overrides compute_loss beside compute_losses, whose mean is what fit "
            "minimizes; drop compute_loss, which is that mean without being overridden"
        )
    raise ValueError(
        f"{name} overrides compute_loss, which says nothing of single examples; override "
        "compute_losses in its place, one loss an example, whose mean compute_loss then is; or "
        "estimate the variance from groups of examples, with microbatches=8"
    )


def _check_reductions(model: Any) -> None:
    """Raise ValueError for losses of a microbatch that do not add up to that of the batch."""
    for loss in keras.tree.flatten(model.loss):
        if isinstance(loss, keras.losses.Loss) and loss.reduction not in MEANS:
            raise ValueError(
                f"loss {loss.name!r} must have reduction='sum_over_batch_size', got "
                f"reduction={loss.reduction!r}; a mean over microbatches is no such loss of the "
                "batch"
            )


def check_masks(shares: Iterable[Any]) -> None:
    """Raise ValueError for masks that do not follow from the batch alone, while it is traced.

    Those of variables or random numbers can be others in each microbatch.
    """
    waiting = [one.op for one in shares]
    seen = set(waiting)
    while waiting:
        op = waiting.pop()
        if op.type == "ReadVariableOp" or op.type in _CALLS or "Random" in op.type:
            raise ValueError(
                "with groups, masks must follow from the inputs and targets alone, since they are "
                f"counted over the whole batch first, got one that depends on {op.type}; make the "
                "mask before layers that learn or drop, or leave out groups"
            )
        fresh = {one.op for one in op.inputs} - seen
        seen |= fresh
        waiting.extend(fresh)


def check_unchanged(graph: Any) -> None:
    """Raise ValueError if a forward pass that only counts masks would change variables."""
    functions = graph.as_graph_def().library.function
    kinds = {op.type for op in graph.get_operations()}
    kinds |= {node.op for function in functions for node in function.node_def}
    changing = sorted(kind for kind in kinds if kind.startswith("Assign"))
    if changing:
        raise ValueError(
            "with groups, the forward pass is run once more to count masks over the whole batch, "
            f"and a layer changes a variable in it ({', '.join(changing)}); let it do so in "
            "training alone, or leave out groups"
        )


_CALLS = frozenset("If PartitionedCall StatefulPartitionedCall StatelessIf While".split())
