"""Gradient statistics from the backward passes of a training loop that somebody else has written.

Guarantees: nothing of the loop is changed, and its gradients are those that it had; passes that are
not those of one batch, as far as it can be seen, give an error in place of a number. An error is
raised in ``complete()``, never from inside of a backward pass, so that the loop can go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor

from cabs.values.scalars import as_integer
from cabs_torch.errors import between_ranks, describe, describe_some
from cabs_torch.graph.collectives import functions_watched, look_behind, roots_watched
from cabs_torch.microbatches.passes import Passes
from cabs_torch.norms import reductions
from cabs_torch.norms.sums import SquareSums
from cabs_torch.ranks.engines import Smallest
from cabs_torch.ranks.process_groups import ranks, size_of
from cabs_torch.statistics import BatchStatistics

# Larger than what engines lose that send gradients in half precision.
_ROUNDED = 0.01


class Microbatches(Passes):
    r"""Sees the backward passes of a step, whoever calls them, and makes each a group of examples.

    For trainers and engines that loop over microbatches themselves. Inside of the ``with`` block K
    backward passes are run by each of R ranks; :meth:`complete` comes after it and before the
    gradients are clipped or used. Each parameter's gradient is seen in its ``AccumulateGrad`` node,
    before it is added to the others or reduced over ranks. A pass ends when each parameter has had
    its gradient once. See :class:`cabs.GradientStatistics`; with groups of m / (K R) examples,

    .. math:: g_k = K \, l_k, \qquad g = \frac{1}{K R} \sum_k g_k,

    where :math:`l_k` is what a pass gives: a microbatch's mean loss is divided by K.

    Assumed, since no gradient shows it: all microbatches have as many examples, or tokens if the
    loss is a mean over those, and each loss is the mean over them divided by K, or the sum over
    them divided by the number in all microbatches. Checked, for the smallest parameter: the sum
    over passes, and the mean over ranks, is what ``.grad`` holds.

    Args:
        model: The module that is trained, whose parameters must all get a gradient in each pass; or
            the parameters that do: an iterable of them, or an optimizer, for sums of shape
            (groups,). Those that do not require gradients are passed over. For ``fully_shard`` give
            the module.
        batch_size: m, how many examples all microbatches of all ranks have together.
        microbatches: K, how many passes each rank is to run; if given, another number is an error.
        reduction: What the engine makes of the gradients of R ranks: their ``"mean"``, as
            ``DistributedDataParallel`` and ``fully_shard`` do, or their ``"sum"``, where losses are
            divided by the number of examples of all ranks, and :math:`g_k = K R \, l_k`.
        process_group: As in :class:`cabs_torch.Accumulation`.
        controller: As in :func:`cabs_torch.backward`.
        in_metric: As in :class:`cabs_torch.Accumulation`; not with a ``GradScaler``, whose scale
            would be in the metric.

    Raises:
        TypeError: If ``batch_size`` or ``microbatches`` is no integer.
        ValueError: If ``batch_size`` is below 2 or no multiple of R, ``reduction`` is neither word,
            no parameter requires gradients, or one is a ``DTensor`` of which no pass uses the
            whole.

    Example:
        >>> import torch, cabs_torch
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> with cabs_torch.Microbatches(layer, batch_size=4) as groups:
        ...     for inputs in (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])):
        ...         (layer(inputs).mean() / 2).backward()
        >>> statistics = groups.complete()
        >>> layer.weight.grad, float(statistics.variance_trace)
        (tensor([[3.]]), 9.0)
    """

    def __init__(
        self,
        model: torch.nn.Module | Iterable[Tensor] | Any,
        *,
        batch_size: int,
        microbatches: int | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        process_group: Any = None,
        controller: Any = None,
        in_metric: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got reduction = {reduction!r}")
        super().__init__(model, batch_size, process_group, controller, in_metric)
        self._count = None if microbatches is None else as_integer(microbatches, "microbatches", 1)
        self._is_summed = reduction == "sum"
        if batch_size % (ranks := size_of(self._group)):
            raise ValueError(
                f"batch_size must be a multiple of the {ranks} ranks, each of which has as many "
                f"examples, got batch_size = {batch_size}"
            )
        self._smallest = Smallest(self._parameters, self._group)
        self._squares, self._before = SquareSums(), SquareSums()
        self._sums: list[Tensor] = []
        self._was = reductions.zero(self._device)
        self._seen: set[int] = set()
        self._problem = ""
        self._hooks: ExitStack | None = None
        self._looking = ExitStack()
        self._is_complete = False

    def __enter__(self) -> Self:
        if self._hooks is not None or self._sums or self._is_complete:
            raise RuntimeError("this was entered before; make a new cabs_torch.Microbatches a step")
        self._hooks = ExitStack()
        self._hooks.enter_context(self._watched(self._see))
        if ranks() > 1:
            self._looking.enter_context(functions_watched(self._refuse))
            self._looking.enter_context(roots_watched(partial(look_behind, see=self._refuse)))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._hooks is not None
        self._looking.close()
        self._hooks.close()
        self._hooks = None

    def _refuse(self, node: Any) -> None:
        self._problem = self._problem or str(between_ranks(node.name()))

    def _see(self, parameter: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is None or self._problem:
            return
        if id(parameter) in self._seen:
            self._problem = self._lack(f"{describe(parameter)}, was given another one")
            return
        self._seen.add(id(parameter))
        if not self._sums:
            # Only now, since the loop may set it to zero late.
            self._square_held(self._before, parameter)
        if parameter is self._smallest.parameter:
            self._smallest.see(gradients)
        if self._metric is None:
            self._square(self._squares, parameter, gradients[0])
        else:
            self._keep(parameter, gradients[0], 1.0)
        if len(self._seen) == len(self._parameters):
            # At once, so that no gradient is held while it is added to.
            self._sums.append(self._summed(self._squares))
            if len(self._sums) == 1:
                # What a pass sends, it sends in each.
                self._looking.close()
                self._was = self._summed(self._before).sum()
            self._squares, self._before, self._seen = SquareSums(), SquareSums(), set()

    def _lack(self, before_what: str) -> str:
        missing = [one for one in self._parameters if id(one) not in self._seen]
        return (
            f"{len(missing)} of {len(self._parameters)} parameters were given no gradient in "
            f"backward pass {len(self._sums) + 1} before {before_what}: {describe_some(missing)}. "
            "Each pass must give each parameter its gradient once: give the parameters that all "
            "microbatches use in place of the model, and use checkpoints with use_reentrant=False"
        )

    def complete(
        self, *, loss: Tensor | float | None = None, norm: Tensor | float | None = None
    ) -> BatchStatistics:
        r"""Return the statistics of the passes, K from each rank.

        Waits for the device. Over ranks it sums a small parameter's gradient, of 1024 elements at
        most, and a few numbers more, which are waited for when they are read.

        Args:
            loss: This rank's mean loss over its microbatches, 0-d, to be averaged over ranks and
                kept with the statistics; the same ranks give one or none.
            norm: Where gradients are clipped already: :math:`|g|` before that, as
                ``clip_grad_norm_`` returns it. Then the direction alone is checked.

        Raises:
            RuntimeError: If this is called inside of the ``with`` block, or again; if no backward
                pass was seen, or one alone and one rank, or not ``microbatches`` of them; if a pass
                gave a parameter no gradient, or several; if the first one passes numbers from rank
                to rank; if ``batch_size`` is no multiple of K R; if ``.grad`` was not zero before,
                or is not what the passes gave: something else has added to it, it was clipped, or
                the engine does another reduction. Over ranks, what only one of them can know is
                raised there when the statistics are read.
            ValueError: If there is a ``norm`` for several groups of parameters.
        """
        if self._hooks is not None:
            raise RuntimeError(
                "complete() must be called after the with block, where no pass is under way"
            )
        if self._is_complete:
            raise RuntimeError("complete() was called before; make a new Microbatches each step")
        if norm is not None and self._is_grouped:
            raise ValueError(
                "norm must not be given with an optimizer, whose groups have a norm each; call "
                "complete() before gradients are clipped"
            )
        self._is_complete = True
        count, ranks = len(self._sums), size_of(self._group)
        problem = self._why_not(count, ranks)
        if problem and self._group is None:
            raise RuntimeError(problem)
        # Also if there is a problem here: the other ranks sum over this one.
        if difference := self._difference(count, ranks, is_clipped=norm is not None):
            raise RuntimeError(problem or difference)
        each = self._batch_size // ranks
        sums = torch.stack(self._sums).sum(dim=0) if count else self._summed(SquareSums())
        if loss is not None:
            loss = torch.as_tensor(loss).detach().to(self._device, torch.float64) * each
        # Of m_k |g_k|^2, with m_k = each / K and g_k = K l_k, or K R l_k.
        weight = each * count * (ranks**2 if self._is_summed else 1)
        return self._completed(
            sums * weight,
            examples=each,
            passes=count,
            loss=loss,
            norms=None if norm is None else self._norms(norm) / ranks,
            weight=weight,
            required=map(id, self._parameters),
            problem=problem,
            each=count,
            before=self._was,
        )

    def _why_not(self, count: int, ranks: int) -> str:
        """Return why the passes are no groups of one batch, as far as this rank can tell alone."""
        if self._problem:
            return self._problem
        if not count and not self._seen:
            return (
                "no backward pass was seen: run the forward and backward passes of the step inside "
                "of the with block, on the model or parameters that were given"
            )
        if self._seen:
            return self._lack("the with block ended")
        if self._count is not None and count != self._count:
            return (
                f"microbatches = {self._count} were expected, got {count} backward passes, whose "
                "losses were divided by another number than theirs; leave out a step that the end "
                "of the data has cut short"
            )
        if count * ranks < 2:
            return "at least two microbatches are needed, got 1 of one rank"
        if self._batch_size % (count * ranks):
            return (
                f"batch_size = {self._batch_size} examples were given, which are not {count} "
                f"microbatches of one size on each of {ranks} ranks: give the number of examples "
                "of all ranks in this step, a multiple of microbatches times ranks"
            )
        if self._group is None and float(self._was) != 0.0:
            return (
                "gradients were not zero before the first backward pass, so that they are not "
                "those of these microbatches alone; call optimizer.zero_grad() before it"
            )
        return ""

    def _difference(self, count: int, ranks: int, *, is_clipped: bool) -> str:
        """Return what is wrong unless the passes' gradients are what is there now."""
        expected, arrived = self._smallest.compared()
        if not self._is_summed:
            expected = expected / ranks
        if arrived is None:
            arrived = torch.zeros_like(expected)
        if is_clipped:
            arrived = arrived * (expected.norm() / arrived.norm().clamp(min=1e-300))
        found = float((arrived - expected).norm()), float(expected.norm()), float(arrived.norm())
        # Not the other way round, since what overflowed says nothing.
        if not found[0] > _ROUNDED * found[1] + self._smallest.rounding:
            return ""
        made = f"the {'sum' if self._is_summed else 'mean'} over {ranks} ranks of " * (ranks > 1)
        other = "mean" if self._is_summed else "sum"
        return (
            f"{describe(self._smallest.parameter)}, holds another gradient than {made}what {count} "
            f"backward passes gave, with a norm of {found[2]:g} where {found[1]:g} was expected: "
            "call complete() before gradients are clipped, unscaled or set to zero, or give the "
            "norm before clipping; set them to zero before the first pass, and let nothing else "
            "add to them or divide them, as a pipeline's scale_grads does"
            + f"; if the engine makes their {other} over ranks, give reduction={other!r}"
            * (ranks > 1)
        )

    def _norms(self, norm: Any) -> Tensor:
        """Return a norm's square, shape (1,)."""
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.as_tensor(whole).detach().to(self._device, torch.float64).square().reshape(1)
