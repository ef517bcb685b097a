"""Several ranks of ``torch.distributed``, of which statistics know this one alone.

Guarantees: with more than one rank, a number is that of this rank's own examples, said on purpose,
or there is an error; what an engine makes of gradients during a backward pass is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import pad

from cabs_torch.errors import describe
from cabs_torch.norms import reductions

# Sums of each gradient that are compared, each over as many elements.
_BLOCKS = 1024


def check_process_group(process_group: Any) -> None:
    """Raise ValueError unless it is clear whose examples a number is to be over."""
    if process_group is not None and process_group is not False:
        raise ValueError(
            "process_group must be False, for this rank's own examples, or left out where there is "
            f"one rank, got process_group = {process_group!r}"
        )
    if process_group is None and ranks() > 1:
        raise ValueError(
            f"torch.distributed runs {ranks()} ranks, and statistics are not taken over several: "
            "pass process_group=False for those of this rank's own examples, and sum them over "
            "ranks as the documentation describes"
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
def unreduced(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Notice what somebody else makes of gradients in a backward pass, where there are ranks.

    Looks at values, which waits for the device.

    Raises:
        RuntimeError: If gradients afterwards are not those before and what the pass gave.
    """
    if ranks() == 1:
        yield
        return
    trained = [one for one in parameters if one.requires_grad]
    watched = [_Watched(one) for one in trained]
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

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._sums: list[Tensor] = []
        self._sizes: list[Tensor] = []
        if parameter.grad is not None:
            self._note(parameter.grad)

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
        if self.parameter.grad is None:
            return False
        found, _ = _sums(self.parameter.grad)
        expected, size = torch.stack(self._sums).sum(dim=0), torch.stack(self._sizes).sum(dim=0)
        slack = 64 * torch.finfo(self.parameter.grad.dtype).eps * size
        # What overflowed says nothing of who added what.
        is_near = ((found - expected).abs() <= slack) | ~expected.isfinite()
        return bool(is_near.all())


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
