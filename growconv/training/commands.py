"""The arguments of the commands that read finished runs; nothing here needs torch."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from growconv.errors import ConfigError, did_you_mean
from growconv.training.usage import COMMANDS


class CommandParser(argparse.ArgumentParser):
    """The arguments of one command; a mistake in them is an error like any other.

    Args:
        command: its name, a key of COMMANDS.
        description: what it does.
    """

    def __init__(self, command: str, description: str) -> None:
        example = f"for example:\n  {COMMANDS[command][1]}"
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(
            f"growconv {command}", description=description, epilog=example, formatter_class=shape, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Say it as growconv says it, with what was probably meant."""
        _, _, strange = message.partition("unrecognized arguments: ")
        fix = did_you_mean(strange.split("=")[0].split(" ")[0], self._option_string_actions) if strange else None
        raise ConfigError(message, where=self.prog.split()[-1], fix=fix or f"{self.prog} --help lists them")


def compare_parser() -> CommandParser:
    """Of growconv compare."""
    parser = CommandParser("compare", "table and plots over runs: mean ± std over seeds, paired differences")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories, or folders of them (a sweep)")
    parser.add_argument(
        "--baseline",
        metavar="GROUP",
        help="group to compare with (label, or its beginning); default: the largest fixed network, else random",
    )
    parser.add_argument(
        "--by", type=_words, metavar="A,B", help="settings that distinguish groups, e.g. growth.method,model.width"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="folder for table, CSV and plots (default: comparison)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a comparison in the folder")
    return parser


def report_parser() -> CommandParser:
    """Of growconv report."""
    parser = CommandParser("report", "one run as one self-contained HTML file")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: RUN/report.html)")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write every figure as an SVG into this folder"
    )
    return parser


def export_parser() -> CommandParser:
    """Of growconv export."""
    parser = CommandParser("export", "write a run's model as ONNX or torch.export, for any batch size, verified")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory or checkpoint file")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="FILE.pt2 (torch.export) or FILE.onnx; default: RUN/model.pt2"
    )
    parser.add_argument(
        "--best", action="store_true", help="export the weights with the best validation accuracy, not the last"
    )
    return _with_trust(parser)


def grow_parser() -> CommandParser:
    """Of growconv grow."""
    parser = CommandParser("grow", "make a run's model wider or deeper once, by the run's data; verify and save it")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory or checkpoint file")
    parser.add_argument("--factor", type=float, help="grow every site to this multiple of its width")
    parser.add_argument(
        "--width",
        action="append",
        default=[],
        metavar="SITE=N",
        help="grow sites of this name or pattern to N channels",
    )
    parser.add_argument("--parameters", type=float, help="add the best channels, up to this many parameters")
    parser.add_argument("--flops", type=float, help="the same, up to this many FLOPs (2 × MACs) per forward pass")
    parser.add_argument(
        "--deepen",
        action="append",
        default=[],
        metavar="NAME",
        help="add a convolution inside the site of this name, or a copy behind the block of this path",
    )
    parser.add_argument("--method", help="growth method; default: the run's own, or tiny")
    parser.add_argument("--output", metavar="DIR", type=Path, help="the new run directory; default: RUN-grown")
    return _with_trust(parser)


def study_parser() -> CommandParser:
    """Of growconv study."""
    parser = CommandParser("study", "a fair comparison: equal epochs, equal training FLOPs, seeds; resumable")
    parser.add_argument("study", metavar="FILE", type=Path, help="the study, a YAML file")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), metavar="DIR", help="folder of the runs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for tables and plots (default: beside FILE)")
    parser.add_argument("--only", type=_words, metavar="A,B", help="only these variants")
    parser.add_argument("--seeds", type=_numbers, metavar="0,1", help="instead of the study's seeds")
    parser.add_argument("--tables", action="store_true", help="only tables and plots of the runs that exist")
    return parser


PARSERS: dict[str, tuple[Callable[[], CommandParser], str]] = {
    "compare": (compare_parser, "growconv.reporting.compare"),
    "report": (report_parser, "growconv.reporting.report"),
    "export": (export_parser, "growconv.training.export"),
    "grow": (grow_parser, "growconv.training.widen"),
    "study": (study_parser, "growconv.training.study"),
}
"""Each command with its parser and the module whose `main` carries it out."""


def _with_trust(parser: CommandParser) -> CommandParser:
    parser.add_argument("--trust", action="store_true", help="the run may build a model from outside growconv")
    return parser


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]
