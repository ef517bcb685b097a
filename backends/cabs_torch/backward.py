"""The backward pass, with the gradient statistics of its batch.

Guarantees: the gradients are those of ``losses.mean().backward()`` to rounding, to the bit where
PyTorch computes all of them; the statistics are exact up to rounding, or an error is raised before
any gradient was written, or after the pass, if the measurement itself fails; on a GPU nothing waits
for the device, except to try out an operation without a rule, to see which rows an index takes, or
to notice what reduces gradients over ranks.
Assumes that no hook on the way, at a parameter's node included, changes a gradient, and that one
thread at a time trains the model.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from cabs.values.scalars import as_integer
from cabs_torch.errors import describe_some
from cabs_torch.errors import uncovered as uncovered_error
from cabs_torch.graph.autograd_nodes import Node, is_leaf
from cabs_torch.graph.collectives import functions_watched
from cabs_torch.measure import Measurement
from cabs_torch.norms import reductions
from cabs_torch.norms.arrays import Elementwise, TorchArrays
from cabs_torch.norms.sums import ElementwiseSums, SquareSums
from cabs_torch.optimizers import metric_of
from cabs_torch.options import Groups, as_groups, check_beside
from cabs_torch.plans import walked
from cabs_torch.ranks.arrived import MeanGradient
from cabs_torch.ranks.engines import Engine, has_answered
from cabs_torch.ranks.process_groups import (
    batch_of,
    check_whole,
    group_of,
    is_distributed,
    ranks,
    size_of,
    unreduced,
    weighed,
)
from cabs_torch.ranks.share import Share
from cabs_torch.statistics import BatchStatistics
from cabs_torch.summed import Summed, choose
from cabs_torch.totals import TotalStatistics
from cabs_torch.walk import Found, Policy, behind_one, leaves_behind

# Groups of examples for parameters that no rule covers.
_GROUPS = 4

# The parameters that were said to be left out: once is enough in a training loop.
_left_out: dict[int, weakref.ref[Tensor]] = {}


def backward(
    losses: Tensor,
    *,
    parameters: Any = None,
    parameter_groups: Any = None,
    optimizer: Any = None,
    sample: int | None = None,
    chunk: int | None = None,
    uncovered: Policy = "error",
    batch_size: int | None = None,
    scaler: Any = None,
    process_group: Any = None,
    controller: Any = None,
    bitwise: bool = False,
) -> BatchStatistics:
    r"""Do ``losses.mean().backward()`` and return the statistics of the batch's gradient.

    The squared norm of each example's gradient follows from the inputs and the output cotangents
    of the operations in which parameters meet the batch (Goodfellow, "Efficient per-example
    gradient computations", arXiv 1510.01799, for matrices); the autograd graph tells which these
    are. An example's gradient is that of its own loss, :math:`g_i = \nabla \ell_i`.

    Args:
        losses: One loss an example, shape (m,), floating point, with a graph. The whole batch has
            two at least, a rank or a microbatch may have one. The examples may lie along any axis
            inside the model, as long as no operation mixes them. Several losses of a model are
            added first.
        parameters: What to measure, an iterable; all parameters by default. The sums are over these
            alone, and ``measured`` says which share of the elements they are. Norm layers alone
            cost next to nothing, and show the noise scale of a transformer roughly
            (:doc:`/statistics`).
        parameter_groups: For one trace a group: an optimizer, or an iterable of iterables
            of parameters, as many as the controller has learning rates. Then the sums are tensors
            of shape (groups,). Parameters in none of them are left out.
        optimizer: For norms in the metric of the step that it takes next,
            :math:`|x|_P^2 = \sum_c P_c x_c^2`, one for each of its parameter groups; their
            learning rates are :func:`cabs_torch.learning_rates`. One of ``torch.optim``'s SGD,
            where P is 1, Adam, AdamW, NAdam, RMSprop and Adagrad, where P is one over the root that
            the step divides by, with what ``.grad`` then holds in it (:doc:`/statistics`). Or a
            function, called after the pass with each parameter, that returns P, a tensor in its
            shape or a number; then all are one group. Elementwise squares are kept during the pass,
            in single precision or better, as many as there are parameters.
        sample: Over how many examples norms are taken, the first ones, at least 1; all by default.
            The batch must be shuffled. The estimate stays unbiased, its cost shrinks by
            ``sample / m``, and it varies more; it can be negative.
        chunk: How many examples' gradients to form at a time, where they are formed only to be
            squared; by default as many as 8 MiB of temporaries allow, or 256 MiB on a GPU.
        uncovered: What to do about parameters whose norms cannot be computed exactly. ``"error"``
            raises; ``"microbatches"`` estimates their share of the variance from four groups of the
            batch, with a backward pass for each; ``"ignore"`` leaves them out, with a warning once
            and the share of the others in the result's ``measured``.
        batch_size: Where ``losses`` are a microbatch, how many examples the whole batch has. The
            gradients are then those of ``losses.sum() / batch_size``, so that those of all
            microbatches add up to the batch's; add the statistics' ``partial``, and complete the
            sum with :func:`cabs_torch.gradient_norm_squared`.
        scaler: A ``torch.amp.GradScaler``, which scales the loss before the backward pass. The
            statistics are those of the loss before, also if ``losses`` overflow then (not finite,
            at which a controller holds).
        bitwise: Whether gradients are those of ``losses.mean().backward()`` to the bit, and not to
            rounding: PyTorch then computes all of them itself, which takes up to a third longer.
        process_group: Where ``torch.distributed`` has more than one rank, whose examples the
            statistics are over: those of all ranks if left out, or of the ranks of this group. An
            engine must leave the mean of the ranks' gradients, as ``DistributedDataParallel`` and
            ``fully_shard`` do. ``batch_size`` is that of all ranks, and must be given where their
            shares differ. One sum over ranks is begun, and waited for when the statistics are read.
            ``False`` is for this rank's own examples, and their own mean gradient, whatever DDP
            then makes of that.
        controller: The controller that the statistics are for. On several ranks, states that differ
            are then an error on each of them.

    Returns:
        :class:`cabs_torch.BatchStatistics`, with groups of one example, over all parameters that
        the losses depend on. Its sums are float64 tensors on the device of ``losses``, in squared
        units of the gradient, times those of P, 0-d unless there are parameter groups.

    Raises:
        TypeError: If ``losses`` is no tensor, or not of a real floating-point type; if the step of
            ``optimizer`` is not known.
        ValueError: If it has another shape, a single example, or no graph, or one that a backward
            pass has used already; if an option is not as described, or does not go with another; if
            nothing is measured, for all parameters or for one of the groups; if an engine adds up
            the ranks' gradients in place of averaging them.
        UncoveredParameterError: If a parameter's norms cannot be computed exactly; the message
            names the operation and parameters. Nothing has been computed then.
        RuntimeError: If gradients of this rank's own microbatch are reduced over ranks during the
            pass. With several ranks also when the statistics are read, if these do not train alike.

    Example:
        >>> import torch, cabs_torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> statistics = cabs_torch.backward(layer(inputs).squeeze(1))
        >>> layer.weight.grad
        tensor([[2., 0.]])
        >>> round(float(statistics.variance_trace), 6)
        2.0
    """
    group = group_of(process_group)
    check_losses(losses, is_whole=group is None and batch_size in (None, 1))
    examples = len(losses)
    measured_examples = (
        examples if sample is None else min(as_integer(sample, "sample", 1), examples)
    )
    if chunk is not None:
        as_integer(chunk, "chunk", 1)
    if batch_size is not None:
        as_integer(batch_size, "batch_size", examples)
    if uncovered not in ("error", "microbatches", "ignore"):
        raise ValueError(
            f"uncovered must be 'error', 'microbatches' or 'ignore', got uncovered = {uncovered!r}"
        )
    if uncovered == "ignore" and examples == 1:
        raise ValueError(
            "uncovered must not be 'ignore' for a single example, of which every parameter is "
            "measured; give two at least, or parameters= of those that matter"
        )
    microbatch = batch_size if group is None else None
    metric, wanted, is_grouped = _asked(
        optimizer, parameters, parameter_groups, microbatch, uncovered
    )
    numbers = None if wanted is None else wanted.numbers
    if examples == 1:
        # All is its own; where the batch lies cannot be told from axes of length one.
        walk = behind_one(losses, numbers)
    else:
        walk = walked(losses, strict=uncovered == "error", wanted=numbers)
    measured = walk.measured
    found = {**walk.leaves, **walk.hidden, **(walk.refused if uncovered == "microbatches" else {})}
    _check_found(found, wanted)
    if uncovered == "ignore" and _are_news(walk):
        missing = [leaf.variable for leaf in walk.refused.values()]
        reason = walk.problems[id(missing[0])]
        warnings.warn(
            f"the statistics leave out {walk.missing:.1%} of the parameters, since {reason}: "
            f"{describe_some(missing)}",
            stacklevel=2,
        )
    estimated = (
        _from_microbatches(losses, walk)
        if uncovered == "microbatches"
        else (SquareSums(), SquareSums())
    )
    is_summed = not bitwise and measured_examples == examples
    arrays = TorchArrays(chunk) if metric is None else Elementwise(chunk)
    one = choose(losses, walk, arrays) if is_summed else Summed()
    elementwise = None if metric is None else ElementwiseSums()
    measurement = Measurement(walk, measured_examples, arrays, one.meetings, elementwise)
    trained = [leaf.variable for leaf in found.values()]
    engine = None if group is None else Engine(_in_order(trained, wanted, losses), group)
    share = []
    with ExitStack() as hooks:
        last = losses.grad_fn
        assert last is not None
        see = last.register_prehook(lambda given: share.append(given[losses.output_nr][0]))
        hooks.callback(see.remove)
        if examples == 1 and ranks() > 1:
            # Nothing was tried out, as other ranks do who have more.
            hooks.enter_context(functions_watched())
        hooks.enter_context(measurement)
        if engine is not None and (asked := found.get(id(engine.parameter))) is not None:
            hooks.callback(asked.register_prehook(engine.see).remove)
        elif engine is None and batch_size is not None:
            watched = [*walk.leaves.values(), *walk.hidden.values()]
            hooks.enter_context(unreduced(leaf.variable for leaf in watched))
        loss = weighed(losses, batch_size, group)
        loss = loss if scaler is None else scaler.scale(loss)
        loss.backward(inputs=one.others)
        measurement.hand_over()

    # What flows back is an example's gradient times 1/m, as the type of the losses and the scaler
    # have it: in half precision not quite 1/m.
    factor = share[0].double()
    kept, device = wanted or Groups({}, 1), losses.device

    def number_of(parameter: int) -> int:
        return kept.numbers.get(parameter, 0)

    def summed(sums: SquareSums) -> Tensor:
        return sums.by_group(lambda leaf: number_of(id(leaf.variable)), kept.count, device)

    sums, weights = (measurement.squares, measurement.norms), None
    if metric is not None and elementwise is not None:
        scale = None if scaler is None else scaler.scale(torch.ones((), device=device))
        weights = metric(scale)
        with torch.no_grad():
            sums = elementwise.weighted(weights)
    if examples == 1:
        sums = sums[1], sums[1]
    squares = summed(sums[0]) * (examples / measured_examples) / factor**2
    squares = squares + summed(estimated[0])
    if engine is None:
        means = summed(sums[1]) / (factor * examples) ** 2 + summed(estimated[1])
        if not is_grouped:
            squares, means = squares.squeeze(0), means.squeeze(0)
        left, loss = examples - measured_examples, losses.detach().double().mean()
        return BatchStatistics(
            *(examples, examples, squares, means, left, loss),
            in_metric=metric is not None,
            measured=measured,
        )
    batch = batch_of(examples, batch_size, group)
    engine.check(examples, batch)
    # Those that this rank's losses do not depend on too: others' may.
    given = trained if wanted is None else wanted.parameters
    left_out = walk.refused.keys() - found.keys()
    gradient = MeanGradient([one for one in given if id(one) not in left_out], group, found)
    norms, alike = gradient.squares(number_of, kept.count, device, weights)
    brought = Share(
        examples,
        batch,
        is_told=batch_size is not None,
        fingerprint=None if controller is None else controller.fingerprint,
        loss=losses.detach().double().sum(),
        squares=squares,
        # The pass multiplied each loss by the ranks, of which the engine took the mean.
        norms=norms / (factor * (batch / size_of(group))) ** 2,
        alike=alike,
        measured=measured_examples,
        problem=gradient.problem,
        before=engine.before,
        is_in_metric=metric is not None,
        seconds=None if controller is None else controller.own_seconds,
    )
    return TotalStatistics(brought, group, measured=measured, is_grouped=is_grouped)


def _in_order(trained: Sequence[Tensor], wanted: Groups | None, losses: Tensor) -> Sequence[Tensor]:
    """Return the parameters in an order that is the same on all ranks, as far as that matters."""
    if wanted is not None:
        return [one for one in wanted.parameters if one.requires_grad]
    if has_answered(trained):
        return trained
    # A rank with one example finds them in another order than one with several.
    nearest = [leaf.variable for leaf in leaves_behind(losses.grad_fn) if is_leaf(leaf)]
    known = {id(one) for one in trained}
    first = {id(one): one for one in nearest if id(one) in known}
    return [*first.values(), *(one for one in trained if id(one) not in first)]


def _asked(
    optimizer: Any, parameters: Any, parameter_groups: Any, batch_size: Any, uncovered: Policy
) -> tuple[Any, Groups | None, bool]:
    """Return the metric, what is measured, and whether that has groups."""
    metric = None
    if optimizer is not None:
        check_beside(optimizer, parameters, parameter_groups, batch_size, uncovered)
        metric = metric_of(optimizer)
        if isinstance(optimizer, torch.optim.Optimizer):
            parameter_groups = optimizer
            if metric is not None:
                # Squares of elements are of the whole.
                check_whole(one for part in optimizer.param_groups for one in part["params"])
    if parameters is not None and parameter_groups is not None:
        raise ValueError(
            "parameters and parameter_groups must not both be given; parameter_groups=[parameters] "
            "gives the sums of one group"
        )
    if parameters is not None:
        return metric, as_groups([parameters]), False
    is_grouped = parameter_groups is not None
    return metric, as_groups(parameter_groups) if is_grouped else None, is_grouped


def _check_found(found: dict[int, Node], wanted: Groups | None) -> None:
    """Raise ValueError if nothing is measured."""
    if wanted is not None:
        wanted.check_measured(found)
    if not found:
        raise ValueError(
            "losses must depend on a parameter that can be measured, got none; are all of them "
            "frozen, left out by parameter_groups= or uncovered='ignore', or used under no_grad?"
        )


def _are_news(walk: Found) -> bool:
    """Return whether some parameters were not left out before, and note that they are."""
    left_out = {key: leaf.variable for key, leaf in walk.refused.items()}
    known = [key in _left_out and _left_out[key]() is one for key, one in left_out.items()]
    _left_out.update({key: weakref.ref(one) for key, one in left_out.items()})
    return not all(known)


def _from_microbatches(losses: Tensor, walk: Found) -> tuple[SquareSums, SquareSums]:
    """Estimate what no rule covers from groups of examples, with a backward pass for each.

    Returns what makes the formula for groups of one give the estimate from larger groups.
    """
    leaves = list(walk.refused.values())
    squares, means = SquareSums(), SquareSums()
    if not leaves:
        return squares, means
    cut = [leaf.variable for leaf in leaves if is_distributed(leaf.variable)]
    if cut:
        raise uncovered_error(walk.problems[id(cut[0])], cut)
    if walk.checkpoints:
        raise ValueError(
            "uncovered='microbatches' does not work with reentrant checkpoints; use checkpoints "
            "with use_reentrant=False"
        )
    examples = len(losses)
    parts = losses.tensor_split(min(_GROUPS, examples))
    between: dict[Node, list[Tensor]] = {leaf: [] for leaf in leaves}
    whole: dict[Node, Tensor] = {}
    for part in parts:
        gradients = torch.autograd.grad(
            part.mean(), [leaf.variable for leaf in leaves], retain_graph=True
        )
        for leaf, gradient in zip(leaves, gradients, strict=True):
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            between[leaf].append(reductions.square(dense) * len(part))
            share = reductions.at_least_single(dense) * (len(part) / examples)
            whole[leaf] = whole[leaf] + share if leaf in whole else share
    for leaf in leaves:
        mean = reductions.square(whole[leaf])
        trace = (torch.stack(between[leaf]).sum() - examples * mean) / (len(parts) - 1)
        squares.add(leaf, trace * (examples - 1) + examples * mean)
        means.add(leaf, mean)
    return squares, means


def check_losses(losses: Any, *, is_whole: bool = True) -> None:
    """Raise TypeError or ValueError for what are no losses of a batch, or a part, with a graph."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a tensor, got {type(losses).__name__}")
    check_whole([losses])
    if not losses.dtype.is_floating_point:
        raise TypeError(f"losses must be of a real floating-point type, got {losses.dtype}")
    if losses.dim() != 1 or not len(losses):
        raise ValueError(
            f"losses must have shape (m,), one loss an example, got shape {tuple(losses.shape)}; "
            "compute the loss with reduction='none' and average over all axes but the batch's"
        )
    if losses.is_inference():
        raise ValueError(
            "losses must carry a graph to the parameters, got a tensor of torch.inference_mode(); "
            "compute them outside of it"
        )
    if losses.grad_fn is None or not torch.is_grad_enabled():
        raise ValueError(
            "losses must carry a graph to the parameters, and gradients must be enabled; were the "
            "losses detached, or is torch.no_grad() in force?"
        )
    if len(losses) == 1 and is_whole:
        raise ValueError(
            "losses must be those of at least two examples, since one shows no variance; call "
            "losses.mean().backward() and keep the batch size, or leave out the last batch; if it "
            "is a microbatch, give the number of examples in all of them as batch_size"
        )
