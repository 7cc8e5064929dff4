"""Several inputs and outputs, any type, free axes anywhere: what both CPU runtimes give, against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.graphs import handmade

from bmctl.backends import BACKENDS
from bmctl.core.noise import Feed, noise
from bmctl.core.onnxgraph import read_signature
from bmctl.errors import DataError
from bmctl.schema import Signature

Make = Callable[[Path], None]


def both(path: Path, feed: Feed, *, signature: Signature | None = None) -> tuple[Feed, Feed]:
    signature = signature or read_signature(path)
    found = []
    for name in ("onnxruntime", "openvino"):
        module, out = BACKENDS[name], path.with_name(f"{name}.onnx")
        meta: dict[str, Any] = module.build(path, config=module.Config(), signature=signature, axes={}, out=out)
        with module.open(out, config=module.Config(), signature=signature, meta=meta) as runner:
            found.append(runner.run(feed))
    return found[0], found[1]


SIZES = {"batch": 3, "tokens": 5, "past": 2, "total": 7, "time": 4, "height": 9, "width": 7, "n": 2, "x.1": 3}


@pytest.mark.parametrize(
    "make",
    [
        handmade.three_inputs,
        handmade.kv_cache,
        handmade.bool_mask,
        handmade.scalar_input,
        handmade.loop,
        handmade.branch,
        handmade.scan,
        handmade.time_first,
        handmade.passed_through,
        handmade.int_arithmetic,
        handmade.float16_in,
        handmade.float64_in,
        handmade.bytes_in,
        handmade.nonzero,
        handmade.gathers,
        handmade.local_function,
    ],
    ids=lambda make: make.__name__,
)
def test_both_give_the_same(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "g.onnx")
    signature = read_signature(tmp_path / "g.onnx")
    one, other = both(tmp_path / "g.onnx", noise(signature, sizes=SIZES, limits={"kind": 3, "user": 50, "item": 7}))
    assert list(one) == list(other) == [spec.name for spec in signature.outputs]
    for spec in signature.outputs:
        assert one[spec.name].dtype == other[spec.name].dtype == np.dtype(spec.dtype)
        assert one[spec.name].shape == other[spec.name].shape
        np.testing.assert_allclose(one[spec.name], other[spec.name], rtol=1e-3, atol=1e-4)


def test_an_empty_cache(tmp_path: Path) -> None:
    handmade.kv_cache(tmp_path / "g.onnx")
    feed = noise(read_signature(tmp_path / "g.onnx"), sizes=SIZES | {"past": 0})
    for found in both(tmp_path / "g.onnx", feed):
        np.testing.assert_array_equal(found["keys"], feed["x"])


def test_outputs_go_by_name_in_any_order(tmp_path: Path) -> None:
    handmade.bool_mask(tmp_path / "g.onnx")
    signature = read_signature(tmp_path / "g.onnx")
    turned = Signature(inputs=signature.inputs[::-1], outputs=signature.outputs[::-1])
    for found in both(tmp_path / "g.onnx", noise(signature, sizes=SIZES), signature=turned):
        assert [(name, array.dtype.name) for name, array in found.items()] == [("any", "bool"), ("y", "float32")]


def test_axes_of_one_name_are_of_one_size(tmp_path: Path) -> None:
    handmade.three_inputs(tmp_path / "g.onnx")
    feed = noise(read_signature(tmp_path / "g.onnx"), sizes=SIZES, limits={"kind": 3})
    feed["row"] = feed["row"][:2]
    with pytest.raises(DataError, match="the axis 'batch' is 3 in 'image' and 2 in 'row'"):
        both(tmp_path / "g.onnx", feed)


def test_openvino_writes_out_functions_alone(tmp_path: Path) -> None:
    module = BACKENDS["openvino"]
    for make, said in ((handmade.local_function, 1), (handmade.three_inputs, 0)):
        make(tmp_path / "g.onnx")
        signature, out = read_signature(tmp_path / "g.onnx"), tmp_path / "out.onnx"
        meta = module.build(tmp_path / "g.onnx", config=module.Config(), signature=signature, axes={}, out=out)
        assert len(meta["mended"]) == said
        assert not onnx.load(out).functions
