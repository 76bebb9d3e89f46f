"""Limits beside the defaults hold for options, methods and policies."""

from dataclasses import dataclass
from typing import Any

import pytest

from growconv.errors import ArgumentValueError, GrowthError, ScheduleError
from growconv.growth import Budget, Every, Plateau, WarmUp, WidthRates
from growconv.growth.where import Greedy, RankTrigger
from growconv.limits import Limits, limited, require_limits
from growconv.solvers import Firefly, Functional, Net2Net, Tiny


@pytest.mark.parametrize(
    ("limits", "allowed", "refused", "words"),
    [
        (Limits(least=1), [1, 7, None], [0, -3], "1 or more"),
        (Limits(above=0, most=1), [0.1, 1], [0, 1.1, float("nan")], "above 0, up to 1"),
        (Limits(least=0, below=1), [0, 0.9], [1, -0.1], "0 or more, below 1"),
        (Limits(least=0, most=1), [0, 1.0], [2, float("inf")], "0 to 1"),
        (Limits(choices=("a", "b", "c")), ["a", ["a", "c"], [], None], ["d", ["a", "d"]], "a, b or c"),
        (
            Limits(above=0, choices=("auto",)),
            ["auto", 0.5, {"_target_": "growconv.growth.Fixed"}],
            ["no", 0, True],
            "auto or a number above 0",
        ),
    ],
)
def test_limits(limits: Limits, allowed: list[Any], refused: list[Any], words: str) -> None:
    assert all(limits.allow(value) for value in allowed)
    assert not any(limits.allow(value) for value in refused)
    assert str(limits) == words


@pytest.mark.parametrize(
    ("owner", "given", "expected", "error"),
    [
        (Every, {"interval": 0}, "above 0", ScheduleError),
        (WidthRates, {"rule": "lion"}, "adam or sgd", ScheduleError),
        (Plateau, {"min_delta": 1}, "0 or more, below 1", ScheduleError),
        (WarmUp, {"steps": 4, "peak": float("inf")}, "above 0", ScheduleError),
        (Budget, {"flops": -1}, "above 0", ScheduleError),
        (Greedy, {"per": "second"}, "channel, parameter or flop", ScheduleError),
        (RankTrigger, {"gamma": 2.0}, "above 0, up to 1", ScheduleError),
        (Tiny, {"shrinkage": 1.5}, "auto or a number 0 to 1", ArgumentValueError),
        (Firefly, {"candidates": 0}, "1 or more", ArgumentValueError),
        (Functional, {"held_out": 1.0}, "above 0, below 1", ArgumentValueError),
        (Net2Net, {"keeps": "nothing"}, "function or rms", ArgumentValueError),
    ],
)
def test_what_is_outside_is_named_with_its_class_and_field(
    owner: Any, given: dict[str, Any], expected: str, error: type[GrowthError]
) -> None:
    wrong = list(given)[-1]
    with pytest.raises(error) as caught:
        owner(**given)
    assert caught.value.where == f"{owner.__name__}.{wrong}"
    assert str(caught.value.expected) == expected
    assert caught.value.got == repr(given[wrong])


@dataclass
class Owner:
    count: int = limited(above=0)
    most: int | None = limited(None, above=0)


def test_none_is_only_allowed_where_the_type_says_so() -> None:
    require_limits(Owner(1, None), ScheduleError)
    nothing: Any = None
    with pytest.raises(ScheduleError, match=r"Owner\.count"):
        require_limits(Owner(nothing, 2), ScheduleError)
