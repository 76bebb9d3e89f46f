"""Every error a user can cause: one family, one shape of message.

Each class is a `GrowthError` and also the built-in error that fits, so that both ``except growconv.GrowthError`` and
``except ValueError`` work. An error is raised before anything has changed.
"""

import difflib
from collections.abc import Iterable
from functools import partial


def near(word: object, known: Iterable[object]) -> str | None:
    """The known word that was probably meant; None where none is close."""
    return next(iter(difflib.get_close_matches(str(word), map(str, known), n=1)), None)


def did_you_mean(word: object, known: Iterable[object], form: str = "{}") -> str | None:
    """For `fix` of an error: a question about the word that is `near`, written in the braces of `form`."""
    found = near(word, known)
    return f"did you mean {form.format(found)}?" if found else None


class GrowthError(Exception):
    """Base of all errors of growconv.

    Args:
        problem: what is wrong, one sentence.
        expected: what would have been right.
        got: what was found instead.
        where: module path, file or setting that the problem is about.
        fix: what to do.

    Example:
        >>> try:
        ...     growconv.site(model, "0", "nowhere", example_input=images)
        ... except growconv.GrowthError as error:
        ...     print(error.where)
        nowhere
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        got: object = None,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.expected, self.got, self.where, self.fix = problem, expected, got, where, fix
        parts = {"expected": expected, "got": got, "what to do": fix}
        lines = [f"  {label}: {value}" for label, value in parts.items() if value is not None]
        super().__init__("\n".join([f"{where}: {problem}" if where else problem, *lines]))

    def __reduce__(self) -> tuple:
        """Keep the keyword-only parts when the error crosses a process boundary."""
        parts = {"expected": self.expected, "got": self.got, "where": self.where, "fix": self.fix}
        return partial(type(self), **parts), (self.problem,)


class GrowthWarning(UserWarning):
    """Something that the user asked for is left out or limited; training goes on.

    Example:
        >>> warnings.simplefilter("ignore", growconv.GrowthWarning)
    """


class GeometryError(GrowthError, ValueError):
    """Kernel, stride, padding, dilation and input size do not fit together."""


class SiteError(GrowthError, ValueError):
    """A place in the network where channels cannot be added as asked."""


class TraceError(GrowthError, RuntimeError):
    """The model's data flow could not be followed."""


class StatisticsError(GrowthError, RuntimeError):
    """Statistics that are missing, empty, not finite or do not belong together."""


class SolverError(GrowthError, ValueError):
    """A solver was asked for something it cannot deliver."""


class SurgeryError(GrowthError, ValueError):
    """New channels that do not fit the model or its optimizer."""


class ScheduleError(GrowthError, ValueError):
    """A growth schedule, policy or budget that is contradictory or invalid."""


class DataError(GrowthError, ValueError):
    """A dataset that is missing, damaged or not of the expected shape."""


class ConfigError(GrowthError, ValueError):
    """A setting of a run that is unknown or does not fit the others."""


class CheckpointError(GrowthError, RuntimeError):
    """A checkpoint or run directory that is missing or damaged, or belongs to another run."""


class TrainingError(GrowthError, RuntimeError):
    """A training run that cannot continue."""


class ArgumentTypeError(GrowthError, TypeError):
    """An argument of the wrong type."""


class ArgumentValueError(GrowthError, ValueError):
    """An argument of the right type with an invalid value."""
