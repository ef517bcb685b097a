"""Gradient statistics from groups of examples, for anything that has gradients.

Guarantees: the gradients are those of accumulation without it, to the bit, and no copy of them is
made; gradients that were there before, or came from elsewhere, give no number. Works for compiled
models, fused and opaque layers and normalization over the batch alike, since it looks at nothing
but gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cabs.gradients import PartialStatistics
from cabs.values.scalars import as_integer
from cabs_torch.errors import describe
from cabs_torch.graph.collectives import alone
from cabs_torch.graph.reentrant_checkpoints import is_reentrant_checkpoint
from cabs_torch.microbatches.passes import Passes
from cabs_torch.norms import reductions
from cabs_torch.norms.sums import SquareSums
from cabs_torch.ranks.engines import Engine
from cabs_torch.ranks.process_groups import ranks, size_of, unreduced
from cabs_torch.statistics import BatchStatistics
from cabs_torch.walk import leaves_behind


class Accumulation(Passes):
    r"""Turns gradient accumulation into statistics, with a group for each microbatch.

    Write ``accumulation.backward(loss, examples=k)`` for the mean loss of each microbatch, and
    :meth:`complete` before the optimizer's step. A hook sees each microbatch's gradient before it
    is added to the others. For K microbatches of :math:`m_k` examples each, see
    :class:`cabs.GradientStatistics`.

    Args:
        parameters: The module that is trained, or its parameters: an iterable of them, or an
            optimizer, for sums of shape (groups,). Those that do not require gradients are passed
            over. For ``fully_shard`` give the module.
        batch_size: m, how many examples all microbatches have together.
        process_group: Where ``torch.distributed`` has more than one rank, whose microbatches these
            are: those of all ranks if left out, or of the ranks of this group. An engine must leave
            the mean of the ranks' gradients in the last microbatch; in DDP, run the others inside
            of ``no_sync``, with ``fully_shard`` after ``set_requires_gradient_sync(False)``.
            ``batch_size`` is that of all ranks. ``False`` is for this rank's own microbatches:
            nothing may reduce their gradients over ranks before :meth:`complete`.
        controller: As in :func:`cabs_torch.backward`.
        in_metric: Whether norms are those in the metric of the step that the optimizer, given in
            place of parameters, takes next, as with ``optimizer`` of :func:`cabs_torch.backward`.
            Elementwise squares are kept then, as many as there are parameters.

    Raises:
        TypeError: If ``batch_size`` is no integer.
        ValueError: If no parameter requires gradients, or one is a ``DTensor`` of which no pass
            uses the whole; if ``batch_size`` is below 2.

    Example:
        >>> import torch, cabs_torch
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> accumulation = cabs_torch.Accumulation(layer.parameters(), batch_size=4)
        >>> for inputs in (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])):
        ...     accumulation.backward(layer(inputs).mean(), examples=2)
        >>> statistics = accumulation.complete()
        >>> layer.weight.grad, float(statistics.variance_trace)
        (tensor([[3.]]), 9.0)
    """

    def __init__(
        self,
        parameters: torch.nn.Module | Iterable[Tensor] | Any,
        *,
        batch_size: int,
        process_group: Any = None,
        controller: Any = None,
        in_metric: bool = False,
    ) -> None:
        super().__init__(parameters, batch_size, process_group, controller, in_metric)
        self._engine = None if self._group is None else Engine(self._parameters, self._group)
        self._partial, self._loss = PartialStatistics(), reductions.zero(self._device)
        self._seen: set[int] = set()
        self._scale: Tensor | float = 1.0
        self._weight: Tensor | float = 1.0
        self._before = self._held()
        self._versions = self._states()
        self._is_broken = False

    def backward(self, loss: Tensor, *, examples: int, scaler: Any = None) -> None:
        """Do the backward pass of a microbatch's share of the batch's mean loss.

        Args:
            loss: The microbatch's mean loss, 0-d.
            examples: How many examples it is the mean of.
            scaler: A ``torch.amp.GradScaler``, which scales the loss before the backward pass.

        Raises:
            UncoveredParameterError: If the loss was computed with numbers of other ranks, as far as
                its graph and backward pass show.
            TypeError: If ``loss`` is no tensor.
            ValueError: If it is not 0-d, has no graph, or one that none of the parameters is in, or
                there are more examples than the batch has.
            RuntimeError: If gradients were changed since the last microbatch, or are reduced over
                ranks in this one; if a backward pass failed, or a parameter is given its gradient
                in several parts.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        if loss.dim():
            raise ValueError(
                "loss must be the mean over a microbatch, 0-d, got shape "
                f"{tuple(loss.shape)}; for one loss an example, call cabs_torch.backward"
            )
        as_integer(examples, "examples", 1)
        if self._partial.examples + examples > self._batch_size:
            raise ValueError(
                f"microbatches must have {self._batch_size} examples together, got "
                f"{self._partial.examples} before and {examples} now"
            )
        if not loss.requires_grad:
            raise ValueError("loss must carry a graph to the parameters; was it detached?")
        self._check_gradients()
        # Of a batch of which an engine takes the mean over the ranks' parts.
        share = size_of(self._group) * examples / self._batch_size
        scaled = loss * share if scaler is None else scaler.scale(loss * share)
        self._scale = 1.0 if scaler is None else scaler.scale(torch.ones_like(loss)).double()
        self._weight = examples / (share * self._scale) ** 2
        squares, seen = SquareSums(), set[int]()
        root = get_gradient_edge(loss).node
        with (
            alone(root) if ranks() > 1 else nullcontext(),
            self._watched(partial(self._see, squares, seen)) as nodes,
        ):
            known, leaves = set(nodes), leaves_behind(root)
            if not any(leaf in known or is_reentrant_checkpoint(leaf) for leaf in leaves):
                raise ValueError(
                    "loss must depend on the parameters that are accumulated, got one with none of "
                    "them in its graph; give the parameters that the forward pass uses, and for "
                    "fully_shard the module"
                )
            self._is_broken = True
            is_own = self._group is None
            with unreduced(self._parameters, self._held_by) if is_own else nullcontext():
                scaled.backward()
        self._is_broken = False
        self._seen |= seen
        self._loss = self._loss + examples * loss.detach().to(self._device, torch.float64)
        self._versions = self._states()
        summed = self._summed(squares) * (self._weight / examples)
        self._partial += PartialStatistics.of_group(examples, summed)

    def complete(self) -> BatchStatistics:
        r"""Return the statistics of all microbatches, and start anew.

        Returns:
            :class:`cabs_torch.BatchStatistics` with a group for each microbatch. They are ``nan``
            if a gradient was not 0 before the first.

        Raises:
            ValueError: If there were less than two microbatches, or they do not have as many
                examples together as the batch; if nothing was measured for a group of parameters.
            RuntimeError: If gradients were changed since the last microbatch.
        """
        whole = self._partial
        if whole.groups < 2 and self._group is None:
            raise ValueError(f"at least two microbatches are needed, got {whole.groups}")
        if whole.examples != self._batch_size and self._group is None:
            raise ValueError(
                f"microbatches must have {self._batch_size} examples together, got {whole.examples}"
            )
        self._groups.check_measured(self._seen)
        self._check_gradients()
        # No branch, which would wait for the device.
        nothing = torch.where(self._before == 0.0, 0.0, torch.nan)
        loss, self._loss = self._loss, reductions.zero(self._device)
        self._partial, seen, self._seen = PartialStatistics(), self._seen, set()
        square_sum = whole.group_square_sum + nothing
        if self._engine is not None:
            self._engine.check()
        return self._completed(
            square_sum,
            examples=whole.examples,
            passes=whole.groups,
            loss=loss,
            scale=self._scale,
            required=seen,
        )

    def _check_gradients(self) -> None:
        """Raise RuntimeError if gradients are not those of the microbatches so far."""
        if self._is_broken:
            raise RuntimeError(
                "a backward pass of this accumulation has failed, and may have added a part of its "
                "gradients; set them to zero and make a new cabs_torch.Accumulation"
            )
        if not self._partial.groups:
            self._before = self._held()
        elif self._versions != self._states():
            raise RuntimeError(
                "gradients were changed between microbatches, by another backward pass, or by an "
                "optimizer; set them to zero and make a new cabs_torch.Accumulation"
            )

    def _states(self) -> list[tuple[int, int] | None]:
        """Return what changes with the gradients that parameters hold."""
        gradients = [one for parameter in self._parameters for one in self._held_by(parameter)]
        return [None if one is None else (id(one), one._version) for one in gradients]

    def _see(
        self,
        squares: SquareSums,
        seen: set[int],
        parameter: Tensor,
        gradients: tuple[Tensor | None, ...],
    ) -> None:
        if gradients[0] is None:
            return
        if id(parameter) in seen:
            raise RuntimeError(
                f"{describe(parameter)} was given its gradient in several parts, as reentrant "
                "checkpoints do; use checkpoints with use_reentrant=False"
            )
        seen.add(id(parameter))
        if self._engine is not None and parameter is self._engine.parameter:
            self._engine.see(gradients)
        if self._metric is None:
            self._square(squares, parameter, gradients[0])
        else:
            self._keep(parameter, gradients[0], self._weight)
