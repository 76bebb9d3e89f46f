"""The arguments of every command; nothing here needs torch."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from growconv.errors import ConfigError, did_you_mean
from growconv.training.usage import COMMANDS

MODULES = {
    "compare": "growconv.reporting.compare",
    "report": "growconv.reporting.report",
    "export": "growconv.training.export",
    "grow": "growconv.training.widen",
    "study": "growconv.training.study",
}
"""Commands that read finished runs, with the module whose `main` carries each out; the others are given settings."""


class CommandParser(argparse.ArgumentParser):
    """The arguments of one command; a mistake in them is an error like any other.

    Args:
        command: its name, a key of COMMANDS.
    """

    def __init__(self, command: str) -> None:
        meaning, example = COMMANDS[command]
        super().__init__(
            f"growconv {command}", description=meaning, epilog=f"for example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        for names, options in _ARGUMENTS.get(command, _SETTINGS):
            self.add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Say it as growconv says it, with what was probably meant."""
        _, _, strange = message.partition("unrecognized arguments: ")
        fix = did_you_mean(strange.split("=")[0].split(" ")[0], self._option_string_actions) if strange else None
        raise ConfigError(message, where=self.prog.split()[-1], fix=fix or f"{self.prog} --help lists them")


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _width(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not name or not count.isdigit():
        raise argparse.ArgumentTypeError(f"this is not SITE=N with a whole number N: {text}")
    return name, int(count)


def _argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


_SETTINGS = [_argument("overrides", nargs="*")]
_SWITCHES = ("-m --multirun", "-r --run", "--resolve", "--hydra-help", "--version")
_VALUES = ("-c --cfg", "-cd --config-dir", "-cp --config-path", "-cn --config-name", "-p --package")
_HYDRA = [
    *_SETTINGS,
    *(_argument(*names.split(), action="store_true") for names in _SWITCHES),
    *(_argument(*names.split()) for names in _VALUES),
    _argument("-i", "--info", nargs="?", const="all"),
    _argument("-sc", "--shell-completion", nargs="?", const=""),
]
_RUN = _argument("run", metavar="RUN", type=Path, help="run directory or checkpoint file")
_TRUST = _argument("--trust", action="store_true", help="the run may build a model from outside growconv")
_ARGUMENTS = {
    **dict.fromkeys(("train", "search", "family"), _HYDRA),
    "compare": [
        _argument("runs", metavar="RUN", nargs="+", help="run directories, or folders of them (a sweep)"),
        _argument(
            "--baseline", metavar="GROUP", help="group to compare with; default: the largest fixed network, else random"
        ),
        _argument("--by", type=_words, metavar="A,B", help="settings that tell groups apart, such as model.width"),
        _argument("--output", type=Path, default=Path("comparison"), metavar="DIR", help="folder; default: comparison"),
        _argument("--overwrite", action="store_true", help="replace a comparison in the folder"),
    ],
    "report": [
        _argument("run", metavar="RUN", type=Path, help="run directory"),
        _argument("--output", type=Path, metavar="FILE", help="file to write (default: RUN/report.html)"),
        _argument("--figures", type=Path, metavar="DIR", help="also write every figure as an SVG into this folder"),
    ],
    "export": [
        _RUN,
        _argument("--output", type=Path, metavar="FILE", help="FILE.pt2 or FILE.onnx; default: RUN/model.pt2"),
        _argument("--best", action="store_true", help="the weights with the best validation accuracy, not the last"),
        _TRUST,
    ],
    "grow": [
        _RUN,
        _argument("--factor", type=float, help="grow every site to this multiple of its width"),
        _argument(
            "--width", type=_width, action="append", default=[], metavar="SITE=N", help="sites or a pattern to N"
        ),
        _argument("--parameters", type=float, help="add the best channels, up to this many parameters"),
        _argument("--flops", type=float, help="the same, up to this many FLOPs (2 × MACs) per forward pass"),
        _argument(
            "--deepen",
            action="append",
            default=[],
            metavar="NAME",
            help="add a convolution inside the site of this name, or a copy behind the block of this path",
        ),
        _argument("--method", help="growth method; default: the run's own, or tiny"),
        _argument("--output", type=Path, metavar="DIR", help="the new run directory; default: RUN-grown"),
        _TRUST,
    ],
    "study": [
        _argument("study", metavar="FILE", type=Path, help="the study, a YAML file"),
        _argument("--processes", type=int, default=1, metavar="N", help="runs at a time (default: 1)"),
        _argument("--runs", type=Path, default=Path("runs/studies"), metavar="DIR", help="folder of the runs"),
        _argument("--output", type=Path, metavar="DIR", help="folder for tables and plots (default: beside FILE)"),
        _argument("--only", type=_words, metavar="A,B", help="only these variants"),
        _argument("--seeds", type=_numbers, metavar="0,1", help="instead of the study's seeds"),
        _argument("--tables", action="store_true", help="only tables and plots of the runs that exist"),
    ],
}
