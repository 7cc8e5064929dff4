"""The sections of a recipe, as frozen models. Reading and writing them is the package's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import Field, field_validator, model_validator

from bmctl.backends import BACKENDS
from bmctl.core.owncode import OwnCode
from bmctl.core.plugins import section
from bmctl.fit import Fit
from bmctl.inputs import INPUTS, InputConfig
from bmctl.methods import METHODS, OwnStep
from bmctl.models import ModelConfig
from bmctl.schema import BATCH, Count, Many, NotNegative, Positive, Span, Strict
from bmctl.sources import SOURCES
from bmctl.tasks import TASKS

AxisName = Annotated[str, Field(min_length=1, max_length=100)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}$")]

# The plug-in tables are the single source of what a recipe may name; type checkers cannot read a table.
if TYPE_CHECKING:
    SourceConfig: TypeAlias = Any
    TaskConfig: TypeAlias = Any
    Step: TypeAlias = Any
    BackendConfig: TypeAlias = Any
    BackendName: TypeAlias = str
else:
    SourceConfig = section(SOURCES, own=OwnCode)
    TaskConfig = section(TASKS, own=OwnCode)
    Step = section(METHODS, key="method", own=OwnStep)
    BackendName = Literal[tuple(BACKENDS)]
    BackendConfig = Annotated[Union[tuple(m.Config for m in BACKENDS.values())], Field(discriminator="name")]


class SplitConfig(Strict):
    """How much of a split is used: the first `limit` samples of a class-balanced order, or all."""

    limit: Count | None = None


class CalibConfig(Strict):
    """Calibration data: unaugmented samples of `split`, at most `limit` of them; never of the test split."""

    split: Literal["train", "val"] = "train"
    limit: Count | None = None


def input_kind(source: Any) -> str:
    """What kind of input a source is read as where the recipe does not say; the first there is where it is unknown."""
    kind = source.get("kind") if isinstance(source, dict) else getattr(source, "kind", None)
    known = SOURCES.get(kind) if isinstance(kind, str) else None
    return str(known.INPUT) if known is not None else next(iter(INPUTS))


class DataConfig(Strict):
    """What a model is made and judged on.

    Attributes:
        input: From samples to what the model takes, and what training does to them; its kind follows from the source.
        num_workers: Loader processes of each training process; `auto` goes by the data and the cores.
        prefetch: Batches that each of them prepares ahead.
    """

    source: SourceConfig
    input: InputConfig = Field(default_factory=dict, validate_default=True)
    train: SplitConfig = SplitConfig()
    val: SplitConfig = SplitConfig()
    test: SplitConfig = SplitConfig()
    calib: CalibConfig = CalibConfig()
    num_workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2

    @model_validator(mode="before")
    @classmethod
    def input_of_the_source(cls, values: Any) -> Any:
        """An input that does not say its kind is of the kind that the source is read as."""
        if isinstance(values, dict) and isinstance(values.get("input", {}), dict):
            kind = input_kind(values.get("source"))
            return {**values, "input": {"kind": kind, **values.get("input", {})}}
        return values


class Nodes(Strict):
    """How many machines take part: all of a range are waited for a while, then whoever is there begins."""

    min: Annotated[int, Field(ge=1, le=1024)] = 1
    max: Annotated[int, Field(ge=1, le=1024)] = 1


class LaunchConfig(Strict):
    """Where and with how many processes `train` and `distribute` run.

    Attributes:
        nproc: Processes on each machine.
        nodes: Machines; a range is elastic: they may come and go.
        rendezvous: ``HOST:PORT`` where machines meet; needed for more than one.
        max_restarts: How often a group of processes of which one died is started again from its newest checkpoint.
        threads: Of each process; None is its share of the cores.
        timeout_s: Without a step, an evaluated batch or a saved file for so long, a process counts as hung.
        strategy: `ddp` keeps the whole model in every process, `fsdp` a part; `auto` goes by size and memory.
        cpu_offload: With fsdp on GPUs: parameters and optimizer state stay in the machine's memory.
    """

    nproc: Annotated[int, Field(ge=1, le=1024)] = 1
    nodes: Nodes = Nodes()
    rendezvous: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-\[\]:]{1,253}:[0-9]{1,5}$")] | None = None
    max_restarts: Annotated[int, Field(ge=0, le=100)] = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None
    timeout_s: Positive = 600.0
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    cpu_offload: bool = False

    @property
    def worlds(self) -> range:
        """Every number of processes that may train together."""
        return range(self.nodes.min * self.nproc, self.nodes.max * self.nproc + 1, self.nproc)


class MeasureConfig(Strict):
    """How latency is taken: `rounds` interleaved rounds over all artifacts of one command, at one batch size."""

    batch_size: Count = 64
    rounds: Annotated[int, Field(ge=3, le=1000)] = 15


class ExportConfig(Strict):
    """Attributes:
    axes: Smallest, most common and largest size of each free axis of the graphs, by its name.
    sample: An .npz with an array for each input of a foreign graph: parity and timing in place of noise.
    baseline: Export and measure the run's first package as well, so that gains are against something.
    """

    backends: Many[BackendConfig] = ()
    axes: dict[AxisName, Span] = Field(default_factory=dict, validate_default=True)
    sample: str | None = None
    baseline: bool = True
    measure: MeasureConfig = MeasureConfig()

    @field_validator("axes")
    @classmethod
    def batch_by_default(cls, axes: dict[str, Span]) -> dict[str, Span]:
        return {BATCH: Span()} | axes


class InferConfig(Strict):
    """Attributes:
    data: An image, a folder, an .npz or .csv, or ``bundled:samples``.
    """

    data: str
    backend: str = "auto"
    batch_size: Count = 64


class MetricGates(Strict):
    """What one of the task's metrics must hold on test data, in its unit (a share as a fraction); None is no gate.

    Attributes:
        max_drop: By how much it may be worse than the trained model's, whichever way is better.
    """

    min: float | None = None
    max: float | None = None
    max_drop: NotNegative | None = None


class GatesConfig(Strict):
    """What a shipped artifact must hold; each None is no gate.

    Attributes:
        backends: Whose artifacts are judged; None is all of them.
        max_drop: Of the task's main metric on test data: by how much it may be worse than the trained model's, in its
            unit (a share, such as accuracy, as a fraction).
        metrics: The same and more for any metric of the task, by its name.
        min_speedup: Samples per second against the uncompressed model on the same backend, in the same rounds.
        max_latency_ms: Median of one batch of `export.measure.batch_size`.
        allow_unrun: Let pass what was built here but cannot be run here.
    """

    backends: Many[BackendName] | None = None
    max_drop: NotNegative | None = None
    metrics: dict[str, MetricGates] = Field(default_factory=dict)
    min_speedup: Positive | None = None
    max_size_bytes: Count | None = None
    max_latency_ms: Positive | None = None
    allow_unrun: bool = False


class Recipe(Strict):
    """One frozen model of everything a run does."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig | None = None
    data: DataConfig | None = None
    task: TaskConfig | None = None
    train: Fit | None = None
    launch: LaunchConfig = LaunchConfig()
    compress: Many[Step] = ()
    export: ExportConfig = ExportConfig()
    infer: InferConfig | None = None
    gates: GatesConfig = GatesConfig()

    @model_validator(mode="before")
    @classmethod
    def classify_by_default(cls, values: Any) -> Any:
        """Data without a task is there to be classified."""
        if isinstance(values, dict) and values.get("data") is not None and values.get("task") is None:
            return {**values, "task": {"kind": "classify"}}
        return values
