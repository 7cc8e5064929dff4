"""What a training loop may be told: the `train` section of a recipe, and the recovery of a compression step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bmctl.schema import Count, Many, NotNegative, Positive, Ratio, StepConfig, Strict

# -- optimizers: torch's own --------------------------------------------------------------------------


class OptimizerConfig(Strict):
    """What every optimizer has.

    Attributes:
        decay_all: Weight decay on norms and biases (every parameter of one dimension) too.
        layer_decay: Each block's learning rate is this times that of the block after it; None is the same for all.
    """

    decay_all: bool = False
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None


class SGD(OptimizerConfig):
    name: Literal["sgd"]
    lr: Positive = 0.1
    momentum: Ratio = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4


class Adam(OptimizerConfig):
    name: Literal["adam"]
    lr: Positive = 1e-3
    betas: Many[Ratio] = Field(default=(0.9, 0.999), min_length=2, max_length=2)
    weight_decay: NotNegative = 0.0


class AdamW(OptimizerConfig):
    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    betas: Many[Ratio] = Field(default=(0.9, 0.999), min_length=2, max_length=2)
    weight_decay: NotNegative = 0.05


class RMSprop(OptimizerConfig):
    name: Literal["rmsprop"]
    lr: Positive = 1e-3
    alpha: Ratio = 0.99
    momentum: Ratio = 0.0
    weight_decay: NotNegative = 0.0


class Adafactor(OptimizerConfig):
    """Second moments as row and column means: a fraction of Adam's memory.

    Source: Shazeer, Stern 2018, https://arxiv.org/abs/1804.04235
    """

    name: Literal["adafactor"]
    lr: Positive = 1e-2
    weight_decay: NotNegative = 0.0


class Muon(OptimizerConfig):
    """Orthogonalised momentum for matrices; AdamW, at the same rate, for everything else and for the last layer.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the rate is scaled to match AdamW's
    updates (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so that one `lr` serves both.
    """

    name: Literal["muon"]
    lr: Positive = 1e-3
    momentum: Ratio = 0.95
    weight_decay: NotNegative = 0.05


Optimizer = Annotated[SGD | Adam | AdamW | RMSprop | Adafactor | Muon, Field(discriminator="name")]


# -- schedules ----------------------------------------------------------------------------------------


class ScheduleConfig(Strict):
    """What every schedule has.

    Attributes:
        warmup: Fraction of all steps in which the rate rises from zero to its peak.
    """

    warmup: Ratio = 0.05


class Cosine(ScheduleConfig):
    """Half a cosine from the peak down to `final` times the peak."""

    name: Literal["cosine"] = "cosine"
    final: Ratio = 0.0


class Linear(ScheduleConfig):
    """A straight line from the peak down to `final` times the peak."""

    name: Literal["linear"]
    final: Ratio = 0.0


class StepDecay(ScheduleConfig):
    """Times `factor` at each of `at`, which are fractions of all steps."""

    name: Literal["step"]
    at: Many[Ratio] = (0.5, 0.75)
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


class OneCycle(Strict):
    """Up from `start` times the peak over `rise` of the steps, then down to `final` times the peak, both cosines.

    Source: Smith, Topin 2017, https://arxiv.org/abs/1708.07120; as in torch's OneCycleLR.
    """

    name: Literal["one_cycle"]
    rise: Ratio = 0.3
    start: Ratio = 0.04
    final: Ratio = 4e-6


class Constant(ScheduleConfig):
    name: Literal["constant"]


Schedule = Annotated[Cosine | Linear | StepDecay | OneCycle | Constant, Field(discriminator="name")]


# -- the loop -----------------------------------------------------------------------------------------


class Ema(Strict):
    """The weights that are validated and kept are an exponential moving average over the steps.

    Attributes:
        decay: Of a step's average that stays; lower at the beginning: at most (1 + step) / (10 + step).
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class EarlyStop(Strict):
    """Stop once `patience` evaluations in a row were not better than the best by more than `min_delta`.

    Attributes:
        min_delta: In the unit of the task's main metric, whichever way is better: 0.01 of an accuracy is a point.
    """

    patience: Count = 5
    min_delta: NotNegative = 0.0


class Fit(Strict):
    """One training loop.

    Attributes:
        max_steps: Stops after this many optimizer steps, whatever `epochs` says.
        max_time_s: Stops at the first step border past this many seconds of training, over all attempts.
        batch_size: Samples per optimizer step over all processes; `auto` takes the largest power of two that fits.
        accumulate: Parts that each process cuts its share of a batch into, for less memory.
        clip_norm: Longest that the gradient of all parameters together may be; None does not clip.
        skip_non_finite: Steps in a row whose loss or gradient is not finite that are left out before the run ends.
        eval_every_steps: None validates once an epoch.
        precision: `auto` takes what the hardware is fastest in, and says why.
        check_precision: Compare loss and gradients of the first batches with fp32, and fall back where they differ.
        activation_checkpointing: Compute activations of repeated blocks again instead of keeping them: less memory.
        kernels: `auto` takes bmctl's where they are faster, in bf16 on CPUs with AMX; `torch` leaves torch's own.
        compile: torch.compile, with a note and the eager model where that fails.
        select: Weights that are kept: of the `best` evaluation or the `last`.
        checkpoint_every_steps: None means once an epoch.
        async_checkpoints: Write checkpoints while training goes on.
        grace_s: Seconds after a signal by which a checkpoint must be published.
    """

    epochs: Count = 10
    max_steps: Count | None = None
    max_time_s: Positive | None = None
    batch_size: Count | Literal["auto"] = 64
    accumulate: Count = 1
    clip_norm: Positive | None = None
    skip_non_finite: Annotated[int, Field(ge=0, le=1000)] = 0
    ema: Ema | None = None
    early_stop: EarlyStop | None = None
    eval_every_steps: Count | None = None
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine()
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    check_precision: bool = True
    activation_checkpointing: bool = False
    kernels: Literal["auto", "torch"] = "auto"
    compile: bool = False
    channels_last: bool = True
    select: Literal["best", "last"] = "best"
    checkpoint_every_steps: Count | None = None
    async_checkpoints: bool = True
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    grace_s: Positive = 30.0


# -- after a compression step -------------------------------------------------------------------------


class Distill(Strict):
    """Loss = (1 - weight) * task loss + weight * T^2 * KL(teacher || student), both softened by T.

    Source: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531
    """

    weight: Ratio = 0.7
    temperature: Positive = 4.0


class Recover(Strict):
    """Fine-tuning after a module step.

    Attributes:
        fit: The training loop.
        teacher: `original` is the run's first package; `none` trains on labels alone.
    """

    fit: Fit = Fit(epochs=3, optimizer=AdamW(lr=1e-3))
    teacher: Literal["original", "none"] = "original"
    distill: Distill = Distill()


class ModuleStepConfig(StepConfig):
    """A step on the module's weights, which may be followed by fine-tuning."""

    recover: Recover | None = None
