"""The rules that can drive a controller, by name, as plain values and back.

Guarantees: a rule that was written reads back equal; what is none is refused with the reason.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from cabs.control.progress import Progress
from cabs.control.rules import CABS, NoiseScale, NormTest, Rule

RULES: dict[str, type[Any]] = {one.name: one for one in (CABS, NoiseScale, NormTest, Progress)}


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """Return a rule's name and settings as plain values."""
    settings: Any = rule
    plain = {
        name: [list(pair) for pair in value] if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
    }
    return {"name": rule.name, **plain}


def rule_from_json(values: Any) -> Rule:
    """Return the rule that :func:`rule_to_json` wrote; ValueError if it is none."""
    if not isinstance(values, dict) or values.get("name") not in RULES:
        raise ValueError(f"a rule has a name, one of {sorted(RULES)}, got {values!r}")
    kind = RULES[values["name"]]
    settings = {name: value for name, value in values.items() if name != "name"}
    names = {field.name for field in fields(kind)}
    if settings.keys() != names:
        raise ValueError(f"the rule {kind.name} holds {sorted(names)}, got {settings!r}")
    try:
        rule: Rule = kind(**settings)
    except TypeError as error:
        raise ValueError(f"this is no rule: {error}") from error
    return rule
