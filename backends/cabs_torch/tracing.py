"""Whether values are there to be looked at, or what is computed is compiled first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_is_traced: ContextVar[bool] = ContextVar("is_traced", default=False)


@contextmanager
def traced() -> Iterator[None]:
    """Take all examples at once, and look at no values: what is computed here is compiled later."""
    token = _is_traced.set(True)
    try:
        yield
    finally:
        _is_traced.reset(token)


def is_traced() -> bool:
    """Return whether what is computed is compiled later, so that there are no values yet."""
    return _is_traced.get()


def may_look(device: torch.device) -> bool:
    """Return whether values are there to be looked at, without waiting for a device."""
    return device.type == "cpu" and not is_traced()
