"""Where the mean of the ranks' gradients lies after a backward pass, and who made it.

Guarantees: a piece that several ranks hold is counted once; a gradient that has not arrived, or
that is a sum where a mean was expected, is an error.
Knows two kinds of engine: those that leave the mean in ``.grad`` of what the pass used, on every
rank, as ``DistributedDataParallel`` does, and ``fully_shard``, which leaves each rank a piece.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabs_torch.errors import describe
from cabs_torch.norms.sums import SquareSums, Weights
from cabs_torch.ranks.process_groups import is_distributed

# What fully_shard keeps of each parameter, by the ids of the piece and of the whole.
_known: dict[int, weakref.ref[Any]] = {}

# The parameters that were looked for.
_sought: dict[int, weakref.ref[Tensor]] = {}

# What parameters' engines have said that they do; the first answer is that of all steps.
_asked: dict[int, tuple[weakref.ref[Tensor], _Answer]] = {}

# As often as gradients that are 0, or overflow, may leave them without an answer.
_ANSWERED = 16

# Relative difference of gradients that are the same, of the same examples.
_SAME = 1e-9

# Elements that tell a sum from a mean.
_ELEMENTS = 1024


def as_used(parameter: Tensor) -> Tensor:
    """Return what a pass uses in place of a parameter, the whole where ``fully_shard`` holds it."""
    shared = _of_fully_shard(parameter) if is_distributed(parameter) else None
    whole = getattr(shared, "_unsharded_param", None)
    return parameter if whole is None else whole


def arrived_for(parameter: Tensor) -> Any:
    """Return the gradient that an engine has left for a parameter, None if there is none."""
    if parameter.grad is not None:
        return parameter.grad
    shared = _of_fully_shard(parameter)
    return None if shared is None else shared.sharded_param.grad


def pieces_of(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return this rank's pieces of what passes use, where ``fully_shard`` holds it, by its id."""
    given = list(parameters)
    unknown = [one for one in given if _of_fully_shard(one, search=False) is None]
    # Looked for once in a parameter's life, in programs that have FSDP.
    if "torch.distributed.fsdp" in sys.modules and any(
        id(one) not in _sought or _sought[id(one)]() is not one for one in unknown
    ):
        _search()
        _sought.update((id(one), weakref.ref(one)) for one in unknown)
    shared = {id(one): _of_fully_shard(one, search=False) for one in given}
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


def _of_fully_shard(parameter: Tensor, *, search: bool = True) -> Any:
    """Return what ``fully_shard`` knows of a parameter, given as the piece or as the whole."""
    reference = _known.get(id(parameter))
    found = None if reference is None else reference()
    if found is not None and any(one is parameter for one in _halves(found)):
        return found
    if not search:
        return None
    _search()
    return _of_fully_shard(parameter, search=False)


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
            torch.distributed.all_reduce(sums, group=self._group)
        check_alike(float(sums[-1]), float(alike), self._ranks)
        return sums[:-1]


@contextmanager
def arriving(ranks: int) -> Iterator[None]:
    """Say, where a sum over ranks fails, what that means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the sums over {ranks} ranks have not arrived: a rank has ended, is later than the "
            "timeout of the process group allows, or does something else; start all ranks again "
            "from a checkpoint"
        ) from error


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


class Smallest:
    """The smallest of some parameters, which tells what becomes of the gradients passes give it.

    Args:
        parameters: Those that passes give gradients.
        group: Ranks that train together, None for this one alone.
    """

    def __init__(self, parameters: Iterable[Tensor], group: Any) -> None:
        self._group = group
        self.parameter = min(parameters, key=Tensor.numel)
        """The one that is asked about."""
        # Zeros where a rank's pass gives it nothing: the others sum over this rank too.
        self._local = self.parameter.new_zeros(_ELEMENTS, dtype=torch.float64)
        self._sizes: list[Tensor] = []

    def see(self, gradients: Sequence[Tensor | None]) -> None:
        """Note what this rank's pass gives the parameter, called before that is added."""
        if gradients[0] is not None:
            first = _first(gradients[0])
            self._local = self._local + first
            self._sizes.append(first.norm())

    @property
    def rounding(self) -> float:
        """What rounding may do to the sum, in the dtype in which it is added up."""
        sizes = float(torch.stack(self._sizes).sum()) if self._sizes else 0.0
        return 4 * torch.finfo(self.parameter.dtype).eps * sizes

    def compared(self) -> tuple[Tensor, Tensor | None]:
        """Return what all ranks' passes gave together, and what arrived; first elements of both."""
        return self._summed(), self._arrived()

    def _summed(self, *others: Tensor) -> Tensor:
        """Return the sum over ranks of what passes gave, and of others, one after another."""
        summed = torch.cat([self._local, *others])
        if self._group is not None:
            with arriving(torch.distributed.get_world_size(self._group)):
                torch.distributed.all_reduce(summed, group=self._group)
        return summed

    def _arrived(self) -> Tensor | None:
        arrived = arrived_for(self.parameter)
        if arrived is None:
            return None
        return _first(arrived.full_tensor() if is_distributed(arrived) else arrived)


class Engine(Smallest):
    """What averages the gradients of a pass over ranks, made before it.

    In the passes of a first step it is asked: the gradient of one parameter, the smallest, is
    summed over ranks and compared with what arrives. That is a collective that later steps do not
    have. All ranks have to ask at once, so they give the same parameters in the same order, or
    share some of those that they were asked about before.
    """

    def __init__(self, parameters: Iterable[Tensor], group: Any) -> None:
        held = list(parameters)
        super().__init__(held, group)
        self._held, self._is_asked = held, has_answered(held)
        self.before: Tensor | None = None
        """Square of the gradients that were there before the pass, 0-d."""
        shared = [_of_fully_shard(one, search=False) for one in held]
        pieces = [one.sharded_param for one in shared if one is not None]
        given: list[Any] = [one.grad for one in (*held, *pieces) if one.grad is not None]
        if given:
            squares = SquareSums()
            for gradient in given:
                squares.square(0, gradient.to_local() if is_distributed(gradient) else gradient)
            # At once, since the pass adds to them.
            self.before = squares.by_group(int, 1, given[0].device)[0]

    def see(self, gradients: Sequence[Tensor | None]) -> None:
        """Note what this rank's pass gives the parameter, called before that is added."""
        if not self._is_asked:
            super().see(gradients)

    def check(self, examples: int = 0, batch: int = 0) -> None:
        """Raise ValueError on every rank if the engine does not take the mean.

        Warn where all ranks have made the same gradient.

        Args:
            examples: How many this rank had in the pass, of a microbatch perhaps.
            batch: How many all ranks have in all microbatches.
        """
        if self._is_asked:
            return
        self._is_asked = True
        answer = _answer_of(self._held)
        # The last microbatch may be the first to be reduced, together with those before.
        self._local = answer.local = self._local + answer.local
        nothing = torch.zeros_like(self._local)
        arrived = self._arrived()
        counts = self._local.new_tensor([examples, batch])
        found = self._summed(nothing if arrived is None else arrived, counts)
        summed, arrived, counts = found.split([_ELEMENTS, _ELEMENTS, len(counts)])
        size, ranks = float(summed.norm()), torch.distributed.get_world_size(self._group)
        answer.examples += int(counts[0])
        # Of sums that are the same on all ranks, so that all ask again or none.
        if answer.examples >= int(counts[1]) // ranks:
            answer.times = _ANSWERED if 0.0 < size < math.inf else answer.times + 1
            answer.examples, answer.local = 0, 0.0
        is_alike = float((summed - ranks * self._local).norm()) <= _SAME * size
        if is_alike and ranks > 1 and size > 0.0:
            warnings.warn(
                f"all {ranks} ranks have made the same gradient of {describe(self.parameter)}, as "
                "they do for the same examples: give each rank a share of the batch of its own, "
                "as cabs_torch.loader does",
                RuntimeWarning,
                stacklevel=3,
            )
        # What is neither sum nor mean was not reduced, which the squares tell in every step.
        if float((arrived - ranks * summed).norm()) < 0.01 * ranks * size:
            raise ValueError(
                f"{describe(self.parameter)}, has the sum of the gradients of {ranks} ranks, where "
                "their mean was expected: let the engine average gradients, as "
                "DistributedDataParallel and fully_shard do unless they are told otherwise "
                "(set_gradient_divide_factor, communication hooks)"
            )


@dataclass(slots=True)
class _Answer:
    """What is known of that which averages some parameters' gradients."""

    times: int = 0
    """How often it was asked; all times if it has answered."""
    examples: int = 0
    """How many the microbatches of all ranks had, since it was asked about a whole batch."""
    local: Tensor | float = 0.0
    """What they gave on this rank."""


def has_answered(parameters: Iterable[Tensor]) -> bool:
    """Return whether what averages some of the parameters' gradients has said what it does."""
    return any(one.times >= _ANSWERED for one in _answers(parameters))


def _answers(parameters: Iterable[Tensor]) -> Iterator[_Answer]:
    for one in parameters:
        known, answer = _asked.get(id(one), (None, None))
        if known is not None and answer is not None and known() is one:
            yield answer


def _answer_of(parameters: Sequence[Tensor]) -> _Answer:
    """Return what is known, the same from now on for all of the parameters."""
    answer = max(_answers(parameters), key=lambda one: one.times, default=_Answer())
    _asked.update((id(one), (weakref.ref(one), answer)) for one in parameters)
    return answer


def _first(gradient: Tensor) -> Tensor:
    """Return the first elements in double precision, always as many."""
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    flat = dense.flatten()[:_ELEMENTS].double()
    return pad(flat, (0, _ELEMENTS - len(flat)))
