"""One file = one runtime. A new backend is a file here and a line in BACKENDS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from bmctl.core.plugins import Room, plugins
from bmctl.core.runner import Runner
from bmctl.errors import UsageError
from bmctl.schema import Signature, Span, Strict


class Backend(Protocol):
    """A module of this folder. `name` in Config names it.

    Attributes:
        SUFFIX: Of its artifacts.
        PROFILED: They are built for a range of sizes of each free axis, and run no others.
        FLAG: ``--FLAG`` of `bmctl export` takes the best backend of this machine among those that name it; or empty.
        ANYWHERE: Where machines without its hardware build artifacts as well, the hardware that these run on; or empty.
        DEVICE: Where its artifacts compute: ``cpu`` or ``cuda``.
    """

    Config: type[Strict]
    SUFFIX: str
    PROFILED: bool
    FLAG: str
    ANYWHERE: str
    DEVICE: str

    def unavailable(self, config: Strict) -> str:
        """Why this machine cannot run artifacts of this backend, or the empty string."""
        ...

    def build(
        self, onnx_path: Path, *, config: Strict, signature: Signature, axes: Mapping[str, Span], out: Path
    ) -> dict[str, Any]:
        """Write the artifact to the file `out`; returns what the deploy manifest records as its `meta`.

        Args:
            signature: Of the graph.
            axes: Sizes of its free axes that will be asked for, by name.
        """
        ...

    def open(
        self,
        artifact: Path,
        *,
        config: Strict,
        signature: Signature | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Runner:
        """Load the artifact.

        Args:
            signature: As a verified manifest has it; None reads it from the file, where free axes may have no names.
            meta: What `build` returned, as a verified manifest has it. Engines are executable code and need it; without
                it they look for a `manifest.json` beside the file.
        """
        ...


BACKENDS: Mapping[str, ModuleType] = plugins(
    Room(__name__),
    "onnxruntime",
    "openvino",
    "tensorrt_rtx",
    "tensorrt",
)


def choose(flag: str, *, given: Sequence[Any] = ()) -> tuple[Any, str]:
    """What ``--FLAG`` of `bmctl export` means on this machine: a backend that runs here, else one that builds anywhere.

    Args:
        flag: A FLAG of BACKENDS.
        given: Configurations that are there already: a backend's own is taken for its default.

    Returns:
        The backend's configuration, and why it is this one, in words.
    """
    configs = {name: module.Config() for name, module in BACKENDS.items() if module.FLAG == flag}
    configs |= {config.name: config for config in given if config.name in configs}
    passed: list[str] = []
    for name in sorted(configs, key=lambda name: bool(BACKENDS[name].ANYWHERE)):
        reason = BACKENDS[name].unavailable(configs[name])
        if not reason:
            return configs[name], "; ".join(["it is installed, and runs here", *passed])
        passed.append(reason)
    return configs[name], f"{'; '.join(passed)}; it builds anywhere, for {BACKENDS[name].ANYWHERE}"


def named(names: Sequence[str], *, given: Sequence[Any]) -> list[Any]:
    """The configurations of `names`: a given one where there is one of that name, else the backend's default.

    Raises:
        UsageError: No such backend.
    """
    for name in names:
        if name not in BACKENDS:
            raise UsageError(f"--backend {name}: no such backend", hint=f"one of {', '.join(BACKENDS)}")
    known = {config.name: config for config in given}
    return [known.get(name) or BACKENDS[name].Config() for name in names]


def sibling(name: str) -> str:
    """The backend that builds, on the machine that has it, for hardware that artifacts built anywhere leave out."""
    flag = BACKENDS[name].FLAG if BACKENDS[name].ANYWHERE else ""
    return next((one for one, module in BACKENDS.items() if flag and module.FLAG == flag and not module.ANYWHERE), "")
