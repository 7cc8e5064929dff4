"""bmctl's own networks."""

from __future__ import annotations

import pytest
import torch
from tests.specs import image_spec

from bmctl import models
from bmctl.errors import RecipeError
from bmctl.schema import BATCH, TensorSpec


def build(name: str, **args: object) -> torch.nn.Module:
    return models.build(image_spec(f"bmctl:{name}", args=args))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_the_documented_ones() -> None:
    assert count(build("rescnn")) == 308_074
    assert count(build("rescnn", width=16)) == 77_754
    assert count(build("mlp")) == 784 * 512 + 512 + 512 * 256 + 256 + 256 * 10 + 10


def test_the_mlp_has_neither_batch_statistics_nor_dropout() -> None:
    kinds = {type(module) for module in build("mlp").modules()}
    assert not kinds & {torch.nn.BatchNorm1d, torch.nn.Dropout}


@pytest.mark.parametrize("name", ["rescnn", "mlp"])
def test_a_few_steps_learn(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, **({"width": 4} if name == "rescnn" else {"hidden": (32,)}))
    x, y = torch.randn(20, 1, 28, 28), torch.arange(20) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(dim=1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("rescnn", {"width": 0}),
        ("rescnn", {"width": 2**17}),
        ("rescnn", {"width": True}),
        ("rescnn", {"stochastic_depth": 1.0}),
        ("rescnn", {"hidden": (3,)}),
        ("mlp", {"hidden": (0,)}),
        ("mlp", {"hidden": "x"}),
        ("mlp", {"dropout": True}),
    ],
)
def test_bad_arguments_are_refused(name: str, args: dict) -> None:
    with pytest.raises(RecipeError, match=rf"model\.args\.{next(iter(args))}: "):
        build(name, **args)


def test_an_argument_that_is_not_known_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"model\.args\.widht: bmctl:rescnn takes no such argument") as caught:
        build("rescnn", widht=8)
    assert caught.value.hint == "did you mean width?"
    with pytest.raises(RecipeError) as caught:
        build("mlp", bananas=8)
    assert caught.value.hint == "bmctl:mlp takes hidden, dropout"


def test_one_hidden_layer_may_be_one_number() -> None:
    assert count(build("mlp", hidden=16)) == count(build("mlp", hidden=(16,))) == 784 * 16 + 16 + 16 * 10 + 10


def test_the_mlp_takes_vectors_too() -> None:
    def spec(name: str, *sizes: int | str) -> models.ModelSpec:
        vectors = TensorSpec(name="numbers", dtype="float32", shape=(BATCH, *sizes))
        return image_spec(name).model_copy(update={"given": (vectors,)})

    assert models.build(spec("bmctl:mlp", 5))(torch.zeros(3, 5)).shape == (3, 10)
    for given in (spec("bmctl:mlp", "length"), spec("bmctl:rescnn", 5)):
        with pytest.raises(RecipeError, match=rf"{given.name} takes images; the data give numbers float32 \[batch, "):
            models.build(given)


def test_images_that_nothing_would_be_left_of_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least 8x8 pixels"):
        models.build(image_spec("bmctl:rescnn", size=(7, 28)))


@pytest.mark.parametrize("name", ["rescnn", "mlp"])
def test_the_graph_is_exported_with_any_batch(name: str) -> None:
    """Strict torch.export, the way to ONNX, sees no Python that depends on the data or the batch."""
    model = build(name).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(program.module()(x), model(x))


def tabular(numbers: int, sizes: tuple[int, ...]) -> torch.nn.Module:
    given = (
        *((TensorSpec(name="numbers", dtype="float32", shape=(BATCH, numbers)),) if numbers else ()),
        *((TensorSpec(name="categories", dtype="int64", shape=(BATCH, len(sizes))),) if sizes else ()),
    )
    told = {"num_classes": 2, "category_sizes": sizes}
    args = {"hidden": (8,), "embedding": 3}
    return models.build(models.ModelSpec(name="bmctl:tabular", args=args, given=given, told=told))


def test_rows_of_numbers_of_words_and_of_both() -> None:
    torch.manual_seed(0)
    numbers, categories = torch.randn(5, 4), torch.tensor([[0, 3], [1, 0], [2, 4], [0, 0], [2, 1]])
    assert tabular(4, ())(numbers).shape == (5, 2)
    assert tabular(0, (3, 5))(categories).shape == (5, 2)
    both = tabular(4, (3, 5))
    assert count(both) == 8 * 3 + (4 + 2 * 3) * 8 + 8 + 8 * 2 + 2
    # The same id means another thing in another column.
    rows = both.embedding(categories + both.first)
    assert torch.equal(rows[0, 0], both.embedding.weight[0])
    assert torch.equal(rows[0, 1], both.embedding.weight[3 + 3])


def test_a_tabular_network_takes_rows() -> None:
    with pytest.raises(RecipeError, match="bmctl:tabular takes rows of a table; the data give input float32"):
        build("tabular")
