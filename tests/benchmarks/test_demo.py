"""What the demo's artifacts are worth: accuracy, size, and speed ratios taken in one session of interleaved rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmctl.cli import main

RUN = Path(__file__).parents[2] / "runs" / "demo"


@pytest.mark.bench
@pytest.mark.timeout(1500)
def test_the_demo_is_small_fast_and_accurate() -> None:
    """Reads the run of `make demo`; makes it where there is none."""
    if not (RUN / "report.json").is_file():
        main(["run", "--recipe", "fashion-mnist", "--output", str(RUN)])
    rows = {row["name"]: row for row in json.loads((RUN / "report.json").read_text())["rows"]}
    trained, shipped = rows["packages/00-train"], rows["deploy/openvino"]
    original = rows["deploy/baseline/openvino"]
    drop, speedup, over_ort = shipped["drop"], shipped["speedup"], shipped["speedup_over_onnxruntime"]
    smaller = original["size_bytes"] / shipped["size_bytes"]
    print(
        f"\ntest accuracy of the trained model    {trained['test']['value']:.1%} (at least 88.5 %)"
        f"\ndrop of the int8 artifact             {100 * drop['value']:.2f} "
        f"[{100 * drop['low']:.2f}, {100 * drop['high']:.2f}] points (at most 1.0)"
        f"\nsize, times smaller                   {smaller:.1f} (at least 8)"
        f"\nspeedup over fp32 on OpenVINO         {speedup['value']:.2f}x "
        f"[{speedup['low']:.2f}, {speedup['high']:.2f}] (at least 2.2x)"
        f"\nspeedup over fp32 on ONNX Runtime     {over_ort['value']:.2f}x "
        f"[{over_ort['low']:.2f}, {over_ort['high']:.2f}] (at least 6x)"
    )
    assert trained["test"]["value"] >= 0.885
    assert drop["value"] <= 0.01
    assert smaller >= 8
    assert speedup["value"] >= 2.2
    assert over_ort["value"] >= 6
