"""The mark by which a saved value is known: its format and its version.

Guarantees: what bears another mark, or none, is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check_mark(values: Any, subject: object, kind: str, name: str, version: int) -> None:
    """Raise ValueError unless ``values`` is a dictionary of format ``name`` and ``version``.

    ``subject`` and ``kind`` say in the message what was read and what it should have been.
    """
    if not isinstance(values, dict) or values.get("format") != name:
        raise ValueError(f"{subject} is no {kind}: it is {str(values)[:80]}")
    if type(values.get("version")) is not int or values["version"] != version:
        raise ValueError(
            f"{subject} is a {kind} of version {values.get('version')!r}, expected {version}; read "
            "it with the release of cabs that wrote it"
        )


def check_whole(state: dict[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError unless a state holds values of these names, and no others."""
    if set(state) != set(names):
        raise ValueError(f"this state is not whole: it holds {sorted(map(str, state))}")
