"""What a compiled step does, read from the program that XLA made of it.

Guarantees: a fusion is one operation, and an operation in a loop is counted once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax

# What moves no data, and what holds other operations.
FREE = frozenset("bitcast constant get-tuple-element parameter tuple".split())
HOLDING = frozenset("call conditional while".split())
WAITING = frozenset("infeed outfeed recv recv-done send send-done".split())

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?[\]})] ([\w\-]+)\((.*)$")
_HELD = re.compile(r"(?:to_apply|body|condition|\w+_computations?)=(%[\w.\-]+|\{[^}]*\})")


def operations(program: str) -> Iterator[tuple[str, str]]:
    """Yield what a compiled program does: the operation, and what is said of it."""
    found: dict[str, list[tuple[str, str]]] = {}
    entry, name = "", ""
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            entry = name if start[1] else entry
            found[name] = []
        elif name and (one := _OPERATION.match(line)):
            found[name].append((one[1], one[2]))
    waiting = [entry]
    while waiting:
        for kind, details in found[waiting.pop()]:
            if kind in HOLDING:
                for names in _HELD.findall(details):
                    waiting += [one.strip(" %{}") for one in names.split(",")]
            elif kind not in FREE:
                yield kind, details


def kernels(step: Any, *arguments: Any) -> tuple[int, int]:
    """Return how many kernels a step has, and how many of them ask the host for something."""
    program = jax.jit(step).lower(*arguments).compile().as_text()
    found = [*operations(program)]
    return len(found), sum(kind in WAITING or "callback" in details for kind, details in found)
