"""Signatures: names of free axes, and what is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.graphs import handmade

from bmctl.core.onnxgraph import read_signature
from bmctl.errors import UnsupportedError


def test_axes_without_names_are_called_by_place(tmp_path: Path) -> None:
    handmade.anonymous_axes(tmp_path / "g.onnx")
    signature = read_signature(tmp_path / "g.onnx")
    assert signature.inputs[0].shape == ("batch", "x.1", 4)
    assert signature.outputs[0].shape == ("batch", "y.1", 3)


def test_time_is_not_the_batch(tmp_path: Path) -> None:
    handmade.scan(tmp_path / "g.onnx")
    assert read_signature(tmp_path / "g.onnx").inputs[0].shape == ("time", 4)


def test_scalars_and_booleans(tmp_path: Path) -> None:
    handmade.branch(tmp_path / "g.onnx")
    x, flip = read_signature(tmp_path / "g.onnx").inputs
    assert (flip.dtype, flip.shape) == ("bool", ())
    assert (x.dtype, x.shape) == ("float32", ("batch", 4))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (handmade.strings_in, "the input 'x' holds strings"),
        (handmade.strings_out, "the output 'y' holds strings"),
        (handmade.sequence_in, "the input 'x' is a sequence"),
        (handmade.map_out, "the output 'y' is a sequence"),
        (handmade.bfloat16_in, "the input 'x' is bfloat16, which NumPy arrays cannot hold"),
    ],
)
def test_what_no_array_can_hold_is_refused_in_words(make: object, reason: str, tmp_path: Path) -> None:
    make(tmp_path / "g.onnx")  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match=reason) as caught:
        read_signature(tmp_path / "g.onnx")
    assert caught.value.hint
