"""Do two implementations of one graph agree? One comparison for the exporter, the artifacts and the backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bmctl.schema import Strict, TensorSpec

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 8e-2, "int8": 0.15}
"""Largest error of an artifact against its reference, as a fraction of the reference's largest value.

Runtimes reorder fp32 sums and may use Winograd convolutions; half precisions keep 11 and 8 bits; in int8 a value beside
a rounding border may fall either way in every layer. A wrong graph is off by the scale itself.
"""

AGREEMENT = {"fp32": 1.0, "fp16": 0.98, "bf16": 0.95, "int8": 0.9}
"""Smallest share of samples whose largest output is the same one, near ties aside."""

TIE = 0.25
"""Outputs within this part of the tolerance of each other are a near tie."""


class Parity(Strict):
    """How far an artifact is from its reference on the same inputs.

    Attributes:
        error: max |got - reference| / max |reference|.
        tolerance: Largest `error` that passes.
        agreement: Share of samples with the same arg max along the last axis.
        min_agreement: Smallest `agreement` that passes.
        num_samples: Samples compared.
        reference: What the reference outputs come from.
        output: Which of several outputs was the worst.
    """

    error: float
    tolerance: float
    agreement: float
    min_agreement: float
    num_samples: int
    reference: str
    passed: bool
    output: str = ""

    def __str__(self) -> str:
        return (f"{self.output}: " if self.output else "") + (
            f"error {self.error:.2e} of the output's scale (tolerance {self.tolerance:.0e}), "
            f"same arg max on {self.agreement:.1%} of {self.num_samples} samples (at least {self.min_agreement:.0%})"
        )


def compare(reference: np.ndarray, got: np.ndarray, *, tolerance: float, min_agreement: float, source: str) -> Parity:
    """Compare outputs [N, ...] of the same inputs.

    Args:
        reference: float [N, ...], what is right.
        got: The outputs to judge.
        tolerance: Largest error as a fraction of max |reference|.
        min_agreement: Share of samples that must have the same arg max.
        source: What computed `reference`, for the record.

    Returns:
        The comparison; a wrong shape or a value that is not finite never passes.
    """
    num_samples = int(reference.shape[0]) if reference.ndim else 0
    reference, got = reference.astype(np.float64), got.astype(np.float64)
    if reference.shape != got.shape or not np.isfinite(got).all() or not np.isfinite(reference).all():
        error, agreement = 1e9, 0.0
    else:
        scale = max(float(np.abs(reference).max(initial=0.0)), 1e-12)
        error = min(float(np.abs(got - reference).max(initial=0.0)) / scale, 1e9)
        agreement = _agreement(reference, got, slack=TIE * tolerance * scale)
    return Parity(
        error=error,
        tolerance=tolerance,
        agreement=agreement,
        min_agreement=min_agreement,
        num_samples=num_samples,
        reference=source,
        passed=error <= tolerance and agreement >= min_agreement,
    )


def _agreement(reference: np.ndarray, got: np.ndarray, *, slack: float) -> float:
    """Share of rows with the same arg max; a row whose two best references lie within `slack` is a tie and agrees."""
    if reference.ndim < 2 or reference.size == 0:
        return 1.0
    rows, other = reference.reshape(-1, reference.shape[-1]), got.reshape(-1, reference.shape[-1])
    chosen = np.take_along_axis(rows, other.argmax(-1)[:, None], -1)[:, 0]
    return float((rows.max(-1) - chosen <= slack).mean())


# -- several outputs --------------------------------------------------------------------------------


def compare_all(
    reference: Mapping[str, np.ndarray],
    got: Mapping[str, np.ndarray],
    *,
    outputs: Sequence[TensorSpec],
    tolerance: float,
    min_agreement: float,
    source: str,
) -> Parity:
    """Compare every output of a graph, each as its role and type ask; the record is of the worst.

    Scores and floats are compared as `compare` does, the arg max of scores alone. Integers and booleans must be the
    same in a share of at least `min_agreement`, 8-bit integers within the tolerance. What is nan or inf in both in the
    same place is equal where it is no score: noise may well give some.

    Args:
        reference: What is right, by output.
        got: The outputs to judge.
        outputs: Names and roles; an output that nobody gives never passes.
    """
    worst: Parity | None = None
    for spec in outputs:
        right, judged = reference[spec.name], got.get(spec.name)
        asked = {"tolerance": tolerance, "min_agreement": min_agreement}
        if judged is None or judged.shape != right.shape:
            one = _of(1e9, 0.0, right, source=source, **asked)
        elif spec.role == "scores":
            one = compare(right, judged, tolerance=tolerance, min_agreement=min_agreement, source=source)
        elif right.dtype.kind == "f" or (right.dtype.itemsize == 1 and right.dtype.kind in "iu"):
            one = _of(_error(right, judged), 1.0, right, source=source, **asked)
        else:
            one = _of(0.0, float((right == judged).mean()) if right.size else 1.0, right, source=source, **asked)
        if len(outputs) > 1:
            one = one.model_copy(update={"output": spec.name})
        if worst is None or (one.passed, -one.error, one.agreement) < (worst.passed, -worst.error, worst.agreement):
            worst = one
    if worst is None:
        raise ValueError("a graph without outputs has nothing to compare")
    return worst


def _error(reference: np.ndarray, got: np.ndarray) -> float:
    """max |got - reference| / max |reference| over what is finite; 1e9 where nan and inf lie elsewhere."""
    reference, got = reference.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return 1e9
    if not finite.any():
        return 0.0 if reference.size == 0 else 1e9
    scale = max(float(np.abs(reference[finite]).max()), 1e-12)
    return min(float(np.abs(got[finite] - reference[finite]).max()) / scale, 1e9)


def _of(
    error: float, agreement: float, reference: np.ndarray, *, tolerance: float, min_agreement: float, source: str
) -> Parity:
    return Parity(
        error=error,
        tolerance=tolerance,
        agreement=agreement,
        min_agreement=min_agreement,
        num_samples=int(reference.shape[0]) if reference.ndim else 1,
        reference=source,
        passed=error <= tolerance and agreement >= min_agreement,
    )


def worst(found: Sequence[Parity]) -> Parity:
    """Of several comparisons one that failed, else the one with the largest error."""
    return max(found, key=lambda one: (not one.passed, one.error, -one.agreement))
