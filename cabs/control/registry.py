"""The rules that can drive a controller, by name, as plain values and back.

Guarantees: a rule reads back equal to what was written; anything else is an error that says why.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, TypeVar

from cabs.control.progress import Progress
from cabs.control.rules import CABS, NoiseScale, NormTest, Rule

_RULES: dict[str, type[Any]] = {one.__name__: one for one in (CABS, NoiseScale, NormTest, Progress)}

_Kind = TypeVar("_Kind", bound=type[Rule])


def register_batch_size_rule(kind: _Kind) -> _Kind:
    """Let controllers take a rule of your own, and logs and saved states name it; a decorator.

    Args:
        kind: A subclass of :class:`cabs.control.Rule`, an immutable dataclass. Its fields are the
            settings: numbers, strings, booleans or None, which JSON holds. Its name is what logs
            and states know it by, so that whoever reads them registers it first.

    Raises:
        TypeError: If it is no such class.
        ValueError: If another rule has its name.

    Example:
        Sizes that grow with the square root of the paper's:

        >>> from dataclasses import dataclass
        >>> import cabs
        >>> from cabs.control import Known, Rule, cabs_rule, register_batch_size_rule
        >>> @register_batch_size_rule
        ... @dataclass(frozen=True)
        ... class Root(Rule):
        ...     scale: float = 1.0
        ...
        ...     def asked(self, rates: tuple[float, ...], known: Known) -> float:
        ...         trace, loss = known.averages.variance_trace, known.averages.loss
        ...         size = cabs_rule(learning_rate=rates, variance_trace=trace, loss=loss)
        ...         return self.scale * size**0.5
        >>> controller = cabs.Controller(16, rule=Root(scale=4.0))
        >>> controller.update(learning_rate=0.1, variance_trace=900.0, loss=0.9).batch_size
        40
    """
    given: object = kind
    if not (isinstance(given, type) and issubclass(given, Rule)):
        raise TypeError(f"a rule must be a subclass of cabs.control.Rule, got {kind!r}")
    if not getattr(getattr(kind, "__dataclass_params__", None), "frozen", False):
        raise TypeError(
            f"a rule must be an immutable dataclass, got {kind!r}; decorate it with "
            "@dataclasses.dataclass(frozen=True), under the registration"
        )
    known = _RULES.get(kind.__name__, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"a rule's name must be its own, got {kind!r} beside {known!r}; give it another name"
        )
    _RULES[kind.__name__] = kind
    return kind


def check_rule(rule: object) -> None:
    """Raise TypeError for what is no rule, or one that nobody registered."""
    if type(rule) not in _RULES.values():
        raise TypeError(
            f"rule must be one of {sorted(_RULES)}, as cabs.CABS(), got {rule!r}; one of your own "
            "needs @cabs.control.register_batch_size_rule"
        )


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """Return a rule's name and settings as plain values."""
    settings: Any = rule
    plain = {
        name: [list(pair) for pair in value] if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
    }
    return {"name": type(rule).__name__, **plain}


def rule_from_json(values: Any) -> Rule:
    """Return the rule that :func:`rule_to_json` wrote; ValueError if it is none."""
    if not isinstance(values, dict) or values.get("name") not in _RULES:
        raise ValueError(
            f"a rule has a name, one of {sorted(_RULES)}, got {values!r}; import the module that "
            "registers it if it is one of your own"
        )
    kind = _RULES[values["name"]]
    settings = {name: value for name, value in values.items() if name != "name"}
    names = {field.name for field in fields(kind)}
    if settings.keys() != names:
        raise ValueError(f"the rule {kind.__name__} holds {sorted(names)}, got {settings!r}")
    try:
        rule: Rule = kind(**settings)
    except TypeError as error:
        raise ValueError(f"this is no rule: {error}") from error
    return rule
