"""Statistics of the examples of all ranks, by one sum over ranks that is under way.

Guarantees: the sum starts when they are made, so that a rank that never reads keeps no other
waiting; whatever is read is of all ranks, or an error on each of them.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cabs import GradientStatistics
from cabs_torch.ranks.arrived import check_alike
from cabs_torch.ranks.share import Share
from cabs_torch.ranks.sums import arriving, begin_sum
from cabs_torch.statistics import BatchStatistics

# More than all ranks have examples, so that two counts are added up as one number, exactly.
_COUNTED = 2**26


class TotalStatistics(BatchStatistics):
    """Statistics of all ranks' examples. Whatever is read first waits for the sum over ranks.

    Every rank has the same numbers, to the bit. Of a microbatch, whose gradients are not yet
    reduced, ``examples``, ``loss`` and ``partial`` alone can be read.

    Raises:
        RuntimeError: When read, if the ranks differ in the size of the batch or in the state of
            their controllers, if they hold different gradients, or if a rank is gone.
        ValueError: If more is read of a microbatch.
    """

    _share: Share
    _ranks: int
    _is_grouped: bool
    _sums: Tensor
    _work: Any
    _numbers: list[float] | None
    """The sums over ranks, this rank's square of the gradients, and that of those held before."""

    def __init__(self, share: Share, group: Any, *, measured: float, is_grouped: bool) -> None:
        device, mark = share.squares.device, float(share.mark)
        loss = torch.zeros_like(share.alike) if share.loss is None else share.loss
        alike = share.alike
        # What no square is: on all ranks, the gradients then differ.
        if share.problem:
            alike = torch.full_like(alike, -1.0)
        elif share.before is not None:
            alike = torch.where(share.before.to(alike) == 0.0, alike, -1.0)
        known = torch.tensor(
            [
                *(share.examples * _COUNTED + share.measured, mark, mark * mark),
                # Not a number for all, if one has none.
                math.nan if share.seconds is None else share.seconds,
            ],
            dtype=torch.float64,
            pin_memory=device.type == "cuda",
        )
        sums = torch.cat(
            [
                known.to(device, non_blocking=True),
                torch.stack([loss.to(device), alike]),
                share.squares,
                share.norms,
            ]
        )
        for name, value in {
            "measured": measured,
            "in_metric": share.is_in_metric,
            "_share": share,
            "_ranks": torch.distributed.get_world_size(group),
            "_is_grouped": is_grouped,
            "_sums": sums,
            "_work": begin_sum(sums, group),
            "_numbers": None,
        }.items():
            object.__setattr__(self, name, value)

    def _read(self) -> list[float]:
        """Return the sums, of ranks that train together."""
        if self._numbers is None:
            # On a stream of its own, which waits for nothing that was queued since.
            with arriving(self._ranks), _beside(self._sums):
                self._work.wait()
                share = self._share
                before = 0.0 if share.before is None else float(share.before)
                counts, *sums = self._sums.tolist()
                numbers = [*divmod(counts, _COUNTED), *sums, float(share.alike), before]
            self._check(numbers)
            if self._share.is_in_metric and numbers[0] < self._share.batch:
                raise ValueError(
                    f"the metric of a step is made of the whole batch's gradient, got a microbatch "
                    f"of {int(numbers[0])} of {self._share.batch} examples over all ranks; leave "
                    "optimizer out, or give each rank its share in one pass"
                )
            object.__setattr__(self, "_numbers", numbers)
            return numbers
        return self._numbers

    def _check(self, numbers: list[float]) -> None:
        """Raise RuntimeError, on each rank, unless all expect the same batch and have it."""
        share, ranks = self._share, self._ranks
        examples, _, marks, squares = map(int, numbers[:4])
        is_part = share.is_by_example and share.is_told and examples < share.batch
        is_possible = is_part or examples == share.batch
        # All marks are equal if the mean of their squares is the square of their mean.
        if is_possible and ranks * squares == marks * marks:
            return
        if is_possible:
            controller = (
                "no controller was given"
                if share.fingerprint is None
                else f"its controller has fingerprint {share.fingerprint}"
            )
            each = f" in {share.each} microbatches here" if share.each else ""
            raise RuntimeError(
                f"the {ranks} ranks do not train alike: they expect batches of different sizes, "
                f"{'take different numbers of microbatches, ' if share.each else ''}or their "
                f"controllers differ. This one expects {share.batch} examples of all ranks{each}, "
                f"and {controller}. Build the controllers with the same settings, load the same "
                "state on all ranks, and call update with the same learning rates, and with what "
                "backward returned, which takes the mean of the ranks' seconds; with numbers, give "
                "seconds that are the same on all; give batch_size=loader.batch.examples where "
                "shares of the batch differ"
            )
        weighed = (
            f"batch_size = {share.batch} was given"
            if share.is_told
            else f"all shares were taken to be as large, for a batch of {share.batch}"
        )
        raise RuntimeError(
            f"the {ranks} ranks have {examples} examples together, {share.examples} of them here, "
            f"and {weighed}, so that their gradients have wrong weights: give "
            "batch_size=loader.batch.examples, the number over all ranks; if that was given, the "
            "ranks draw batches of different sizes, so load the same state of the controller on "
            "all of them"
        )

    def _read_whole(self) -> list[float]:
        """Return the sums, of a batch whose mean gradient the ranks have."""
        numbers, share = self._read(), self._share
        if numbers[0] < share.batch:
            raise ValueError(
                f"this is a microbatch, of {int(numbers[0])} examples over all ranks where "
                f"batch_size = {share.batch} was given, and has no gradient of its own: add the "
                "partial of all microbatches, and complete the sum with "
                "cabs_torch.gradient_norm_squared(parameters). If it is the whole batch, "
                "batch_size is wrong"
            )
        if share.problem:
            raise RuntimeError(share.problem)
        if numbers[-1] != 0.0:
            raise RuntimeError(
                "gradients were not zero before the pass, so that they are not those of this batch "
                "alone; call optimizer.zero_grad() before, and where this is the last of several "
                "microbatches, give the number of examples in all of them as batch_size"
            )
        check_alike(numbers[6], numbers[-2], self._ranks)
        return numbers

    @property
    def examples(self) -> int:
        """How many examples all ranks have together."""
        return int(self._read()[0])

    @property
    def groups(self) -> int:
        """How many groups they are in."""
        numbers = self._read()
        return int(numbers[0] if self._share.is_by_example else numbers[1])

    @property
    def estimated(self) -> int:
        """How many of the groups were not measured themselves."""
        return self.groups - int(self._read()[1])

    @property
    def loss(self) -> Tensor | None:
        """Mean loss of all examples, 0-d, None if no rank has said."""
        return None if self._share.loss is None else self._sums[4] / self.examples

    @property
    def group_square_sum(self) -> Tensor:
        """Sum over the groups of all ranks, 0-d or of shape (groups of parameters,)."""
        self._read()
        return self._shaped(self._sums[6 : 6 + len(self._share.squares)])

    @property
    def gradient_norm_squared(self) -> Tensor:
        """Squared norm of the mean gradient of all examples, of the same shape."""
        self._read_whole()
        return self._shaped(self._sums[6 + len(self._share.squares) :])

    @property
    def seconds_before(self) -> float | None:
        """What the step before took, the mean of all ranks' clocks; None if one has no number.

        Raises:
            ValueError: If there was no controller, which knows what this rank's clock says.
        """
        if self._share.fingerprint is None:
            raise ValueError(
                "controller must be given where the statistics are made, since its rule measures "
                "what a step costs, and ranks' clocks differ: backward(losses, "
                "controller=controller) takes the mean of their seconds; or name the overhead, as "
                "cabs.Progress(overhead=512)"
            )
        seconds = self._read()[4] / self._ranks
        return None if math.isnan(seconds) else seconds

    def _shaped(self, sums: Tensor) -> Tensor:
        return sums if self._is_grouped else sums[0]

    def read(self) -> GradientStatistics:
        """Return the same statistics as Python numbers, or as NumPy arrays of one a group."""
        numbers = self._read_whole()
        sums: Any = np.reshape(numbers[7:-2], (2, -1))
        squares, norms = sums if self._is_grouped else sums[:, 0].tolist()
        loss = None if self._share.loss is None else numbers[5] / self.examples
        return GradientStatistics(
            self.examples, self.groups, squares, norms, self.estimated, loss, self.in_metric
        )

    def __repr__(self) -> str:
        return f"TotalStatistics({self.read()})"


def _beside(tensor: Tensor) -> Any:
    return torch.cuda.stream(torch.cuda.Stream(tensor.device)) if tensor.is_cuda else nullcontext()
