"""What the runs of the study gave: one line for each, kept beside the protocol."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

RECORD = Path(__file__).with_name("results.jsonl")


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        question: of the protocol.
        variant: what was run, as a path.
        seed: of the run.
        test_loss: NLL on the test images.
        test_accuracy: on the test images.
        val_loss: NLL on the held-out images at the end.
        parameters: at the end.
        train_flops: what the run spent; of a model that was found or continued, without what came before.
        seconds: of training and growth.
        peak_mib: memory of the process, MiB; None where it was not measured.
        widths: channels by the site's name at the end.
    """

    question: str
    variant: str
    seed: int
    test_loss: float
    test_accuracy: float
    val_loss: float
    parameters: int
    train_flops: float
    seconds: float
    peak_mib: int | None = None
    widths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, question: str, variant: str, seed: int, folder: Path, peak_mib: int | None) -> "Result":
        """What a finished run directory says."""
        summary = json.loads((folder / "summary.json").read_text())
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        named = {key: summary[key] for key in ("test_loss", "test_accuracy", "parameters", "train_flops", "widths")}
        return cls(
            question, variant, seed, **named, val_loss=last["val_loss"], seconds=round(summary["seconds"], 1),
            peak_mib=peak_mib,
        )  # fmt: skip


class Record:
    """All results, by question, variant and seed.

    Args:
        path: the file of lines.
    """

    def __init__(self, path: Path = RECORD):
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.results = {self.key(result): result for result in (Result(**json.loads(line)) for line in lines)}

    @staticmethod
    def key(result: Result) -> tuple[str, str, int]:
        """What no two results share."""
        return result.question, result.variant, result.seed

    def add(self, results: Iterable[Result]) -> None:
        """Keep results, in the file too."""
        with self.path.open("a") as file:
            for result in results:
                self.results[self.key(result)] = result
                file.write(json.dumps(asdict(result)) + "\n")

    def of(self, question: str, variant: str) -> dict[int, Result]:
        """The results of a variant by their seeds."""
        found = {
            result.seed: result
            for result in self.results.values()
            if result.question == question and result.variant == variant
        }
        return dict(sorted(found.items()))

    def variants(self, question: str) -> list[str]:
        """Variants of a question in the order in which they first ran."""
        return list(dict.fromkeys(result.variant for result in self.results.values() if result.question == question))
