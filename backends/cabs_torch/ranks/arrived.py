"""Where the mean of the ranks' gradients lies after a backward pass.

Guarantees: a piece that several ranks hold is counted once; gradients that have not arrived, or
that differ from rank to rank, are an error.
Knows two kinds of engine: those that leave the mean in ``.grad`` of what the pass used, on every
rank, as ``DistributedDataParallel`` does, and ``fully_shard``, which leaves each rank a piece.
"""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cabs_torch.errors import describe
from cabs_torch.norms.sums import SquareSums, Weights
from cabs_torch.ranks.process_groups import is_distributed
from cabs_torch.ranks.sums import arriving, begin_sum

# What fully_shard keeps of each parameter, by the ids of the piece and of the whole.
_known: dict[int, weakref.ref[Any]] = {}

# The parameters that were looked for.
_sought: dict[int, weakref.ref[Tensor]] = {}


def as_used(parameter: Tensor) -> Tensor:
    """Return what a pass uses in place of a parameter, the whole where ``fully_shard`` holds it."""
    shared = of_fully_shard(parameter) if is_distributed(parameter) else None
    whole = getattr(shared, "_unsharded_param", None)
    return parameter if whole is None else whole


def arrived_for(parameter: Tensor) -> Any:
    """Return the gradient that an engine has left for a parameter, None if there is none."""
    if parameter.grad is not None:
        return parameter.grad
    shared = of_fully_shard(parameter)
    return None if shared is None else shared.sharded_param.grad


def pieces_of(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return this rank's pieces of what passes use, where ``fully_shard`` holds it, by its id."""
    given = list(parameters)
    unknown = [one for one in given if of_fully_shard(one, search=False) is None]
    # Looked for once in a parameter's life, in programs that have FSDP.
    if "torch.distributed.fsdp" in sys.modules and any(
        id(one) not in _sought or _sought[id(one)]() is not one for one in unknown
    ):
        _search()
        _sought.update((id(one), weakref.ref(one)) for one in unknown)
    shared = {id(one): of_fully_shard(one, search=False) for one in given}
    return {key: one.sharded_param for key, one in shared.items() if one is not None}


def make_whole(model: torch.nn.Module) -> None:
    """Have ``fully_shard`` make the parameters that passes use, which it does in the first one."""
    if any(is_distributed(one) and as_used(one) is one for one in model.parameters()):
        module: Any
        for module in model.modules():
            # By its methods, since importing FSDP takes as long as half of PyTorch.
            if hasattr(module, "unshard") and hasattr(module, "reshard"):
                module.unshard()
                module.reshard()


def of_fully_shard(parameter: Tensor, *, search: bool = True) -> Any:
    """Return what ``fully_shard`` knows of a parameter, given as the piece or as the whole."""
    reference = _known.get(id(parameter))
    found = None if reference is None else reference()
    if found is not None and any(one is parameter for one in _halves(found)):
        return found
    if not search:
        return None
    _search()
    return of_fully_shard(parameter, search=False)


def _search() -> None:
    # By their name, since importing FSDP takes as long as half of PyTorch.
    every = [one for one in gc.get_objects() if type(one).__name__ == "FSDPParam"]
    _known.clear()
    _known.update((id(half), weakref.ref(one)) for one in every for half in _halves(one))


def _halves(one: Any) -> list[Any]:
    """Return the piece and the whole, which there is after a first forward pass."""
    return [getattr(one, name, None) for name in ("sharded_param", "_unsharded_param")]


class MeanGradient:
    """The gradient over all ranks, as far as this one holds it.

    Args:
        parameters: Those that are measured, as the pass or the optimizer has them.
        group: Ranks that train together.
        required: The ids of those that the pass has given a gradient.

    Raises:
        ValueError: If a gradient lies on other ranks than those of the group.
    """

    def __init__(
        self, parameters: Iterable[Tensor], group: Any, required: Iterable[int] = ()
    ) -> None:
        ranks = torch.distributed.get_process_group_ranks(group)
        required = set(required)
        self.problem = ""
        """Why this is not the mean gradient."""
        self._whole: list[tuple[int, Tensor, Tensor]] = []
        self._pieces: dict[int, list[tuple[int, Tensor]]] = {}
        """By how many ranks hold the same piece."""
        meshes: dict[int, list[int]] = {}
        for parameter in parameters:
            is_required = id(parameter) in required
            gradient: Any = arrived_for(parameter) if is_required else parameter.grad
            if gradient is None:
                if is_required and not self.problem:
                    self.problem = (
                        f"{describe(parameter)}, holds no gradient after the backward pass: an "
                        "engine has taken it away and left no mean over ranks. cabs_torch knows "
                        "DistributedDataParallel and fully_shard; with others, give "
                        "process_group=False for this rank's own statistics"
                    )
                continue
            if not is_distributed(gradient):
                self._whole.append((id(parameter), parameter, gradient))
                continue
            mesh = gradient.device_mesh
            if id(mesh) not in meshes:
                meshes[id(mesh)] = sorted(mesh.mesh.flatten().tolist())
            if meshes[id(mesh)] != sorted(ranks):
                raise ValueError(
                    f"{describe(parameter)}, has its gradient on ranks {meshes[id(mesh)]}, and the "
                    f"statistics are over ranks {sorted(ranks)}; give the group of the former as "
                    "process_group"
                )
            copies = _copies(gradient)
            self._pieces.setdefault(copies, []).append((id(parameter), gradient.to_local()))
        self._group, self._ranks = group, len(ranks)

    def squares(
        self,
        number_of: Callable[[int], int],
        count: int,
        device: torch.device,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the squared norm, and the square of what every rank holds.

        Args:
            number_of: From a parameter's id, the number of its group.
            count: How many groups there are.
            device: Where the sums are to be.
            weights: What each coordinate's square counts in the norm, if not one.

        Returns:
            Shape (count,), and 0-d: the latter is the same on all ranks if the gradients are.
        """
        whole = ((owner, gradient) for owner, _, gradient in self._whole)
        alike = _sum(whole, number_of, count, device)
        if weights is not None:
            return self._weighed(weights, number_of, count, device), alike.sum()
        shares = alike / self._ranks
        for copies, pieces in self._pieces.items():
            shares = shares + _sum(pieces, number_of, count, device) / copies
        return shares, alike.sum()

    def _weighed(
        self,
        weights: Weights,
        number_of: Callable[[int], int],
        count: int,
        device: torch.device,
    ) -> Tensor:
        if self._pieces:
            raise ValueError(
                "optimizer must not be given where fully_shard leaves each rank a piece of a "
                "gradient, since squares of its elements are of the whole; measure without it"
            )
        squares = SquareSums()
        for owner, parameter, gradient in self._whole:
            squares.weigh(owner, gradient, weights(parameter))
        return squares.by_group(number_of, count, device) / self._ranks

    def summed(self, number_of: Callable[[int], int], count: int, device: torch.device) -> Tensor:
        """Return the squared norm, by a sum over ranks, shape (count,).

        Raises:
            RuntimeError: If the ranks hold different gradients.
        """
        shares, alike = self.squares(number_of, count, device)
        sums = torch.cat([shares, alike.reshape(1)])
        with arriving(self._ranks):
            begin_sum(sums, self._group).wait()
        check_alike(float(sums[-1]), float(alike), self._ranks)
        return sums[:-1]


def check_alike(total: float, own: float, ranks: int) -> None:
    """Raise RuntimeError unless what this rank holds is what all hold, by the sum over ranks."""
    # What overflowed says nothing of who reduced what.
    if math.isfinite(total) and abs(total - ranks * own) > 1e-6 * abs(total):
        raise RuntimeError(
            f"the {ranks} ranks hold different gradients, with a squared norm of {own:g} here and "
            f"of {total / ranks:g} on average, so that nobody has averaged them: wrap the model "
            "in DistributedDataParallel, leave its no_sync() for the last pass, or call "
            "fully_shard. If a parameter is used on some ranks alone, give "
            "parameters=model.parameters(). Or a rank had gradients before the pass, and says so. "
            "process_group=False gives this rank's own statistics"
        )


def _sum(
    gradients: Iterable[tuple[int, Tensor]],
    number_of: Callable[[int], int],
    count: int,
    device: torch.device,
) -> Tensor:
    squares = SquareSums()
    for owner, gradient in gradients:
        squares.square(owner, gradient)
    return squares.by_group(number_of, count, device)


def _copies(gradient: Any) -> int:
    """Return how many ranks hold the same piece of a DTensor."""
    copies = 1
    for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
        if placement.is_partial():
            raise ValueError(
                "a gradient is a DTensor that its ranks have yet to add up, as tensor parallelism "
                "makes them; statistics are over data parallel ranks alone"
            )
        copies *= size if placement.is_replicate() else 1
    return copies
