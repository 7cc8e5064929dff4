"""What every stage and artifact of a run is worth: manifests, evaluations and timings, put side by side.

All of it is read from the run's directory, so that a report can be made again at any time. torch-free.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bmctl import __version__, store
from bmctl.errors import PackageError
from bmctl.report.page import to_markdown
from bmctl.report.rows import (
    ORIGINAL,
    Comparison,
    GateResult,
    LatencyRow,
    Measurements,
    Report,
    Row,
    Score,
    Timing,
    to_json,
    with_gates,
)
from bmctl.report.scoring import SPLITS, Judged, judged, manifest_score, with_drops, with_scores
from bmctl.tasks import TASKS

if TYPE_CHECKING:
    from bmctl.core.scores import Filed

__all__ = [
    "Comparison",
    "GateResult",
    "LatencyRow",
    "Measurements",
    "Report",
    "Row",
    "Score",
    "Timing",
    "collect",
    "to_json",
    "to_markdown",
    "with_gates",
]

FEW_ROUNDS = 6
Manifest = dict[str, Any]


@dataclass
class _Found:
    """What was read so far.

    Attributes:
        hashes: Row name to its manifest's hash, which evaluations and timings know it by.
        filed: (hash, split) to an evaluation.
    """

    run: Path
    hashes: dict[str, str] = field(default_factory=dict)
    filed: dict[tuple[str, str], Filed] = field(default_factory=dict)
    timings: Measurements | None = None
    notes: list[str] = field(default_factory=list)

    def evaluations(self, row: str) -> dict[str, Judged]:
        """Of a row, by split."""
        filed = {split: self.filed.get((self.hashes[row], split)) for split in SPLITS}
        return {split: judged(one) for split, one in filed.items() if one is not None}


def collect(run: Path) -> Report:
    """The report of what lies in a run's directory now, without verdicts of gates.

    Raises:
        PackageError: A manifest or the measurements are not readable.
    """
    found = _Found(run)
    _read_evaluations(found)
    found.timings = _read_timings(run)
    packages = [_package_row(found, path) for path in _directories(run / "packages")]
    if packages:
        packages[0] = dataclasses.replace(packages[0], is_original=True)
    artifacts = [_artifact_row(found, path, packages) for path in _artifact_directories(run)]
    rows = [*packages, *artifacts]
    evaluations = {row.name: found.evaluations(row.name) for row in rows}
    rows = [with_scores(row, evaluations[row.name]) for row in rows]
    if packages:
        rows = [with_drops(row, evaluations, versus=rows[0], note=found.notes.append) for row in rows]
    rows = _with_speeds(found, rows)
    timings = found.timings
    return Report(
        run=str(run),
        bmctl=__version__,
        batch_size=timings.batch_size if timings else None,
        machine=timings.machine if timings else {},
        rows=tuple(rows),
        notes=tuple(dict.fromkeys(found.notes)),
    )


# -- reading -----------------------------------------------------------------------------------------


def _directories(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != ORIGINAL)


def _artifact_directories(run: Path) -> Iterator[Path]:
    """Per runtime the original's artifact, then the shipped one."""
    originals = {path.name: path for path in _directories(run / "deploy" / ORIGINAL)}
    shipped = {path.name: path for path in _directories(run / "deploy")}
    for name in dict.fromkeys(sorted([*originals, *shipped])):
        yield from (folder[name] for folder in (originals, shipped) if name in folder)


def _read_manifest(directory: Path) -> Manifest:
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} cannot be read: {error}", hint="make it again: --overwrite") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise PackageError(f"{path} is not a manifest of bmctl", hint="make it again: --overwrite")
    return manifest


def _read_evaluations(found: _Found) -> None:
    from bmctl.core import scores

    for path, filed in scores.read_all(found.run, tasks=TASKS):
        if isinstance(filed, str):
            found.notes.append(f"{path.relative_to(found.run)} was left out: {filed}")
        else:
            found.filed[filed.key.artifact, filed.key.split] = filed


def _read_timings(run: Path) -> Measurements | None:
    path = run / "measurements.json"
    if not path.exists():
        return None
    try:
        return Measurements.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise PackageError(f"{path} cannot be read: {error}", hint="measure again: bmctl export --overwrite") from error


# -- rows --------------------------------------------------------------------------------------------


def _package_row(found: _Found, path: Path) -> Row:
    manifest = _read_manifest(path)
    metrics = manifest.get("metrics") or {}
    name = f"packages/{path.name}"
    found.hashes[name] = store.manifest_hash(path)
    found.notes += [f"{name}: {note}" for note in manifest.get("notes") or ()]
    return Row(
        name=name,
        kind="package",
        stage=manifest.get("stage"),
        backend=None,
        is_original=False,
        precision=metrics.get("precision"),
        num_params=metrics.get("num_params"),
        macs=metrics.get("macs"),
        size_bytes=metrics.get("size_bytes"),
        val=manifest_score(metrics.get("val")),
        test=manifest_score(metrics.get("test")),
    )


def _artifact_row(found: _Found, path: Path, packages: list[Row]) -> Row:
    manifest = _read_manifest(path)
    name = str(path.relative_to(found.run))
    found.hashes[name] = store.manifest_hash(path)
    origin = next((row for row in packages if manifest.get("package") == found.hashes[row.name]), None)
    if origin is None:
        found.notes.append(f"{name} was built from a package that is no longer in this run: export again")
    return Row(
        name=name,
        kind="artifact",
        stage=origin.stage if origin else None,
        backend=manifest.get("backend"),
        is_original=path.parent.name == ORIGINAL,
        precision=manifest.get("precision"),
        num_params=origin.num_params if origin else None,
        macs=origin.macs if origin else None,
        size_bytes=_size(manifest),
        status=manifest.get("status", "ran"),
        reason=manifest.get("reason") or "",
        command_elsewhere=manifest.get("command_elsewhere") or "",
    )


def _size(manifest: Manifest) -> int | None:
    """Bytes of the parts' files: what is recorded with them, or needed to make their inputs, computes nothing."""
    files = [part["artifact"] for part in (manifest.get("parts") or {}).values()]
    return sum(manifest["files"][name]["size_bytes"] for name in files) or None


# -- comparisons -------------------------------------------------------------------------------------


def _with_speeds(found: _Found, rows: list[Row]) -> list[Row]:
    if found.timings is None:
        return rows
    timings = _timings_by_row(found)
    if any(len(timing.samples_ms) < FEW_ROUNDS for timing in timings.values()):
        found.notes.append(f"speeds were taken in fewer than {FEW_ROUNDS} rounds: their intervals are too narrow")
    return [_with_speed(found, row, timings) if row.name in timings else row for row in rows]


def _timings_by_row(found: _Found) -> dict[str, Timing]:
    assert found.timings is not None
    timings = {}
    for name, timing in found.timings.artifacts.items():
        row = f"deploy/{name}"
        if row not in found.hashes:
            found.notes.append(f"measurements.json times {name}, which is no longer there")
        elif timing.artifact is not None and timing.artifact != found.hashes[row]:
            found.notes.append(f"{row} was built again after it was timed: its speed is left out")
        else:
            timings[row] = timing
    return timings


def _with_speed(found: _Found, row: Row, timings: Mapping[str, Timing]) -> Row:
    timing = timings[row.name]
    same, onnxruntime = (f"deploy/{ORIGINAL}/{backend}" for backend in (row.backend, "onnxruntime"))
    return dataclasses.replace(
        row,
        latency=LatencyRow(timing.p50_ms, timing.p90_ms, timing.p99_ms, num_rounds=len(timing.samples_ms)),
        samples_per_s=timing.throughput,
        peak_memory_bytes=timing.peak_memory_bytes,
        speedup=None if row.is_original else _speedup(found, row.name, same, timings),
        speedup_over_onnxruntime=None if row.name == onnxruntime else _speedup(found, row.name, onnxruntime, timings),
    )


def _speedup(found: _Found, row: str, versus: str, timings: Mapping[str, Timing]) -> Comparison | None:
    """How many times faster `row` is: ratio of the medians of the same rounds."""
    from bmctl.core.stats import ratio_interval

    if versus not in timings:
        return None
    slow, fast = timings[versus], timings[row]
    if len(slow.samples_ms) != len(fast.samples_ms):
        found.notes.append(f"{row} and {versus} were not timed in the same rounds: no speedup is given")
        return None
    low, high = ratio_interval(slow.samples_ms, fast.samples_ms)
    return Comparison(slow.p50_ms / fast.p50_ms, low, high, versus=versus)
