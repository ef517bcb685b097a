"""What a controller was told once: every setting, validated.

Guarantees: a configuration that exists is sound and immutable; it goes through JSON and comes back
equal.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cabs.control.averages import check_smoothing
from cabs.control.registry import check_rule, rule_from_json, rule_to_json
from cabs.control.rules import PAPER, Rule
from cabs.control.sizes import BatchSizes
from cabs.values.scalars import as_bool, as_float, as_integer

DEFAULT_SIZES = BatchSizes.range(16, 2048)


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings of a :class:`cabs.Controller`, which documents them.

    Example:
        >>> configuration = Configuration(16, smoothing=0.9)
        >>> Configuration.from_json(configuration.to_json()) == configuration
        True
    """

    batch_size: int
    sizes: BatchSizes = DEFAULT_SIZES
    smoothing: float = 0.95
    debias: bool = True
    rule: Rule = PAPER
    hysteresis: float = 0.0
    max_growth: float | None = None
    every: int = 1
    single_precision: bool = False

    def __post_init__(self) -> None:
        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.sizes, BatchSizes):
            settle("sizes", BatchSizes(self.sizes))
        settle("batch_size", as_integer(self.batch_size, "batch_size", 1))
        settle("smoothing", check_smoothing(self.smoothing))
        settle("hysteresis", as_float(self.hysteresis, "hysteresis"))
        settle("every", as_integer(self.every, "every", 1))
        for name in ("debias", "single_precision"):
            as_bool(getattr(self, name), name)
        if self.batch_size not in self.sizes:
            raise ValueError(
                f"batch_size must be one of the sizes allowed, {self.sizes!r}, got batch_size = "
                f"{self.batch_size}; the nearest is {self.sizes.nearest(self.batch_size)}"
            )
        check_rule(self.rule)
        if not (self.hysteresis >= 0.0 and math.isfinite(self.hysteresis)):
            raise ValueError(
                f"hysteresis must be at least 0 and finite, got hysteresis = {self.hysteresis}"
            )
        if self.max_growth is not None:
            settle("max_growth", as_float(self.max_growth, "max_growth"))
            if not (self.max_growth > 1.0 and math.isfinite(self.max_growth)):
                raise ValueError(
                    f"max_growth must be above 1 and finite, got max_growth = {self.max_growth}; "
                    "None sets no limit"
                )
        if self.debias and self.single_precision:
            raise ValueError("single_precision repeats the published code and excludes debias")
        if self.single_precision and self.rule != PAPER:
            raise ValueError(
                f"single_precision repeats the published code and excludes rule = {self.rule}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, one per setting."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "sizes": self.sizes.to_json(), "rule": rule_to_json(self.rule)}

    @classmethod
    def from_json(cls, values: Any) -> Configuration:
        """Return the configuration that :meth:`to_json` wrote; ValueError if it is none."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"a configuration holds {sorted(names)}, got {values!r}")
        try:
            sizes, rule = BatchSizes.from_json(values["sizes"]), rule_from_json(values["rule"])
            return cls(**{**values, "sizes": sizes, "rule": rule})
        except TypeError as error:
            raise ValueError(f"this is no configuration: {error}") from error

    def difference(self, other: Configuration) -> str:
        """Return in words which settings ``other`` has otherwise; empty if they are equal."""
        return ", ".join(
            f"{field.name} = {getattr(other, field.name)!r} there and "
            f"{getattr(self, field.name)!r} here"
            for field in dataclasses.fields(self)
            if getattr(other, field.name) != getattr(self, field.name)
        )
