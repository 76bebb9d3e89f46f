"""What has grown so far, as records that can be written down and replayed on a fresh model."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from growconv.errors import CheckpointError, SurgeryError
from growconv.growth.validation import MOST, check_counts, check_edits, check_event, shapes_of, without_data
from growconv.network.surgery import GrowthEvent, apply_edits, count_parameters

FORMAT = 1


@dataclass
class GrowthHistory:
    """The growth events of a run, in the order in which they were applied.

    Attributes:
        events: one per site and round; they hold names and numbers, no tensors and no objects of the model.
    """

    events: list[GrowthEvent] = field(default_factory=list)

    def append(self, event: GrowthEvent) -> None:
        """Add the newest event."""
        self.events.append(event)

    def __iter__(self) -> Iterator[GrowthEvent]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, index: int) -> GrowthEvent:
        return self.events[index]

    def widths(self, site: str) -> list[tuple[int | None, int]]:
        """Steps and widths of one site over the run.

        Args:
            site: the site's name.

        Returns:
            (step, width after it) per event at the site.
        """
        return [(event.step, event.width_after) for event in self.events if event.site == site]

    def starts_from(self, model: nn.Module) -> bool:
        """Whether a model has the size that the first event found; True for an empty history."""
        return not self.events or count_parameters(model) == self.events[0].parameters_before

    def rehearse(self, model: nn.Module, most: int = MOST) -> nn.Module:
        """Replay on a copy of the model whose tensors have no memory.

        Args:
            model: as for `replay`; it is left as it is.
            most: entries that a tensor may have at any moment.

        Returns:
            The copy, with the shapes of the grown model.

        Raises:
            CheckpointError: the model is not the one that the history began with, or the history is forged or damaged.
        """
        if not self.starts_from(model):
            raise CheckpointError(
                "the history began with another model",
                expected=f"{self.events[0].parameters_before} parameters",
                got=f"{count_parameters(model)} parameters",
                where=type(model).__name__,
                fix="build the model with the run's own settings, before any growth and before its optimizer",
            )
        edits = [edit for event in self.events for edit in event.edits]
        check_edits(shapes_of(model), edits, most)
        twin = without_data(model)
        try:
            apply_edits(twin, edits)
        except (SurgeryError, TypeError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                "The history does not fit this model.",
                got=error,
                where=type(model).__name__,
                fix="build the model with the run's own settings, before any growth and before its optimizer",
            ) from error
        check_counts(twin, edits)
        return twin

    def replay(self, model: nn.Module, most: int = MOST) -> nn.Module:
        """Give a fresh small model the shapes of the grown one, in place.

        The new entries are zeros until weights are loaded.

        Args:
            model: the model as it was built at the start of the run; its optimizer is built afterwards.
            most: entries that a tensor may have at any moment: what the weights to be loaded could fill.

        Returns:
            The same model.

        Raises:
            CheckpointError: as `rehearse`; the model is as before.
        """
        self.rehearse(model, most)
        for event in self.events:
            apply_edits(model, event.edits)
        return model

    def to_json(self) -> str:
        """The whole history as JSON text."""
        return json.dumps({"format": FORMAT, "events": [event.to_dict() for event in self.events]})

    @classmethod
    def from_json(cls, text: str) -> "GrowthHistory":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: the text is no growth history.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError("a growth history has to be JSON", got=str(error), where="growth history") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise CheckpointError(
                "unknown kind of growth history",
                expected=f'{{"format": {FORMAT}, "events": [...]}}',
                got=text[:80],
                where="growth history",
            )
        return cls.from_records(record["events"])

    @classmethod
    def from_records(cls, records: Iterable[dict]) -> "GrowthHistory":
        """Build a history from the events' dictionaries, for example the lines of a growth.jsonl.

        Raises:
            CheckpointError: a record misses a field or has an unknown one.
        """
        try:
            records = list(records)
            for record in records:
                check_event(record)
            return cls([GrowthEvent.from_dict(record) for record in records])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "a growth event that cannot be read", got=repr(error), where="growth history", fix="restore the file"
            ) from error

    def __str__(self) -> str:
        return "\n".join(str(event) for event in self.events) or "nothing has grown yet"
