"""Whose examples a number is over, where there are several ranks of ``torch.distributed``.

Guarantees: it is over all ranks, or over this one if that was said; where it is over this one, what
an engine makes of gradients during a backward pass is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import pad

from cabs_torch.errors import describe
from cabs_torch.norms import reductions

Held = Callable[[Tensor], Sequence[Tensor | None]]
"""From a parameter, the gradients that are held for it."""

# Sums of each gradient that are compared, each over as many elements.
_BLOCKS = 1024


def group_of(process_group: Any) -> Any:
    """Return the ranks that a number is to be over, or None for this rank alone.

    Raises:
        TypeError: If that is no process group.
        ValueError: If this rank is not in it.
    """
    if process_group is False or ranks() == 1:
        return None
    distributed = torch.distributed
    if process_group is None:
        return distributed.group.WORLD
    if process_group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group must have this rank in it; give its own group on each rank, or False "
            "for this rank's own examples"
        )
    if not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            "process_group must be a process group of torch.distributed (of a DeviceMesh, "
            "mesh.get_group()), False for this rank's own examples, or left out for all ranks, "
            f"got process_group = {process_group!r}"
        )
    return process_group if distributed.get_world_size(process_group) > 1 else None


def size_of(group: Any) -> int:
    """Return how many ranks a number is over."""
    return 1 if group is None else int(torch.distributed.get_world_size(group))


def batch_of(examples: int, batch_size: int | None, group: Any) -> int:
    """Return how many examples all ranks are taken to have, where this one has so many."""
    return size_of(group) * examples if batch_size is None else batch_size


def weighed(losses: Tensor, batch_size: int | None, group: Any) -> Tensor:
    """Return the loss whose gradient, averaged over the ranks of a group, is that of the batch."""
    batch = batch_of(len(losses), batch_size, group)
    ranks = size_of(group)
    # Where shares are equal, to the bit what DDP makes of the plain mean.
    return losses.mean() if batch == ranks * len(losses) else losses.sum() / (batch / ranks)


def check_is_own(process_group: Any) -> None:
    """Raise ValueError unless a number is to be over this rank's own examples."""
    if process_group is not False and (process_group is not None or ranks() > 1):
        raise ValueError(
            "process_group must be False, for this rank's own examples, since a compiled step "
            f"adds nothing up over {ranks()} ranks of torch.distributed, got process_group = "
            f"{process_group!r}; for statistics over all ranks call cabs_torch.backward"
        )


def ranks() -> int:
    """Return how many ranks of ``torch.distributed`` there are."""
    distributed = torch.distributed
    is_up = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_up else 1


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, of which this rank may hold a part."""
    return hasattr(tensor, "device_mesh")


def check_whole(tensors: Iterable[Tensor]) -> None:
    """Raise ValueError for a tensor of which this rank may hold a part."""
    for tensor in tensors:
        if is_distributed(tensor):
            raise ValueError(
                f"{describe(tensor)}, is a DTensor, as FSDP and tensor parallelism make them, of "
                "which this rank holds a part; take its full_tensor(), or measure on a model "
                "without them"
            )


def check_is_local(model: torch.nn.Module) -> None:
    """Raise ValueError for a model that reduces gradients over ranks by hooks."""
    check_whole(model.parameters())
    for module in model.modules():
        # By their names, since importing FSDP takes as long as half of PyTorch.
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"DistributedDataParallel", "FullyShardedDataParallel"}:
            raise ValueError(
                f"model must be one that reduces no gradients over ranks, got a "
                f"{type(module).__name__}: its hooks are not in a compiled step, so that each rank "
                "would train alone; give the module inside, and reduce the gradients afterwards"
            )


@contextmanager
def unreduced(parameters: Iterable[Tensor], held_by: Held | None = None) -> Iterator[None]:
    """Notice what somebody else makes of gradients in a backward pass, where there are ranks.

    Looks at values, which waits for the device.

    Args:
        parameters: Those whose gradients the pass gives.
        held_by: From a parameter, the gradients held for it; that of its own if left out.

    Raises:
        RuntimeError: If gradients afterwards are not those before and what the pass gave.
    """
    if ranks() == 1:
        yield
        return
    trained = [one for one in parameters if one.requires_grad]
    watched = [_Watched(one, held_by or _grad) for one in trained]
    nodes = [get_gradient_edge(one).node for one in trained]
    with ExitStack() as hooks:
        for node, one in zip(nodes, watched, strict=True):
            hooks.callback(node.register_prehook(one.add).remove)
        yield
    for one in watched:
        if not one.is_as_expected():
            raise RuntimeError(
                f"{describe(one.parameter)}, holds another gradient than this rank's backward pass "
                "gave it: something reduces gradients over ranks during the pass, as "
                "DistributedDataParallel and FSDP do, while the squares are those of this rank. "
                "Set the gradients to zero, run all microbatches inside of model.no_sync(), and "
                "reduce gradients and partial statistics together afterwards"
            )


class _Watched:
    """Sums of a parameter's gradient over blocks, as they are to be after a backward pass."""

    def __init__(self, parameter: Tensor, held_by: Held) -> None:
        self.parameter = parameter
        self._held_by = held_by
        self._sums: list[Tensor] = []
        self._sizes: list[Tensor] = []
        for gradient in self._held():
            self._note(gradient)

    def _held(self) -> list[Tensor]:
        held: list[Any] = [one for one in self._held_by(self.parameter) if one is not None]
        return [one.to_local() if is_distributed(one) else one for one in held]

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Note what the pass gives."""
        if gradients[0] is not None:
            self._note(gradients[0])

    def _note(self, gradient: Tensor) -> None:
        sums, sizes = _sums(gradient)
        self._sums.append(sums)
        self._sizes.append(sizes)

    def is_as_expected(self) -> bool:
        """Return whether the gradient is the sum of what was there and what was given."""
        if not self._sums:
            return True
        held = self._held()
        if not held:
            return False
        found = torch.stack([_sums(one)[0] for one in held]).sum(dim=0)
        expected, size = torch.stack(self._sums).sum(dim=0), torch.stack(self._sizes).sum(dim=0)
        slack = 64 * torch.finfo(held[0].dtype).eps * size
        # What overflowed says nothing of who added what.
        is_near = ((found - expected).abs() <= slack) | ~expected.isfinite()
        return bool(is_near.all())


def _grad(parameter: Tensor) -> list[Tensor | None]:
    return [parameter.grad]


def _sums(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted sums of a gradient's elements, and of their sizes, shape (blocks,).

    The weights are irregular, since some sums over gradients are 0 by their nature, as those over
    the classes of a softmax.
    """
    gradient = gradient.detach()
    if gradient.is_sparse:
        whole = gradient.coalesce()
        rows, values = whole.indices()[0], reductions.at_least_single(whole.values()).flatten(1)
        values = values * _weights(rows).to(values.dtype).unsqueeze(1)
        blocks = values.new_zeros(2, _BLOCKS, values.shape[1])
        blocks.index_add_(1, rows % _BLOCKS, torch.stack([values, values.abs()]))
    else:
        flat = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).flatten()
        flat = reductions.at_least_single(flat)
        rows = pad(flat, (0, -len(flat) % _BLOCKS)).view(_BLOCKS, -1)
        blocks = torch.stack([rows, rows.abs()])
    weights = _weights(torch.arange(blocks.shape[2], device=blocks.device)).to(blocks.dtype)
    sums, sizes = (blocks @ weights).double()
    return sums, sizes


def _weights(places: Tensor) -> Tensor:
    return places.cos() + 1.5
