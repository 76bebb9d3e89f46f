"""The commands with their arguments, and their help pages, written from the schemas and conf/; none needs torch."""

import argparse
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, is_dataclass
from dataclasses import fields as dataclass_fields
from inspect import cleandoc
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import MISSING

from growconv import __version__
from growconv.errors import ConfigError, did_you_mean
from growconv.training import options
from growconv.training.config import conf_dir

WIDTH = 79


def _argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _width(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not name or not count.isdigit():
        raise argparse.ArgumentTypeError(f"this is not SITE=N with a whole number N: {text}")
    return name, int(count)


_SETTINGS = [_argument("overrides", nargs="*", metavar="SETTING", help="GROUP=NAME or OPTION=VALUE")]
_HYDRA = [
    *_SETTINGS,
    _argument(
        "-m", "--multirun", action="store_true", help="a sweep: one run for every combination of the listed values"
    ),
    _argument("-c", "--cfg", metavar="job", help="print the settings that a run would use, and stop"),
    _argument("-cd", "--config-dir", metavar="DIR", help="a folder with further files for the groups"),
    _argument(
        "-sc", "--shell-completion", nargs="?", const="", metavar="install=SHELL",
        help="code for bash, zsh (install=bash) or fish that completes words",
    ),
    _argument("--version", action="store_true", help="the version"),
    _argument("--hydra-help", action="store_true", help="the help of Hydra, which reads the settings"),
    *(_argument(*names.split(), action="store_true") for names in ("-r --run", "--resolve")),
    *(_argument(*names.split()) for names in ("-cp --config-path", "-cn --config-name", "-p --package")),
    _argument("-i", "--info", nargs="?", const="all"),
]  # fmt: skip
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
_EXAMPLE = "runs/2026-01-31/12-00-00"
COMMANDS = {
    "train": ("train a model and grow it; the command when none is named", "growconv model=resnet20 growth=functional"),
    "resume": (
        "continue an interrupted run, or prolong a finished one",
        f"growconv resume={_EXAMPLE} trainer.epochs=40",
    ),
    "sites": ("print where a model can grow, and why not elsewhere", "growconv sites model=resnet20 growth=tiny"),
    "study": (
        "compare methods at equal epochs and equal FLOPs, with several seeds",
        "growconv study study.yaml --processes 2",
    ),
    "compare": ("write a table and plots of several runs", "growconv compare runs/sweep"),
    "grow": ("make a run's model wider or deeper once, verify and save it", "growconv grow RUN --factor 1.5"),
    "export": ("write a run's model as ONNX or torch.export", "growconv export RUN --output model.onnx"),
    "search": (
        "find widths for a budget of inference FLOPs in a short growing run",
        "growconv search data=fashion_mnist growth.budget.flops=4e6",
    ),
    "family": (
        "train several sizes from one trunk, each with its own decay",
        "growconv family growth=net2net trainer.flops=2e10 growth.times=2",
    ),
    "report": ("write a report of one run as one HTML file", f"growconv report {_EXAMPLE}"),
}
MODULES = {
    "compare": "growconv.reporting.compare",
    "report": "growconv.reporting.report",
    "export": "growconv.training.export",
    "grow": "growconv.training.widen",
    "study": "growconv.training.study",
}
"""Commands that read finished runs, with the module whose `main` carries each out; the others are given settings."""
GROUPS = {
    "data": "the dataset",
    "model": "the network, at its full size",
    "growth": "the method that adds channels; none trains a fixed network",
    "optimizer": "how weights are trained",
    "lr_schedule": "the learning rate over the run",
    "trainer": "the training loop",
    "logger": "where metrics go besides the run directory",
    "experiment": "all settings of a published experiment or of a search",
}
# Options that the first page shows: those of most runs.
COMMON = (
    "seed", "baselines", "trainer.epochs", "trainer.batch_size", "growth.start", "growth.times", "growth.amount",
    "optimizer.lr",
)  # fmt: skip
# What some files of a group have besides the options that all of it have.
SPECIAL = {
    "data=synthetic": options.SyntheticConfig,
    "data=fashion_mnist, cifar10 or cifar100": options.StoredConfig,
    "data=images": options.ImagesConfig,
    "model=timm, torchvision, transformers or pytorchcv": options.LibraryModelConfig,
    "optimizer=sgd": options.SGDConfig,
    "optimizer=adamw": options.AdamWConfig,
    "optimizer=torch": options.TorchOptimizerConfig,
    "lr_schedule=cosine, trapezoid or constant": options.OwnScheduleConfig,
    "lr_schedule=torch": options.TorchScheduleConfig,
}


class CommandParser(argparse.ArgumentParser):
    """The arguments of one of COMMANDS; a mistake in them is an error like any other."""

    def __init__(self, command: str) -> None:
        meaning, example = COMMANDS[command]
        super().__init__(
            f"growconv {command}", usage="growconv resume=RUN [OPTION=VALUE ...]" if command == "resume" else None,
            description=meaning, epilog=f"for example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        for names, given in _ARGUMENTS.get(command, _SETTINGS):
            self.add_argument(*names, **given)

    def error(self, message: str) -> NoReturn:
        """Say it as growconv says it, with what was probably meant."""
        _, _, strange = message.partition("unrecognized arguments: ")
        fix = did_you_mean(strange.split("=")[0].split(" ")[0], self._option_string_actions) if strange else None
        raise ConfigError(message, where=self.prog.split()[-1], fix=fix or f"{self.prog} --help lists them")


def first_page() -> str:
    """What `growconv --help` prints."""
    commands = "\n".join(f"  {name:<9}{meaning}\n{'':11}{example}" for name, (meaning, example) in COMMANDS.items())
    groups = "\n".join(_row(group, ", ".join(group_names(group))) for group in GROUPS)
    described = [row for row in _described(options.RunConfig) if row[0] in COMMON]
    common = "\n".join(_row(f"{name}={default}", meaning) for name, default, meaning, _ in described)
    named = [(names, given) for names, given in _HYDRA[1:] if "help" in given]
    flags = [_row(f"{', '.join(names)} {given.get('metavar', '')}".strip(), given["help"]) for names, given in named]
    flags = "\n".join([*flags, _row("-h, --help", "this page; train --help lists all groups and options")])
    return f"""\
growconv {__version__}: convolutional networks that grow while they train

usage: growconv [COMMAND] [GROUP=NAME ...] [OPTION=VALUE ...]

commands
{commands}

groups, chosen by GROUP=NAME
{groups}

common options, with their defaults
{common}
{_row("hydra.run.dir=DIR", "where the run writes; default: runs/DATE/TIME")}

flags
{flags}

for example
  growconv                              a small network grows on digits
  growconv trainer.epochs=40 seed=1     the same, longer, with another seed
  growconv -m growth=tiny,random seed=0,1,2"""


def train_page() -> str:
    """What `growconv train --help` prints: every group with its files, every option with its meaning and default."""
    lines = ["usage: growconv [train] [GROUP=NAME ...] [OPTION=VALUE ...]", ""]
    for group, meaning in GROUPS.items():
        lines += [f"{group}=NAME: {meaning}", *(_row(name, _comment(group, name)) for name in group_names(group)), ""]
    lines += ["options with their defaults; files of a group may set others", ""]
    lines += _options(options.RunConfig)
    for choice, schema in SPECIAL.items():
        group = choice.partition("=")[0]
        lines += ["", f"with {choice}", *_options(schema, f"{group}.", own=True)]
    return "\n".join(lines)


def options_page() -> str:
    """Every group with its files and options as Markdown, for the documentation."""
    lines: list[str] = []
    for group, meaning in {"": "the run itself", **GROUPS}.items():
        lines += ["", f"## {group or 'run'}: {meaning}", ""]
        lines += [f"- `{group}={name}`: {_comment(group, name)}" for name in group_names(group)] if group else []
        lines += _option_table(group)
    return "\n".join(lines)


def _option_table(group: str) -> Iterator[str]:
    """Options of a group that all its files have, then those of some files, as a Markdown table."""
    every = _described(options.RunConfig)
    common = [row for row in every if row[0].startswith(f"{group}.") or (not group and "." not in row[0])]
    tables = [("", common)]
    for choice, schema in SPECIAL.items():
        if choice.partition("=")[0] == group:
            own = [row for row in _described(schema, f"{group}.") if row not in common]
            tables.append((f"With `{choice}` also, or with other defaults:", own))
    for title, rows in tables:
        if rows:
            yield from ("", title, "", "| option | default | meaning |", "|---|---|---|")
            for name, default, meaning, limits in rows:
                text = f"{meaning} ({limits})" if limits else meaning
                yield f"| `{name}` | `{default}` | {text.replace('|', '/')} |"


def group_names(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _options(schema: type, prefix: str = "", own: bool = False) -> Iterator[str]:
    """The rows of a schema's options; with `own` without those that its base has, too."""
    inherited = {entry.name for base in schema.__bases__ if is_dataclass(base) for entry in dataclass_fields(base)}
    for name, default, meaning, limits in _described(schema, prefix):
        if not (own and name.removeprefix(prefix) in inherited):
            yield _row(f"{name}={default}", f"{meaning} ({limits})" if limits else meaning)


def _comment(group: str, name: str) -> str:
    """The sentence that a file of a group begins with."""
    sentence = ""
    for line in (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or sentence.endswith("."):
            break
        if "@package" not in line:
            sentence = f"{sentence} {line.lstrip('# ')}".strip()
    return sentence


def _row(name: str, meaning: str) -> str:
    """A name, and its meaning beside it or, for a long name, below."""
    lines = textwrap.wrap(meaning, WIDTH - 30) or [""]
    head = [f"  {name:<26}  {lines.pop(0)}".rstrip()] if len(name) <= 26 else [f"  {name}"]
    return "\n".join([*head, *(" " * 30 + line for line in lines)])


def _described(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Name, default, meaning and numeric limits of every option of a schema, groups opened."""
    meanings = _meanings(schema)
    for entry in dataclass_fields(schema):
        path = f"{prefix}{entry.name}"
        if is_dataclass(entry.type) and isinstance(entry.type, type):
            yield from _described(entry.type, f"{path}.")
        else:
            limits = entry.metadata.get("limits")
            stated = str(limits) if limits is not None and not limits.choices else ""
            yield path, _default(entry), meanings.get(entry.name, "").rstrip("."), stated


def _default(entry: Field[Any]) -> str:
    value = entry.default
    if value is NO_DEFAULT and entry.default_factory is not NO_DEFAULT:
        value = entry.default_factory()
    if value is NO_DEFAULT or value == MISSING:
        return "..."
    shown = {None: "null", True: "true", False: "false"}
    return shown[value] if value is None or isinstance(value, bool) else str(value).replace("'", "")


def _meanings(schema: type) -> dict[str, str]:
    """The Attributes of a schema's docstring and of its bases'."""
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        _, _, section = cleandoc(kind.__doc__ or "").partition("Attributes:\n")  # indented until Python 3.12
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found
