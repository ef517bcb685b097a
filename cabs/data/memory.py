"""How many examples fit into memory at once, found out while training.

Guarantees: a step that ran out of memory is repeated with smaller pieces, once everything that it
had computed is free again, and never with pieces as large as those that failed. Refuses to guess
what running out of memory looks like, and to repeat a step for any other reason.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from cabs.data.microbatches import Batch, examples_of, split
from cabs.values.scalars import as_integer

Result = TypeVar("Result")

OutOfMemory: TypeAlias = (
    type[BaseException] | tuple[type[BaseException], ...] | Callable[[Exception], bool]
)
"""A type of exceptions, several, or a function that tells whether an exception is meant."""


class MemoryCap:
    """How many examples fit at once, lowered when a step runs out of memory.

    A batch that grows reaches what a device holds at some time. :meth:`run` then goes on with
    gradients that are accumulated over smaller pieces, where the run would have ended.

    The cap belongs to a machine, a model and a precision, and is no part of a checkpoint: a run
    that is resumed elsewhere finds its own.

    Args:
        examples: The largest microbatch to begin with, at least 1.
        minimum: How low it may get; beyond, running out of memory is an error. With exact
            statistics 3, which leaves no microbatch with a single example.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If ``minimum`` is below 1, or ``examples`` below it.

    Example:
        >>> import warnings
        >>> def step(pieces):
        ...     if max(pieces) > 3:
        ...         raise MemoryError
        ...     return pieces
        >>> cap = MemoryCap(16)
        >>> with warnings.catch_warnings(action="ignore"):
        ...     cap.run(step, 10, out_of_memory=MemoryError)
        [2, 2, 2, 2, 2]
        >>> cap
        MemoryCap(2)
    """

    __slots__ = ("_examples", "_minimum")

    def __init__(self, examples: int, *, minimum: int = 1) -> None:
        self._minimum = as_integer(minimum, "minimum", 1)
        self._examples = as_integer(examples, "examples", self._minimum)

    @property
    def examples(self) -> int:
        """The largest microbatch that is tried."""
        return self._examples

    def run(
        self,
        step: Callable[[list[Batch]], Result],
        batch: Batch,
        *,
        out_of_memory: OutOfMemory,
        multiple_of: int = 1,
        release: Callable[[], Any] | None = None,
    ) -> Result:
        """Call ``step`` with the pieces of a batch, and again with smaller ones while they fail.

        After a failure the cap is half of the largest piece that was tried, in whole units. It
        stays there, so that a later batch does not fail again.

        ``step`` is called anew from its start, and must begin by setting gradients to zero; what
        accumulates statistics is made in it, too. The optimizer's step comes after ``run``, or a
        failure in it would repeat an update that was made in part. Anything else that a failed
        call has changed stays changed: random generators, running averages of batch
        normalization, buffers that were donated to it. Where errors arrive late, as on
        accelerators in JAX, it must wait for its results, with ``jax.block_until_ready``.

        On several ranks, all have to lower their caps together, or some wait for those that begin
        anew. Let ``step`` meet the others only after its own backward passes: catch the error
        there, tell all ranks of it, and raise it on each. Shares of equal size then have equal
        caps.

        Args:
            step: From the list of pieces that :func:`cabs.split` gives to anything.
            batch: What :func:`cabs.split` takes.
            out_of_memory: Which exceptions mean that memory ran out: a type, such as
                ``torch.OutOfMemoryError`` or ``tf.errors.ResourceExhaustedError``; a tuple of
                types; or a function of the exception, such as ``lambda error:
                "RESOURCE_EXHAUSTED" in str(error)`` for JAX.
            multiple_of: A unit, in examples, of which every piece is a multiple.
            release: Called before ``step`` is called again, such as ``torch.cuda.empty_cache``.

        Returns:
            What ``step`` returned.

        Raises:
            TypeError: If ``out_of_memory`` is not as described; and as :func:`cabs.split`.
            ValueError: As :func:`cabs.split`.
            Exception: What ``step`` raised, if it is something else, or pieces cannot be smaller;
                the cap is then as it was.

        Warns:
            RuntimeWarning: When the cap is lowered, from what to what.
        """
        is_meant = _as_predicate(out_of_memory)
        examples, first = examples_of(batch), self._examples
        while True:
            sizes = split(examples, max_microbatch=self._examples, multiple_of=multiple_of)
            pieces = split(batch, max_microbatch=self._examples, multiple_of=multiple_of)
            largest = max(sizes)
            try:
                return step(pieces)
            except Exception as error:
                if not is_meant(error):
                    raise
                if largest <= max(self._minimum, multiple_of):
                    # Something else takes up the memory, and may be gone another time.
                    self._examples = first
                    error.add_note(
                        f"cabs.MemoryCap: microbatches of {largest} examples are not made smaller"
                    )
                    raise
            # Only here, outside of the except block, is the error gone, whose traceback holds the
            # frames of the step and all that they computed. Some of it may be in cycles.
            del pieces
            gc.collect()
            if release is not None:
                release()
            lower = max(largest // multiple_of // 2 * multiple_of, self._minimum)
            before, self._examples = self._examples, lower
            warnings.warn(
                f"out of memory with a microbatch of {largest} examples; the cap is lowered from "
                f"{before} to {self._examples} examples",
                RuntimeWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"MemoryCap({self._examples})"


def _as_predicate(out_of_memory: Any) -> Callable[[Exception], bool]:
    types = out_of_memory if isinstance(out_of_memory, tuple) else (out_of_memory,)
    if types and all(isinstance(one, type) and issubclass(one, BaseException) for one in types):
        return lambda error: isinstance(error, types)
    if isinstance(out_of_memory, (type, tuple)) or not callable(out_of_memory):
        raise TypeError(
            "out_of_memory must be a type of exceptions, a tuple of them, or a function of an "
            f"exception, got out_of_memory = {out_of_memory!r}; in PyTorch it is "
            "torch.OutOfMemoryError"
        )
    return out_of_memory  # type: ignore[no-any-return]
