"""The typed schema of conf/: every option with its type, default and meaning.

The YAML files of conf/ extend these classes, so that a misspelt key or a value of the wrong type is named before a run
starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from growconv.limits import limited

OWN_SCHEDULES = ("cosine", "trapezoid", "constant")
"""Learning rates of growconv's own, in shares of the run."""


@dataclass
class DataConfig:
    """A dataset.

    Attributes:
        name: key of growconv.training.sources.SOURCES.
        validation: share of the training samples held out for validation, the same ones in every run.
        augmentation: none, crop (shifts by up to 4 pixels), flip_crop (mirror images too) or randaugment (RandAugment
            before the other two; needs growconv[augment]).
        limit: use only this many training samples; null uses all.
        size: smaller training images at first, as [share, pixels] pairs in ascending order: up to this share of the run
            they are scaled to squares of this many pixels. Growth and evaluation use full size.
    """

    name: str = MISSING
    validation: float = limited(0.1, above=0, below=1)
    augmentation: str = limited("none", choices=("none", "crop", "flip_crop", "randaugment"))
    limit: int | None = limited(None, least=1)
    size: list[Any] = field(default_factory=list)


@dataclass
class DigitsConfig(DataConfig):
    """scikit-learn's digits; 0.15 of the 1438 training images gives about 200 for validation."""

    name: str = "digits"
    validation: float = limited(0.15, above=0, below=1)


@dataclass
class SyntheticConfig(DataConfig):
    """A random conv → activation → conv teacher.

    Attributes:
        hidden: hidden channels of the teacher, the width that growth has to find.
        samples: training and validation samples.
        channels: input channels.
        outputs: output channels.
        image_size: height and width in pixels.
        activation: activation of the teacher, a key of growconv.training.models.ACTIVATIONS.
        seed: seed of the teacher; it does not follow the run's seed.
    """

    name: str = "synthetic"
    hidden: int = limited(6, least=1)
    samples: int = limited(2048, least=1)
    channels: int = limited(3, least=1)
    outputs: int = limited(4, least=1)
    image_size: int = limited(8, least=1)
    activation: str = "relu"
    seed: int = 0


@dataclass
class StoredConfig(DataConfig):
    """Fashion-MNIST or CIFAR.

    Attributes:
        root: folder that is searched first and downloaded into.
        download: whether missing files may be downloaded.
    """

    root: str = "~/.cache/growconv"
    download: bool = True


@dataclass
class ImagesConfig(DataConfig):
    """A folder of images: root/train/CLASS/* and root/test/CLASS/*.

    Attributes:
        root: the folder.
        image_size: images are scaled to squares of this many pixels.
        channels: 1 for grey, 3 for colour.
    """

    name: str = "images"
    root: str = MISSING
    image_size: int = limited(32, least=1)
    channels: int = 3


@dataclass
class ModelConfig:
    """A model.

    Attributes:
        _target_: class or function that builds it. in_channels, classes and image_size come from the data.
        width: factor on every channel count of the full model.
        hidden: factor on the channel counts that no skip connection ties to others.
        hidden_sites: patterns for the names of the sites that `hidden` scales.
        norm: batch, group or none.
        activation: a key of growconv.training.models.ACTIVATIONS.
        args: further arguments of the target.
        weights: file of weights (a state_dict) to start from; a classifier for other classes keeps its random weights.
        widths: channels by site name, instead of those that the factors give; the weights are drawn again.
    """

    _target_: str = MISSING
    width: float = limited(1.0, above=0)
    hidden: float = limited(1.0, above=0)
    hidden_sites: list[str] = field(default_factory=lambda: ["*"])
    norm: str = "batch"
    activation: str = "relu"
    args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    widths: dict[str, int] = field(default_factory=dict)


@dataclass
class LibraryModelConfig(ModelConfig):
    """A model from another library; it starts at full size and ignores `width`, `hidden`, `norm` and `activation`.

    Attributes:
        name: name of the model in the library.
        options: further options of the library's model.
    """

    name: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class BudgetConfig:
    """The most that the grown model may cost; null means no limit.

    Attributes:
        parameters: parameters of the whole model.
        flops: FLOPs (2 × MACs) of one sample's forward pass.
        seconds: wall-clock seconds of the run.
    """

    parameters: float | None = limited(None, least=1)
    flops: float | None = limited(None, least=1)
    seconds: float | None = limited(None, above=0)


@dataclass
class DepthConfig:
    """Growth in depth: whole blocks are duplicated, each copy right behind its original.

    Attributes:
        at: shares of the run at which the blocks are copied; every time doubles the depth.
        blocks: patterns for the module paths of the blocks; blocks that change their input's shape are left out.
        identity: preserve the function: the last layer of each copy's branch starts at zero. Without it, copies keep
            their weights, and the function changes.
    """

    at: list[float] = field(default_factory=list)
    blocks: list[str] = field(default_factory=lambda: ["blocks.*"])
    identity: bool = False


@dataclass
class GrowthConfig:
    """What grows, when, where and how much.

    Attributes:
        method: name of a solver, or none for a fixed model.
        solver: the solver's hyperparameters.
        start: share of the hidden channels (`model.hidden`) that the model starts with.
        start_width: share of all channels (`model.width`) that it starts with; below 1, the stages of a residual
            network start narrow too.
        sites: patterns for the names of the sites that may grow, as printed by `growconv sites`; null means those that
            `model.hidden` scales, or all of them if `start_width` is below 1.
        times: growth rounds; null: no limit (with `every` or `when`).
        every: optimizer steps between two rounds; null spreads them evenly from `begin` to `end`.
        begin: first round, as a share of the run, in epochs or in `trainer.flops`.
        end: last round, as a share of the run; channels that come late have no time to learn.
        amount: channels per round: a float is a share of the initial width, an int a number, "auto" what the data
            support, {_target_: growconv.growth.NAME, ...} an Amount.
        where: all, best, round_robin or {_target_: growconv.growth.NAME, ...}.
        when: {_target_: growconv.growth.NAME, ...} instead of `every`; null uses `every`.
        stop: list of {_target_: growconv.growth.NAME, ...} that end growth early.
        amplitude: line_search, or a number.
        scheduler: further arguments of growconv.GrowthScheduler.
        samples: training samples for the statistics and the line search of one round.
        batch_size: samples of one growth batch.
        budget: limits of the grown model.
        depth: copies of whole blocks, with or without growth of channels (`growth=none`).
    """

    method: str = "none"
    solver: dict[str, Any] = field(default_factory=dict)
    start: float = limited(0.25, above=0, most=1)
    start_width: float = limited(1.0, above=0, most=1)
    sites: list[str] | None = None
    times: int | None = limited(4, least=1)
    every: int | None = limited(None, least=1)
    begin: float = limited(0.1, least=0, most=1)
    end: float = limited(0.6, least=0, most=1)
    amount: Any = limited(0.5, above=0, choices=("auto",))
    where: Any = limited("all", choices=("all", "best", "round_robin"))
    when: Any = None
    stop: list[Any] = field(default_factory=list)
    amplitude: Any = limited("line_search", least=0, choices=("line_search",))
    scheduler: dict[str, Any] = field(default_factory=dict)
    samples: int = limited(1024, least=1)
    batch_size: int = limited(128, least=1)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)


@dataclass
class OptimizerConfig:
    """An optimizer.

    Attributes:
        name: sgd, adamw, or a class of torch.optim.
        lr: highest learning rate of the schedule.
        weight_decay: L2 (sgd) or decoupled (adamw) decay; not applied to biases and norm layers.
    """

    name: str = MISSING
    lr: float = limited(MISSING, above=0)
    weight_decay: float = limited(0.0, least=0)


@dataclass
class SGDConfig(OptimizerConfig):
    """SGD; the defaults are those of residual networks on CIFAR.

    Attributes:
        momentum: 0 to 1.
        nesterov: Nesterov's form of the momentum.
    """

    name: str = limited("sgd", choices=("sgd",))
    lr: float = limited(0.1, above=0)
    weight_decay: float = limited(5e-4, least=0)
    momentum: float = limited(0.9, least=0, below=1)
    nesterov: bool = True


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW.

    Attributes:
        betas: decay of the two moments.
        eps: added to the root of the second moment.
    """

    name: str = limited("adamw", choices=("adamw",))
    lr: float = limited(2e-3, above=0)
    weight_decay: float = limited(0.01, least=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = limited(1e-8, above=0)


@dataclass
class TorchOptimizerConfig(OptimizerConfig):
    """Any optimizer, from torch.optim or your own, that needs only gradients.

    Attributes:
        name: its class: RMSprop, NAdam, ..., or the dotted path of your own class.
        args: its further arguments.
    """

    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class LRScheduleConfig:
    """A learning rate over the run.

    Attributes:
        name: cosine, trapezoid, constant, or a class of torch.optim.lr_scheduler.
    """

    name: str = MISSING


@dataclass
class TorchScheduleConfig(LRScheduleConfig):
    """Any schedule, torch's or your own, that depends only on the step; needs `trainer.epochs`.

    Attributes:
        name: its class: StepLR, OneCycleLR, ..., or the dotted path of your own class.
        every: when it steps: once per epoch, or once per step.
        args: its arguments.
    """

    every: str = limited("epoch", choices=("epoch", "step"))
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class OwnScheduleConfig(LRScheduleConfig):
    """A learning rate in shares of the run.

    Attributes:
        name: cosine, trapezoid or constant.
        warmup: share of the run in which the rate rises linearly from near zero.
        final: rate at the end, as a share of the top (cosine, trapezoid).
        decay: share of the run in which the rate falls (trapezoid).
    """

    name: str = limited("cosine", choices=OWN_SCHEDULES)
    warmup: float = limited(0.0, least=0, most=1)
    final: float = limited(0.0, least=0, most=1)
    decay: float = limited(0.3, least=0, most=1)


@dataclass
class TrainerConfig:
    """The training loop.

    Attributes:
        epochs: passes over the training split; ignored if `flops` is set.
        flops: training FLOPs (2 × MACs, forward and backward, growth included) after which the run ends, before the
            step that would exceed them. Learning rate, `growth.begin` and `growth.end` then follow the share of them
            that is spent. null: use `epochs`.
        batch_size: samples per optimizer step, over all processes and accumulated parts together. null: 128, or less if
            an epoch would have fewer than 32 steps, but at least 32.
        eval_batch_size: samples of one evaluation batch.
        accumulate: number of parts into which each process divides its share of a batch, to save memory.
        accelerator: auto, cpu or cuda.
        devices: required number of processes (torchrun --nproc-per-node); null accepts any number.
        precision: 32-true, bf16-mixed, 16-mixed, bf16-true or 64-true: "true" gives the dtype of the
            parameters, "mixed" that of autocast.
        sync_batchnorm: compute the statistics of BatchNorm over all processes (SyncBatchNorm, CUDA only); without it,
            each process normalises its own share of a batch, and the running values of rank 0 are kept.
        channels_last: keep images and weights in channels-last memory format.
        compile: backend of torch.compile (inductor), null for none; the step is compiled again after every growth.
        clip_gradient: largest norm of the whole gradient; null for no limit.
        label_smoothing: share of the target spread over all classes.
        mix: none, mixup (blends two images) or cutmix (pastes a rectangle of another image); needs growconv[augment].
        ema: decay of an exponential moving average of the weights, which evaluation, `load_run` and export then use;
            null for none.
        checkpoint_every: optimizer steps between two checkpoints; null: only at an epoch's end and after growth.
        deterministic: make torch refuse algorithms whose result can differ from run to run (not needed on a CPU).
        progress: auto (a bar on a terminal, else lines), bar, lines, or none (only the table at the end).
    """

    epochs: int = limited(20, least=1)
    flops: float | None = limited(None, above=0)
    batch_size: int | None = limited(None, least=1)
    eval_batch_size: int = limited(512, least=1)
    accumulate: int = limited(1, least=1)
    accelerator: str = limited("auto", choices=("auto", "cpu", "cuda"))
    devices: int | None = limited(None, least=1)
    precision: str = limited("32-true", choices=("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"))
    sync_batchnorm: bool = False
    channels_last: bool = False
    compile: str | None = None
    clip_gradient: float | None = limited(None, above=0)
    label_smoothing: float = limited(0.0, least=0, below=1)
    mix: str = limited("none", choices=("none", "mixup", "cutmix"))
    ema: float | None = limited(None, above=0, below=1)
    checkpoint_every: int | None = limited(None, least=1)
    deterministic: bool = False
    progress: str = limited("auto", choices=("auto", "bar", "lines", "none"))


@dataclass
class LoggerConfig:
    """Where metrics go besides the run directory; several at once: 'logger=[csv,wandb]'.

    Attributes:
        csv: metrics.csv and growth.csv in the run directory.
        tensorboard: event files in the run directory's folder tensorboard.
        wandb: Weights & Biases.
        mode: online, offline or disabled (wandb).
        server: address of your own wandb server; null means the public one, or the one named in the environment.
        project: wandb project.
        entity: wandb user or team; null means the account's default.
        group: wandb group, to keep the runs of a sweep together.
        tags: wandb tags.
    """

    csv: bool = False
    tensorboard: bool = False
    wandb: bool = False
    mode: str = limited("offline", choices=("online", "offline", "disabled"))
    server: str | None = None
    project: str = "growconv"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """One run.

    Attributes:
        seed: seed of weights, order of samples, augmentation and growth, and of all else drawn from torch, numpy and
            Python, such as dropout.
        baselines: fixed models trained for comparison with a growing one: "small" (its initial size) and "large" (the
            full model). null: both on digits outside a sweep, where they take seconds; otherwise none.
        report: whether to write report.html at the end.
        resume: run directory to continue in; set it only on the command line.
    """

    seed: int = 0
    baselines: list[str] | None = limited(None, choices=("small", "large"))
    report: bool = True
    resume: str | None = None
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    growth: GrowthConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    lr_schedule: LRScheduleConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING


SCHEMAS: dict[tuple[str | None, str], type] = {
    (None, "run_schema"): RunConfig,
    ("data", "digits_schema"): DigitsConfig,
    ("data", "synthetic_schema"): SyntheticConfig,
    ("data", "stored_schema"): StoredConfig,
    ("data", "images_schema"): ImagesConfig,
    ("model", "model_schema"): ModelConfig,
    ("model", "library_schema"): LibraryModelConfig,
    ("growth", "growth_schema"): GrowthConfig,
    ("optimizer", "sgd_schema"): SGDConfig,
    ("optimizer", "adamw_schema"): AdamWConfig,
    ("optimizer", "torch_optimizer_schema"): TorchOptimizerConfig,
    ("lr_schedule", "lr_schedule_schema"): OwnScheduleConfig,
    ("lr_schedule", "torch_schedule_schema"): TorchScheduleConfig,
    ("trainer", "trainer_schema"): TrainerConfig,
    (None, "logger_schema"): LoggerConfig,
}


def schema_of(group: str, options: object) -> type | None:
    """The schema of a stored group; None for a plain option."""
    given = options if isinstance(options, Mapping) else {}
    name = str(given.get("name"))
    if group == "data":
        of_files = dict.fromkeys(("fashion_mnist", "cifar10", "cifar100"), StoredConfig)
        known = {"digits": DigitsConfig, "synthetic": SyntheticConfig, "images": ImagesConfig, **of_files}
        return known.get(name, DataConfig)
    if group == "model":
        return LibraryModelConfig if "name" in given else ModelConfig
    if group == "optimizer":
        return {"sgd": SGDConfig, "adamw": AdamWConfig}.get(name, TorchOptimizerConfig)
    if group == "lr_schedule":
        return OwnScheduleConfig if name in OWN_SCHEDULES else TorchScheduleConfig
    return {"growth": GrowthConfig, "trainer": TrainerConfig, "logger": LoggerConfig}.get(group)
