"""A whole training step as one compiled graph: forward pass, backward pass and statistics.

Guarantees: the statistics come from the same rules as those of :func:`cabs_torch.backward`, applied
while the step is traced, so that what they cannot cover is the same error; there is one graph
without breaks for each shape of the inputs; parameters and buffers are those of the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from cabs_torch import tracing
from cabs_torch.backward import backward
from cabs_torch.errors import describe
from cabs_torch.graph.autograd_nodes import is_leaf
from cabs_torch.options import as_groups
from cabs_torch.ranks.process_groups import check_is_local, check_is_own
from cabs_torch.statistics import BatchStatistics
from cabs_torch.walk import leaves_behind

Signature = tuple[object, ...]


class _Step(nn.Module):
    """The model, with the losses as its forward pass."""

    def __init__(self, model: nn.Module, losses_of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self._losses_of = model, losses_of

    def forward(self, *batch: Tensor) -> Tensor:
        return self._losses_of(*batch)


class CompiledStep:
    """What :func:`cabs_torch.compile` returns; call it with a batch."""

    def __init__(
        self,
        model: nn.Module,
        losses_of: Callable[..., Tensor],
        parameter_groups: Any,
        process_group: Any,
        options: dict[str, Any],
        compiler: dict[str, Any],
    ) -> None:
        self._step = _Step(model, losses_of)
        self._groups = None if parameter_groups is None else as_groups(parameter_groups)
        self._process_group = process_group
        self._options = options
        self._compiler = {"fullgraph": True, **compiler}
        self._graphs: dict[Signature, Callable[..., Any]] = {}
        self._coverage: dict[Signature, tuple[int, float]] = {}

    def __call__(self, *batch: Tensor) -> tuple[Tensor, BatchStatistics]:
        """Run a step: add the batch's gradient to what parameters hold.

        Args:
            batch: Tensors, as ``losses_of`` takes them.

        Returns:
            The losses, shape (m,), without a graph, and their statistics.

        Raises:
            ValueError: If there are several ranks and it is not said that this one's examples are
                meant.
        """
        check_is_own(self._process_group)
        device = batch[0].device.type
        parameters = dict(self._step.named_parameters())
        trained = {name: one for name, one in parameters.items() if one.requires_grad}
        # Everything that can change between steps is an input of the graph, or names it.
        frozen = {name: one for name, one in parameters.items() if not one.requires_grad}
        others: dict[str, Tensor] = {**frozen, **dict(self._step.named_buffers())}
        values = [one.detach() for one in trained.values()]
        constants = [one.detach() for one in others.values()]
        signature = (
            tuple(module.training for module in self._step.modules()),
            tuple(trained),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            *((name, *_kind(one)) for name, one in (*trained.items(), *others.items())),
            *map(_kind, batch),
        )
        if signature not in self._graphs:
            self._graphs[signature] = self._trace(signature, trained, others, batch)
        # The casts of autocast are in the graph.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            graph = self._graphs[signature]
            losses, gradients, squares, means = graph(values, constants, batch)
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                if gradient is not None:
                    held = parameter.grad
                    parameter.grad = gradient if held is None else held.add_(gradient)
        examples = len(losses)
        estimated, coverage = self._coverage[signature]
        loss = losses.double().mean()
        return losses, BatchStatistics(
            examples, examples, squares, means, estimated, loss, in_metric=False, measured=coverage
        )

    def _trace(
        self,
        signature: Signature,
        trained: dict[str, nn.Parameter],
        others: dict[str, Tensor],
        batch: Any,
    ) -> Callable[..., Any]:
        def step(values: list[Tensor], constants: list[Tensor], batch: tuple[Tensor, ...]) -> Any:
            leaves = [value.detach().requires_grad_() for value in values]
            named = dict(zip((*trained, *others), (*leaves, *constants), strict=True))
            losses = functional_call(self._step, named, batch)
            # Here other tensors stand for the parameters.
            twins = {id(one): leaf for one, leaf in zip(trained.values(), leaves, strict=True)}
            _check_leaves(losses, twins.values())
            groups = None if self._groups is None else self._groups.of(twins)
            statistics = backward(
                losses, parameter_groups=groups, process_group=False, **self._options
            )
            self._coverage[signature] = statistics.estimated, statistics.measured
            gradients = [leaf.grad for leaf in leaves]
            return (
                losses.detach(),
                gradients,
                statistics.group_square_sum,
                statistics.gradient_norm_squared,
            )

        # Tracing runs the step once, which is not to be seen in random numbers and buffers.
        values = [one.detach() for one in trained.values()]
        constants = [one.detach().clone() for one in others.values()]
        with torch.random.fork_rng(), tracing.traced(), torch.enable_grad():
            graph = make_fx(step)(values, constants, batch)
        compiled: Callable[..., Any] = torch.compile(graph, **self._compiler)
        return compiled


def _kind(tensor: Any) -> tuple[object, ...]:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a compiled step takes tensors, got {type(tensor).__name__}")
    return tensor.shape, tensor.dtype, tensor.device


def _check_leaves(losses: Tensor, known: Iterable[Tensor]) -> None:
    """Raise ValueError if losses depend on parameters that the model does not hold."""
    ids = set(map(id, known))
    for leaf in leaves_behind(losses.grad_fn) if losses.grad_fn is not None else ():
        if is_leaf(leaf) and id(leaf.variable) not in ids:
            raise ValueError(
                "model must hold all parameters that losses_of uses, but "
                f"{describe(leaf.variable)}, is not one of them; give a module that holds both"
            )


def compile(  # noqa: A001
    model: nn.Module,
    losses_of: Callable[..., Tensor],
    *,
    parameter_groups: Any = None,
    sample: int | None = None,
    chunk: int | None = None,
    process_group: Any = None,
    **compiler: Any,
) -> CompiledStep:
    """Return a training step with statistics, compiled into one graph without breaks.

    A model that was compiled by itself hides its operations from :func:`cabs_torch.backward`. Here
    the whole step is traced into operations and then compiled. It is traced and compiled again for
    each new shape of the inputs, so let a controller choose among few sizes
    (:meth:`cabs.BatchSizes.geometric`), and also when autocast or the training mode changes. Python
    numbers that ``losses_of`` uses stay what they were then; make tensors of those that change, or
    buffers. Gradients differ from those without statistics by as much as the compiler rounds
    differently.

    Args:
        model: The module whose parameters are trained, not compiled itself.
        losses_of: From a batch, one loss an example, shape (m,), by calling ``model``.
        parameter_groups: As in :func:`cabs_torch.backward`.
        sample: The same.
        chunk: The same; all at once by default, since the compiler unrolls chunks.
        process_group: With several ranks ``False``: a compiled step is about this rank's own
            examples.
        compiler: Options of ``torch.compile``.

    Returns:
        A function of a batch, which adds gradients to ``parameter.grad`` as a backward pass does,
        and returns losses and :class:`cabs_torch.BatchStatistics`.

    Raises:
        ValueError: If ``model`` holds one that reduces gradients over ranks, as DDP and FSDP do:
            its hooks are not in a compiled step.

    Example:
        >>> import torch, cabs_torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> step = cabs_torch.compile(layer, lambda x: layer(x).squeeze(1), backend="aot_eager")
        >>> losses, statistics = step(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> layer.weight.grad, round(float(statistics.variance_trace), 6)
        (tensor([[2., 0.]]), 2.0)
    """
    check_is_local(model)
    options = {"sample": sample, "chunk": chunk}
    return CompiledStep(model, losses_of, parameter_groups, process_group, options, compiler)
