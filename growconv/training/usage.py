"""The help pages of the command line, written from the schemas and the files of conf/; nothing here needs torch."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, is_dataclass
from dataclasses import fields as dataclass_fields
from inspect import cleandoc
from typing import Any

from omegaconf import MISSING

from growconv import __version__
from growconv.training import options
from growconv.training.config import conf_dir

WIDTH = 79

# Each command with what it does and an example.
_RUN = "runs/2026-01-31/12-00-00"
COMMANDS = {
    "train": ("train a model and grow it; the command when none is named", "growconv model=resnet20 growth=functional"),
    "resume": ("continue an interrupted run, or prolong a finished one", f"growconv resume={_RUN} trainer.epochs=40"),
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
    "report": ("write a report of one run as one HTML file", f"growconv report {_RUN}"),
}
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
FLAGS = {
    "-m, --multirun": "a sweep: one run for every combination of the listed values",
    "--cfg job": "print the settings that a run would use, and stop",
    "--config-dir DIR": "a folder with further files for the groups",
    "-h, --help": "this page; train --help lists all groups and options",
    "--shell-completion install=SHELL": "code for bash, zsh (install=bash) or fish that completes words",
    "--version": "the version",
    "--hydra-help": "the help of Hydra, which reads the settings",
}


def first_page() -> str:
    """What `growconv --help` prints."""
    commands = "\n".join(f"  {name:<9}{meaning}\n{'':11}{example}" for name, (meaning, example) in COMMANDS.items())
    groups = "\n".join(_row(group, ", ".join(group_names(group))) for group in GROUPS)
    described = [row for row in _described(options.RunConfig) if row[0] in COMMON]
    common = "\n".join(_row(f"{name}={default}", meaning) for name, default, meaning, _ in described)
    flags = "\n".join(_row(flag, meaning) for flag, meaning in FLAGS.items())
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


def command_page(command: str) -> str:
    """What `growconv sites --help` or `growconv resume --help` prints."""
    meaning, example = COMMANDS[command]
    usage = "resume=RUN [OPTION=VALUE ...]" if command == "resume" else f"{command} [GROUP=NAME ...] [OPTION=VALUE ...]"
    return f"usage: growconv {usage}\n\n{meaning}, for example:\n\n  {example}"


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
