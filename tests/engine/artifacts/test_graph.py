"""Export to ONNX: the same numbers at any batch, the same bytes every time, and refusals that name the culprit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from bmctl.engine.artifacts import graph
from bmctl.errors import GateError, UnsupportedError
from bmctl.models.networks import ResCNN


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
    graph.export_onnx(network(), example=example, out=path)
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
    names = {"input_name": "image", "output_name": "scores"}
    for file in ("model.onnx", "again.onnx"):
        graph.export_onnx(model, example=torch.randn(3, 4), out=tmp_path / file, **names)
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


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, -x


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (Branching(), r"Branching decides by the values of its input at test_graph\.py:\d+ in forward"),
        (Eigen(), r"operator aten\.linalg_eig"),
        (FixedBatch(), r"FixedBatch does not run on a batch of 1"),
        (Pair(), r"Pair returns tuple"),
    ],
)
def test_what_has_no_graph_is_refused(
    model: nn.Module, pattern: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedError, match=pattern) as caught:
        graph.export_onnx(model, example=torch.randn(2, 4), out=tmp_path / "model.onnx")
    assert caught.value.exit_code == 11 and caught.value.hint and "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_a_graph_that_differs_is_kept_as_rejected(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="differs from the model") as caught:
        graph.export_onnx(Noisy(), example=torch.randn(2, 4), out=tmp_path / "model.onnx")
    assert caught.value.exit_code == 8
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx.rejected"]
    assert str(tmp_path / "model.onnx.rejected") in caught.value.message


def test_a_batch_baked_into_the_graph_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exporter would write for a batch that it believes to be 2."""

    def convert(model: nn.Module, example: torch.Tensor, *, input_name: str, output_name: str) -> onnx.ModelProto:
        program = torch.onnx.export(
            model, (example,), input_names=[input_name], output_names=[output_name], verbose=False
        )
        assert program is not None
        return program.model_proto

    monkeypatch.setattr(graph, "_convert", convert)
    with pytest.raises(GateError, match=r"kept as .*model\.onnx\.rejected"):
        graph.export_onnx(nn.Linear(4, 3).eval(), example=torch.randn(2, 4), out=tmp_path / "model.onnx")


def test_an_old_file_survives_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(GateError):
        graph.export_onnx(Noisy(), example=torch.randn(2, 4), out=tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


def test_two_gigabytes_are_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graph, "MAX_BYTES", 1000)
    with pytest.raises(UnsupportedError, match="GiB of weights"):
        graph.export_onnx(network(), example=torch.randn(2, 1, 28, 28), out=tmp_path / "model.onnx")


def test_one_sample_is_no_example(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 or more"):
        graph.export_onnx(network(), example=torch.randn(1, 1, 28, 28), out=tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224", "torchvision:mobilenet_v3_small"]
)
def test_published_models_export(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.specs import image_spec

    from bmctl.models import build

    model = build(image_spec(name, channels=3, size=(224, 224)))
    graph.export_onnx(model, example=torch.randn(2, 3, 224, 224), out=tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 10**6
    assert capfd.readouterr() == ("", "")
