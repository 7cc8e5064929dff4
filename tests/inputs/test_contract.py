"""What every input has to hold, over the whole table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bmctl.core.chance import Luck
from bmctl.core.columns import Column, Episode, Picture, Real, Text
from bmctl.inputs import INPUTS, Resolved, specs
from bmctl.inputs import image as image_input

RNG = np.random.default_rng(0)
TEXTS = np.array([" ".join(f"word{number % 9}" for number in range(1 + row)) for row in range(12)], object)
PICTURES = RNG.integers(0, 256, (12, 9, 7, 3), np.uint8)


class Block:
    """Examples of one column, in memory."""

    in_memory = True

    def __init__(self, name: str, column: Column, values: Any) -> None:
        self.columns, self.values = {name: column}, values

    def __len__(self) -> int:
        return len(self.values)

    def read(self, most: int | None = None) -> dict[str, Any]:
        return dict.fromkeys(self.columns, self.values[:most])


CASES: dict[str, tuple[Block, dict[str, Any]]] = {
    "image": (
        Block("picture", Picture(), PICTURES),
        {"kind": "image", "augment": {"flip": True, "shift": 2, "crop": {}, "brightness": 0.4}},
    ),
    "text": (Block("text", Text(), TEXTS), {"kind": "text", "tokenizer": {"kind": "wordpiece"}}),
    "tabular": (Block("size", Real(), np.arange(12, dtype=np.float32)), {"kind": "tabular"}),
    "observation": (Block("episode", Episode("CartPole-v1", 500), np.arange(12)), {"kind": "observation"}),
}
AUGMENTED = {"image"}


def test_every_input_has_a_case() -> None:
    assert set(CASES) == set(INPUTS)


@pytest.mark.parametrize("kind", INPUTS)
class TestInput:
    def resolved(self, kind: str) -> tuple[Any, Block, Any, Resolved]:
        module, (examples, fields) = INPUTS[kind], CASES[kind]
        asked = module.Config.model_validate(fields)
        return module, examples, asked, Resolved(*module.resolve(asked, examples, published={}))

    def test_its_config_and_spec_name_it(self, kind: str) -> None:
        assert INPUTS[kind].Config.model_fields["kind"].default == kind
        assert INPUTS[kind].Spec.model_fields["kind"].default == kind
        assert {column.kind for column in CASES[kind][0].columns.values()} <= set(INPUTS[kind].READS)

    def test_a_spec_comes_back_from_a_manifest(self, kind: str) -> None:
        module, _, _, given = self.resolved(kind)
        assert module.Spec.model_validate_json(given.spec.model_dump_json()) == given.spec
        assert all(type(content) is bytes for content in given.files.values())

    def test_what_is_finished_is_what_the_model_takes(self, kind: str) -> None:
        module, examples, _, given = self.resolved(kind)
        fields = module.encode(examples.read(5), given=given)
        made = module.finish({name: torch.from_numpy(array) for name, array in fields.items()}, given=given)
        assert list(made) == [spec.name for spec in specs(given)]
        for spec, tensor in zip(specs(given), made.values(), strict=True):
            assert str(tensor.dtype).removeprefix("torch.") == spec.dtype
            assert len(tensor) == 5
            sizes = zip(tensor.shape[1:], spec.shape[1:], strict=True)
            assert all(size == wanted for size, wanted in sizes if isinstance(wanted, int))

    def test_luck_alone_decides_and_no_luck_is_evaluation(self, kind: str) -> None:
        module, examples, asked, given = self.resolved(kind)
        records, indices = examples.read(), np.arange(len(examples))

        def encode(chosen: np.ndarray, epoch: int = 0) -> dict[str, np.ndarray]:
            some = {name: values[chosen] for name, values in records.items()}
            return module.encode(some, given=given, asked=asked, luck=Luck(0, epoch, chosen))

        whole, part = encode(indices), encode(indices[3:8])
        still = module.encode(records, given=given)
        for name in whole:
            width = part[name].shape[1]  # fewer samples may make shorter fields
            assert np.array_equal(whole[name][3:8, :width], part[name])
            assert np.array_equal(encode(indices, epoch=1)[name], whole[name]) == (kind not in AUGMENTED)
            assert np.array_equal(module.encode(records, given=given, asked=asked)[name], still[name])


def test_images_are_finished_alike_on_the_host_and_on_a_device() -> None:
    from bmctl.inputs.image.device import on_device

    spec = image_input.Spec(size=(9, 7), channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    pixels = torch.from_numpy(PICTURES)
    for channels_last in (False, True):
        host = image_input.finish({"input": pixels}, given=Resolved(spec), channels_last=channels_last)["input"]
        device = on_device(pixels, spec, channels_last=channels_last)
        assert torch.equal(host, device)
        assert host.stride() == device.stride()


def test_pixels_in_place_of_prepared_arrays() -> None:
    given = Resolved(image_input.Spec(size=(9, 7), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3))
    found = image_input.unprepared({"x": PICTURES}, given=given, name="a.npz")
    assert found is not None
    assert image_input.encode(found, given=given)["input"].shape == PICTURES.shape
    assert image_input.unprepared({"x": PICTURES.astype(np.float32)}, given=given, name="a.npz") is None
