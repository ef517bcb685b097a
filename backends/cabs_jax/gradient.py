"""The loss, its gradient and their statistics, in one call that stands for JAX's own.

Guarantees: loss and gradients are those of ``jax.value_and_grad`` of the mean over the examples,
gradients to rounding, or to the bit where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cabs.values.scalars import as_integer
from cabs_jax.alike import told
from cabs_jax.calls import call
from cabs_jax.graph import meshes
from cabs_jax.graph.arguments import Arguments, positions_of, read_arguments
from cabs_jax.graph.program import Value
from cabs_jax.graph.reading import read
from cabs_jax.graph.traced import Traced
from cabs_jax.masks import filled
from cabs_jax.measure import run
from cabs_jax.metric import metric_of, square_in
from cabs_jax.norms import reductions
from cabs_jax.perturbations import Perturbations
from cabs_jax.rules import penalties, uses
from cabs_jax.rules.plan import Leaf, Mode, plan_leaf, uses_of
from cabs_jax.shares import Shares, axes_of, check_whole
from cabs_jax.statistics import BatchStatistics, square_of
from cabs_jax.taps import Taps


def value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    in_axes: Any = None,
    sample: int | None = None,
    metric: Callable[[Any], Any] | None = None,
    bitwise: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> Callable[..., Any]:
    r"""Return a function that gives the mean loss, its gradient, and gradient statistics.

    It stands for ``jax.value_and_grad`` of the mean of ``jax.vmap(loss_fn)``, and gives the same
    loss, and the same gradients to rounding. The statistics are exact: those of a loop over the
    examples, up to rounding. Norms come out of the same backward pass; of matrices, convolution
    kernels and embedding tables that are used once, per-example gradients are formed for some
    examples at a time, if at all. Works inside ``jax.jit``, and with everything that a jitted step
    may have around it. Outside of it the loss is traced at each call, and what was compiled for an
    equal trace is run; a loss with effects, such as ``jax.debug.print``, and calls with ``metric``
    or ``bitwise``, run operation by operation.

    Args:
        loss_fn: From parameters and one example, without the batch axis, to its loss, of shape ().
        argnums: Which arguments to differentiate, as in ``jax.value_and_grad``.
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.
        in_axes: As in ``jax.vmap``, with an entry for each argument: the axis of the examples, or
            None for what they share. By default None for what is differentiated, and 0 for
            everything else. Random keys are split: ``jax.random.split(key, m)``.
        sample: Over how many examples norms are taken, the first ones, at least 1; all by
            default. The estimate stays unbiased, varies more, and can be negative.
        metric: For norms in the metric of an optimizer's step,
            :math:`|x|_P^2 = \sum_c P_c x_c^2`: a function from the gradients, as they are returned,
            to P, real and not negative, of the same structure and shapes;
            :func:`cabs_jax.adam_metric` makes one. Elementwise squares are then summed over the
            examples, for which the gradients of convolution kernels and of what has no rule are
            formed for each example, all at a time.
        bitwise: Whether gradients are those of ``jax.value_and_grad`` to the bit, as far as XLA
            compiles the same way, and not to rounding: JAX then computes all of them itself, which
            takes up to half as long again.
        axis_name: Inside ``shard_map``, along which axes of the mesh devices have examples of their
            own, and parameters that are equal. Loss, statistics and gradients are then those of all
            examples along them, the same on each device, however many of its own count, and
            whether or not ``shard_map`` checks what varies.

    Returns:
        A function of the same arguments, but batches in place of examples, and of two more.
        ``mask``: which examples count, booleans of shape (m,); all by default. ``fingerprint``:
        what :func:`cabs_jax.fingerprint` gives, for ``statistics.read()`` to raise on every process
        where their controllers or the shapes of their batches differ; give it on all processes or
        on none. It returns
        ``(loss, statistics), gradients``, or ``(loss, statistics, aux), gradients``, with
        a :class:`cabs_jax.BatchStatistics`, and ``aux`` stacked along a first axis. A single
        example shows no variance: its trace is ``nan``, and its ``partial`` is part of a whole.
        Examples that a mask leaves out are computed as copies of the first one that counts, so that
        nothing in them matters; in ``aux`` they are that one.
        Inside ``shard_map`` without ``axis_name`` all of it is this device's own, except that JAX
        adds up the gradients of parameters that it knows to be the same on all devices; there
        ``partial`` is an error. ``aux`` is its own in any case.

    Raises:
        TypeError: If the loss is not a real number of shape (), or the fingerprint holds no
            integer for each device.
        ValueError: If there is no example, leaves differ in their number, examples are coupled
            by a named axis, axes are not those along which ``axis_name`` may be summed, or a
            fingerprint comes inside ``shard_map`` without ``axis_name``.

    Source:
        Balles, Romero, Hennig (arXiv 1612.05086), section 4.2, for the variance within a batch.

    Example:
        >>> import jax, jax.numpy as jnp, cabs_jax
        >>> def loss_fn(weight, example):
        ...     return (weight @ example["x"] - example["y"]) ** 2
        >>> batch = {"x": jnp.eye(2), "y": jnp.array([1.0, 3.0])}
        >>> step = jax.jit(cabs_jax.value_and_grad(loss_fn))
        >>> (loss, statistics), gradient = step(jnp.zeros(2), batch)
        >>> float(loss), gradient.tolist(), float(statistics.variance_trace)
        (5.0, [-1.0, -3.0], 20.0)
    """
    single = isinstance(argnums, int)

    def measured(*args: Any, mask: Any = None, fingerprint: Any = None) -> Any:
        positions = positions_of(argnums, len(args))
        own = read_arguments(args, positions, in_axes)
        mask = None if mask is None else jnp.asarray(mask)
        axes = axes_of(axis_name, own, mask)
        traced = Traced.of(loss_fn, own, has_aux, meshes.checked_axes() & {*axes})
        check_whole(axes, traced)
        if metric is None and not bitwise:
            # Which function it is only tells how likely an equal trace is to come again.
            code = getattr(loss_fn, "__code__", None)
            options = (positions, single, sample, has_aux, code)
            found = call(partial(answer, positions, axes), traced, mask, options)
        else:
            found = answer(positions, axes, traced, mask)
        if fingerprint is None:
            return found
        (loss, statistics, *aux), gradients = found
        dtype = statistics.group_square_sum.dtype
        number = told(fingerprint, axes, dtype, own.examples)
        return (loss, replace(statistics, fingerprint=number), *aux), gradients

    def answer(positions: tuple[int, ...], axes: tuple[str, ...], traced: Traced, mask: Any) -> Any:
        of_leaves = metric
        if metric is not None and single:
            of_leaves = lambda given: (metric(given[0]),)  # noqa: E731
        found = measure(traced, positions, sample, mask, of_leaves, bitwise, axes)
        gradients = found.gradients[0] if single else found.gradients
        own = sum(found.squares[1:], start=found.squares[0])
        statistics = BatchStatistics(
            found.shares.total.astype(jnp.int32),
            found.shares.total.astype(jnp.int32),
            found.shares.sum(own),
            found.gradient_norm_squared,
            found.estimated.astype(jnp.int32),
            found.loss,
            found.summed,
            metric is not None,
        )
        if has_aux:
            return (found.loss, statistics, found.aux), gradients
        return (found.loss, statistics), gradients

    return measured


@dataclass(frozen=True)
class Result:
    """What one backward pass gives.

    Args:
        loss: The mean loss.
        aux: What else the loss function gives.
        gradients: A tuple, one entry for each argument that is differentiated.
        summed: Over which axes of a mesh JAX adds up gradients, as they are given here.
        gradient_norm_squared: The squared norm of the gradient, before that.
        squares: For each leaf of these, in order, the sum over this device's examples of squared
            norms.
        leaves: What each of these is called, and how it was measured.
        shares: How many examples there are.
        estimated: Of how many the norms are estimated from those of the others.
    """

    loss: Array
    aux: Any
    gradients: tuple[Any, ...]
    summed: tuple[str, ...]
    gradient_norm_squared: Array
    squares: list[Array]
    leaves: dict[str, Leaf]
    shares: Shares
    estimated: Array


def measure(
    traced: Traced,
    argnums: Sequence[int],
    sample: int | None = None,
    mask: Any = None,
    metric: Callable[[Any], Any] | None = None,
    bitwise: bool = False,
    axes: tuple[str, ...] = (),
) -> Result:
    """Run the loss of one example for all of them, forward and backward, and measure."""
    own, arguments, closed = traced.own, traced.arguments, traced.closed
    examples = own.examples
    if sample is not None:
        sample = min(as_integer(sample, "sample", 1), examples)
    counted = _counted(mask, examples)
    args = arguments.trees()
    scope = read(closed, arguments.statuses)
    terms = penalties.separate(scope)
    uses = uses_of(scope)
    inputs = scope.inputs[: len(arguments.leaves)]
    leaves = {
        value: plan_leaf(value, uses[value], is_elementwise=metric is not None)
        for value in inputs
        if value in uses
    }
    names = dict(zip(inputs, arguments.paths, strict=True))
    perturbed = Perturbations.of(leaves)
    anchor = meshes.varying(_anchor(arguments), arguments.varying)
    if mask is not None:
        mask = meshes.automatic(jnp.asarray, mask, like=jax.typeof(anchor))
    (ahead,) = meshes.spec_of(jax.typeof(anchor))
    zeros = jax.tree.map(
        lambda one: meshes.broadcast(anchor, one, ahead).astype(one.dtype), perturbed.flat()
    )

    def backward(taps: Taps, leaves_of_all: Any, consts: Any, mask: Any, zeros: Any) -> Any:
        """Return ``((loss, aux), gradients of both)``, with all that these depend on as inputs."""
        taken = arguments.with_leaves(leaves_of_all)
        args = taken.trees()

        def mean_loss(parameters: Any, perturbations: Any) -> tuple[Array, Any]:
            given = _with(taken, argnums, parameters, args)

            def one(batched: list[Any], flat: Any, anchor: Array) -> Any:
                found = iter(batched)
                own = [
                    leaf if axis is None else next(found)
                    for leaf, axis in zip(given, taken.axes, strict=True)
                ]
                return run(scope, leaves, taps, [*own, *consts], perturbed.rebuilt(flat), anchor)

            batched = taken.with_leaves(given).batched
            rows = [leaf if mask is None else filled(leaf, axis, mask) for leaf, axis in batched]
            axes = [axis for _, axis in batched]
            losses, *aux = jax.vmap(one, in_axes=(axes, 0, 0))(rows, perturbations, anchor)
            if mask is None:
                return jnp.mean(losses), aux
            total = jnp.sum(jnp.where(mask, losses, jnp.zeros_like(losses)))
            # 0 where nothing counts, as a device's share of a batch that was filled up.
            return total / jnp.maximum(_counted(mask, examples), 1).astype(losses.dtype), aux

        parameters = tuple(args[at] for at in argnums)
        return jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)(parameters, zeros)

    taps = Taps(names, sample or examples, is_summed=False)
    once = partial(backward, taps)
    if not bitwise and _is_worthwhile(arguments, sample):
        once = _differentiated_as(once, partial(backward, taps.summing()))
    (loss, aux), (gradients, flat_found) = once(arguments.leaves, closed.consts, mask, zeros)
    found = perturbed.rebuilt(flat_found)
    sampled = _counted(mask, examples, sample)
    share = jnp.ones((), jnp.float32) if sample in (None, examples) else counted / sampled
    shares = Shares.of(axes, counted, None if mask is None else examples)
    mean = jax.tree.map(shares.mean, gradients)
    given = _summed(mean, own, argnums)
    weights: dict[Value, Any] = {}
    in_metric = None
    if metric is not None:
        in_metric = metric_of(metric, given)
        flat = jax.tree.leaves(_with(arguments, argnums, in_metric, args))
        weights = {value: one for value, one in zip(inputs, flat, strict=True) if value in leaves}
    squares = {}
    for value, leaf in leaves.items():
        how = _square if metric is None else _weighted_square
        marked = [found.of_leaf(value, leaf), *([weights[value]] if weights else [])]
        square = meshes.automatic(partial(how, leaf, sample=sample), *marked)
        squares[value] = square * (counted**2 * share).astype(square.dtype)
    if terms:
        known = dict(zip(scope.inputs, [*arguments.leaves, *closed.consts], strict=True))
        shifts = penalties.gradients(terms, list(leaves), known)
        flat = jax.tree.leaves(_with(arguments, argnums, gradients, args))
        for value, gradient in zip(inputs, flat, strict=True):
            if value in leaves:
                weight = weights.get(value, 1.0)
                shift = squares[value], counted, gradient, shifts[value], weight
                squares[value] = meshes.automatic(penalties.shifted, *shift)
    return Result(
        shares.mean(loss),
        jax.tree.unflatten(traced.structure, aux),
        given,
        tuple(sorted(traced.summed - {*axes})),
        square_of(mean) if in_metric is None else square_in(in_metric, mean),
        [squares[value] for value in leaves],
        {names[value]: leaf for value, leaf in leaves.items()},
        shares,
        shares.sum(counted - sampled),
    )


def _differentiated_as(plain: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Return a function whose derivatives are those of another one, which has the same values.

    Sums of what is squared are no function of the parameters that JAX could differentiate.
    """
    found = jax.custom_jvp(function)
    found.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return found


def _is_worthwhile(arguments: Arguments, sample: int | None) -> bool:
    """Return whether gradients that are sums of those of the examples are cheaper than JAX's.

    That was measured on a CPU, where examples are on one device.
    """
    return (
        sample in (None, arguments.examples)
        and jax.default_backend() == "cpu"
        and meshes.explicit_mesh(map(jax.typeof, arguments.leaves)) is None
    )


def _summed(gradients: tuple[Any, ...], own: Arguments, argnums: Sequence[int]) -> Any:
    """Return gradients as JAX gives them: those of what is the same on all devices are added up."""

    def added(gradient: Array, leaf: Any) -> Array:
        axes = meshes.varying_of(jax.typeof(gradient)) - meshes.varying_of(jax.typeof(leaf))
        total: Array = lax.psum(gradient, tuple(sorted(axes))) if axes else gradient
        return total

    trees = own.trees()
    return jax.tree.map(added, gradients, tuple(trees[at] for at in argnums))


def _with(
    arguments: Arguments, argnums: Sequence[int], parameters: Any, args: Sequence[Any]
) -> list[Any]:
    """Return the leaves of all arguments, some of which are replaced."""
    replaced = list(args)
    for at, parameter in zip(argnums, parameters, strict=True):
        replaced[at] = parameter
    return [
        new if is_parameter else leaf
        for new, leaf, is_parameter in zip(
            jax.tree.leaves(tuple(replaced)), arguments.leaves, arguments.is_parameter, strict=True
        )
    ]


def _anchor(arguments: Arguments) -> Array:
    """Return false for each example, shape (m,), on the devices that the examples are on."""
    for leaf, axis in arguments.batched:
        if jnp.issubdtype(leaf.dtype, jnp.number):
            rest = [at for at in range(leaf.ndim) if at != axis]
            return jnp.any(leaf != leaf, axis=rest) & False
    leaf, axis = arguments.batched[0]
    return meshes.broadcast(jnp.zeros((), bool), meshes.resized(jax.typeof(leaf), [axis]))


def _counted(mask: Any, examples: int, sample: int | None = None) -> Array:
    """Return how many examples count, of all or the first so many, in float32."""
    if mask is None:
        return jnp.asarray(sample or examples, jnp.float32)
    if jnp.shape(mask) != (examples,) or not jnp.issubdtype(jnp.result_type(mask), bool):
        raise ValueError(
            f"mask must hold booleans of shape ({examples},), got {jnp.result_type(mask)} of shape "
            f"{jnp.shape(mask)}"
        )
    is_taken = mask if sample is None else mask & (jnp.arange(examples) < sample)
    return jnp.sum(is_taken, dtype=jnp.float32)


def _square(leaf: Leaf, perturbed: Any, sample: int | None) -> Array:
    """Return the sum over examples of squared norms of one parameter's gradients."""
    if leaf.mode is Mode.SQUARES:
        return jnp.sum(perturbed)
    some = jax.tree.map(lambda array: array[:sample], perturbed)
    if leaf.mode is Mode.GRADIENTS:
        return jnp.sum(reductions.square(some))
    return jnp.sum(uses.square(leaf.factors, some))


def _weighted_square(leaf: Leaf, perturbed: Any, weight: Any, sample: int | None) -> Array:
    """Return the same with each coordinate's squares multiplied by its weight."""
    some = jax.tree.map(lambda array: array[:sample], perturbed)
    if leaf.mode is Mode.GRADIENTS:
        found = reductions.wide(some)
        found = jnp.sum(jnp.real(found * jnp.conj(found)), axis=0)
    else:
        found = uses.coordinate_squares(leaf.factors, some, jnp.shape(weight))
    return jnp.sum(found * weight.astype(found.dtype))
