"""Limits of options and of the hyperparameters of methods and policies, stated beside their defaults."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from growconv.errors import GrowthError


@dataclass(frozen=True)
class Limits:
    """What an option may be."""

    least: int | float | None = None  # smallest value
    above: int | float | None = None  # what it has to exceed
    most: int | float | None = None  # largest value
    below: int | float | None = None  # what it has to stay under
    choices: tuple[str, ...] = ()  # the words that it may be

    def allow(self, value: object) -> bool:
        """Whether a value is within; each entry of a list is looked at, null and mappings pass."""
        if isinstance(value, Sequence) and not isinstance(value, str):
            return all(self.allow(entry) for entry in value)
        if isinstance(value, str):
            return value in self.choices
        if isinstance(value, bool):
            return {self.least, self.above, self.most, self.below} == {None}  # not where numbers are limited
        if value is None or isinstance(value, Mapping):
            return True
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The limits in words."""
        said = {"{:g} or more": self.least, "above {:g}": self.above, "up to {:g}": self.most, "below {:g}": self.below}
        numbers = ", ".join(words.format(bound) for words, bound in said.items() if bound is not None)
        if self.least is not None and self.most is not None:
            numbers = f"{self.least:g} to {self.most:g}"
        words = [*self.choices, f"a number {numbers}" if self.choices else numbers] if numbers else self.choices
        return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def limited(default: Any = MISSING, **limits: Any) -> Any:
    """A dataclass field with the limits that are fields of `Limits`; without a default it has to be given."""
    return field(default=default, metadata={"limits": Limits(**limits)})


def require_limits(owner: object, error: type[GrowthError]) -> None:
    """Refuse a dataclass one of whose fields is outside its limits; None only where the field's type has it."""
    for each in fields(owner) if is_dataclass(owner) else ():
        value, allowed = getattr(owner, each.name), each.metadata.get("limits")
        if allowed is None or (allowed.allow(value) and (value is not None or "None" in str(each.type))):
            continue
        place = f"{type(owner).__name__}.{each.name}"
        raise error("this value cannot be used", expected=allowed, got=repr(value), where=place)
