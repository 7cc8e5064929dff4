"""Export to ONNX: the same numbers at any batch, the same bytes every time, and refusals that name the culprit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.engine.exporting import export
from torch import nn

from bmctl.engine.artifacts import graph
from bmctl.errors import GateError, UnsupportedError
from bmctl.models.own.networks import ResCNN
from bmctl.schema import Signature, Span, TensorSpec


def network() -> nn.Module:
    torch.manual_seed(0)
    model = ResCNN(num_classes=10, channels=1, width=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, example: torch.Tensor) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export(network(), example, path)
    return path


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_computes_the_same(exported: Path, batch: int) -> None:
    x = torch.randn(batch, 1, 28, 28)
    with torch.inference_mode():
        want = network()(x).numpy()
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], {"input": x.numpy()})[0], want, rtol=1e-4, atol=1e-5)


def test_the_graph_is_folded_and_tidy(exported: Path) -> None:
    model = onnx.load(exported)
    assert {node.op_type for node in model.graph.node} <= {"Conv", "Relu", "Add", "GlobalAveragePool", "ReduceMean",
                                                           "Reshape", "Flatten", "Gemm"}  # fmt: skip
    assert model.opset_import[0].version == graph.OPSET
    raw = exported.read_bytes()
    assert b".py" not in raw and b"site-packages" not in raw and b"stack_trace" not in raw
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_the_model_is_left_as_it_was_and_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).train().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {"input": "image", "output": "scores"}
    for file in ("model.onnx", "again.onnx"):
        export(model, torch.randn(3, 4), tmp_path / file, **names)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert model.training and next(model.parameters()).dtype == torch.float64
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    proto = onnx.load(tmp_path / "model.onnx")
    assert [v.name for v in (*proto.graph.input, *proto.graph.output)] == ["image", "scores"]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Eigen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x[:, :, None] * torch.eye(4)).real


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 4) * 2


class Word(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return "cat"


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (Branching(), r"Branching decides by the values of its input at test_graph\.py:\d+ in forward"),
        (Eigen(), r"operator aten\.linalg_eig"),
        (FixedBatch(), r"FixedBatch does not run on a batch of 1"),
        (Word(), r"Word: the model gives a str, expected logits"),
    ],
)
def test_what_has_no_graph_is_refused(
    model: nn.Module, pattern: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedError, match=pattern) as caught:
        export(model, torch.randn(2, 4), tmp_path / "model.onnx")
    assert caught.value.exit_code == 11 and caught.value.hint and "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_a_graph_that_differs_is_kept_as_rejected(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="differs from the model") as caught:
        export(Noisy(), torch.randn(2, 4), tmp_path / "model.onnx")
    assert caught.value.exit_code == 8
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx.rejected"]
    assert str(tmp_path / "model.onnx.rejected") in caught.value.message


def test_a_batch_baked_into_the_graph_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exporter would write for a batch that it believes to be 2."""

    def convert(model: nn.Module, signature: Signature, example: dict[str, np.ndarray]) -> onnx.ModelProto:
        fields = tuple(map(torch.from_numpy, example.values()))
        program = torch.onnx.export(model, fields, input_names=["input"], output_names=["logits"], verbose=False)
        assert program is not None
        return program.model_proto

    monkeypatch.setattr(graph, "_convert", convert)
    with pytest.raises(GateError, match=r"kept as .*model\.onnx\.rejected"):
        export(nn.Linear(4, 3).eval(), torch.randn(2, 4), tmp_path / "model.onnx")


def test_an_old_file_survives_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(GateError):
        export(Noisy(), torch.randn(2, 4), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


def test_two_gigabytes_are_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graph, "MAX_BYTES", 1000)
    with pytest.raises(UnsupportedError, match="GiB of weights"):
        export(network(), torch.randn(2, 1, 28, 28), tmp_path / "model.onnx")


def test_one_sample_is_enough(tmp_path: Path) -> None:
    export(network(), torch.randn(1, 1, 28, 28), tmp_path / "model.onnx")
    shape = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", 1, 28, 28]


class Texts(nn.Module):
    """Ids and a mask in, scores and states out; takes at most 24 tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places, self.head = nn.Embedding(50, 8), nn.Embedding(24, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        weights = mask.to(states.dtype)[..., None]
        return self.head((states * weights).sum(1) / weights.sum(1)), states


TEXTS = Signature(
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", "tokens")),
        TensorSpec(name="mask", dtype="int64", shape=("batch", "tokens")),
    ),
    outputs=(
        TensorSpec(name="logits", dtype="float32", shape=("batch", 3), role="scores"),
        TensorSpec(name="states", dtype="float32", shape=("batch", "tokens", 8)),
    ),
)


def test_several_inputs_outputs_and_free_axes(tmp_path: Path) -> None:
    """Sizes that were neither traced nor tried; the model's own limit says which may be tried."""
    model, ids = Texts().eval(), np.arange(12).reshape(2, 6)
    example = {"ids": ids, "mask": np.ones_like(ids)}
    axes = {"tokens": Span(min=1, opt=6, max=24)}
    graph.export_onnx(model, signature=TEXTS, example=example, out=tmp_path / "model.onnx", axes=axes)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert shapes == {"ids": ["batch", "tokens"], "mask": ["batch", "tokens"]}
    feed = {"ids": np.arange(21).reshape(3, 7), "mask": np.tri(3, 7, 2, dtype=np.int64)}
    with torch.inference_mode():
        want = model(*map(torch.from_numpy, feed.values()))
    for got, each in zip(session.run(["logits", "states"], feed), want, strict=True):
        np.testing.assert_allclose(got, each.numpy(), rtol=1e-4, atol=1e-5)


def test_a_size_that_the_model_does_not_take_is_named(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(2, 6)
    example = {"ids": ids, "mask": np.ones_like(ids)}
    axes = {"tokens": Span(min=1, opt=6, max=25)}
    with pytest.raises(UnsupportedError, match=r"Texts does not run on ids \[5, 25\], mask \[5, 25\]"):
        graph.export_onnx(Texts(), signature=TEXTS, example=example, out=tmp_path / "model.onnx", axes=axes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224", "torchvision:mobilenet_v3_small"]
)
def test_published_models_export(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.specs import image_spec

    from bmctl.models import build

    model = build(image_spec(name, channels=3, size=(224, 224)))
    export(model, torch.randn(2, 3, 224, 224), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 10**6
    assert capfd.readouterr() == ("", "")
