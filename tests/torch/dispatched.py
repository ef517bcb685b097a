"""What a GPU would be given to do, seen on a CPU: every operation that PyTorch dispatches."""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They return a number of the device's to Python, or a tensor whose size depends on values.
WAITING = frozenset(
    "_local_scalar_dense equal is_nonzero masked_select nonzero unique2 _unique2 "
    "unique_consecutive unique_dim".split()
)
# No kernel runs for these: they allocate, ask for a type, or see the same memory in another shape.
_FREE = frozenset(
    "_unsafe_view promote_types empty empty_like empty_strided new_empty new_empty_strided".split()
)


class Dispatched(TorchDispatchMode):
    """Count, by their names, the operations that are dispatched and are no views."""

    def __init__(self):
        super().__init__()
        self.kernels = Counter()
        self.largest = 0
        """How many elements the largest tensor has that was returned."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        returned = [one.alias_info for one in function._schema.returns]
        is_view = any(one is not None and not one.is_write for one in returned)
        if not is_view and name not in _FREE:
            self.kernels[name] += 1
        found = function(*args, **kwargs)
        tensors = (one for one in tree_leaves(found) if isinstance(one, torch.Tensor))
        self.largest = max(self.largest, *(one.numel() for one in tensors), 0)
        return found


@contextmanager
def as_on_a_device():
    """Take the way that statistics take where looking at values would wait for a device."""
    with (
        mock.patch("cabs_torch.tracing.may_look", return_value=False),
        mock.patch("cabs.gradients.statistics._is_at_hand", return_value=False),
        Dispatched() as dispatched,
    ):
        yield dispatched.kernels
