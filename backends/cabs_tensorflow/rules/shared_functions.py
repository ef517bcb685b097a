"""Functions that terms with the same shapes share.

Guarantees: an answer is what the term itself would give. It is traced, optimized and held in memory
once for all terms that differ in nothing but their operands' values, as those of equal layers do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import tensorflow as tf


class SharedFunctions:
    """The functions of one measurement."""

    def __init__(self) -> None:
        self._functions: dict[object, Any] = {}

    def ask(self, question: Callable[[Any], Any], term: Any) -> Any:
        """Return ``question(term)``, a nest of tensors; of the term it may see all but values."""
        parts = {field.name: getattr(term, field.name) for field in fields(term)}
        operands = {name: part for name, part in parts.items() if tf.is_tensor(part)}
        fixed = tuple((name, part) for name, part in parts.items() if name not in operands)
        if any(map(tf.is_tensor, tf.nest.flatten(fixed))):
            # Sizes that are computed belong to this graph.
            return question(term)
        specs = [tf.TensorSpec(one.shape, one.dtype) for one in operands.values()]
        key = (question, type(term), fixed, *specs)
        if key not in self._functions:
            self._functions[key] = tf.function(
                lambda *given: question(replace(term, **dict(zip(operands, given, strict=True)))),
                input_signature=specs,
                autograph=False,
                # Else each call would be replaced by a copy.
                experimental_attributes={"_noinline": True},
            )
        return self._functions[key](*operands.values())
