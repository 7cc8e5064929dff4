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
    """

    error: float
    tolerance: float
    agreement: float
    min_agreement: float
    num_samples: int
    reference: str
    passed: bool

    def __str__(self) -> str:
        return (
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


def compare_all(
    reference: Mapping[str, np.ndarray],
    got: Mapping[str, np.ndarray],
    *,
    outputs: Sequence[TensorSpec],
    tolerance: float,
    min_agreement: float,
    source: str,
) -> Parity:
    """The worst comparison over all outputs of a call; the arg max counts for scores alone.

    Args:
        reference: By the names of `outputs`.
        got: The outputs to judge.
        outputs: Names and roles.
    """
    found = [
        compare(
            reference[spec.name],
            got[spec.name],
            tolerance=tolerance,
            min_agreement=min_agreement if spec.role == "scores" else 0.0,
            source=source,
        )
        for spec in outputs
    ]
    return worst(found)


def worst(found: Sequence[Parity]) -> Parity:
    """What several comparisons come to: the largest error, the smallest agreement of those that count, all samples."""
    judged = [one for one in found if one.min_agreement > 0] or found
    return found[0].model_copy(
        update={
            "error": max(one.error for one in found),
            "agreement": min(one.agreement for one in judged),
            "min_agreement": max(one.min_agreement for one in found),
            "num_samples": max(one.num_samples for one in found),
            "passed": all(one.passed for one in found),
        }
    )
