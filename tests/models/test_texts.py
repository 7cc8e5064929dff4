"""Classifiers of texts: our own encoder, and those of transformers by name and by folder. Nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.specs import image_spec, text_spec

from bmctl import models
from bmctl.errors import DependencyError, RecipeError
from bmctl.models import ModelConfig, ModelSpec

TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
SMALL = [
    ("bmctl:encoder", {"width": 16, "depth": 2, "heads": 2}),
    ("transformers:bert", TINY_BERT),
    ("transformers:distilbert", TINY_DISTILBERT),
    ("transformers:roberta", {**TINY_BERT, "max_position_embeddings": 40}),
    ("transformers:modernbert", TINY_BERT),
]


def texts(num: int = 3, *, num_tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; the first text is half as long as the others."""
    ids = torch.randint(2, 50, (num, num_tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, num_tokens // 2 :] = 0
    return ids * mask, mask


@pytest.mark.parametrize(("name", "args"), SMALL)
def test_a_model_is_built_again_from_its_json(name: str, args: dict) -> None:
    spec = models.resolve(text_spec(name, args=args))
    model, again = models.build(spec), models.build(ModelSpec.model_validate_json(spec.model_dump_json()))
    assert model.training
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        logits = model.eval()(*texts())
        assert logits.shape == (3, 7)
        assert torch.equal(again.eval()(*texts()), logits)


@pytest.mark.parametrize(("name", "args"), SMALL)
def test_padding_changes_nothing(name: str, args: dict) -> None:
    model = models.build(text_spec(name, args=args)).eval()
    ids, mask = texts()
    with torch.no_grad():
        alone = model(ids[:1, :4], mask[:1, :4])
        torch.testing.assert_close(model(ids, mask)[:1], alone, atol=1e-5, rtol=1e-5)
        other = ids.clone()
        other[0, 4:] = 3
        torch.testing.assert_close(model(other, mask)[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "args"), SMALL)
def test_the_graph_is_exported_with_any_batch_and_length(name: str, args: dict) -> None:
    model = models.build(text_spec(name, args=args)).eval()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=1, max=16)}
    program = torch.export.export(model, texts(2), dynamic_shapes=(sizes, sizes))
    for inputs in (texts(5, num_tokens=16), texts(1, num_tokens=3)):
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize(("name", "args"), SMALL[:2])
def test_a_few_steps_learn(name: str, args: dict) -> None:
    torch.manual_seed(0)
    model = models.build(text_spec(name, args=args))
    ids, mask = texts(14)
    y = torch.arange(14) % 7
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids, mask), y).backward()
        optimizer.step()
    assert (model.eval()(ids, mask).argmax(dim=1) == y).float().mean() > 0.9


def test_a_text_of_padding_alone_gives_numbers() -> None:
    model = models.build(text_spec("bmctl:encoder")).eval()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert model(ids, ids).isfinite().all()
    assert model.half()(ids, ids).isfinite().all()


def test_stochastic_depth_and_dropout_of_the_encoder() -> None:
    drops = {"dropout": 0.5, "stochastic_depth": 0.4}
    args = models.spec_args(ModelConfig.model_validate({"name": "bmctl:encoder", "args": {"depth": 2}, **drops}))
    model, plain = models.build(text_spec("bmctl:encoder", args=args)), models.build(text_spec("bmctl:encoder"))
    assert [layer.drop.p for layer in model.layers] == [0.2, 0.4]
    assert set(model.state_dict()) <= set(plain.state_dict())
    assert not torch.equal(model(*texts()), model(*texts()))
    assert torch.equal(model.eval()(*texts()), model(*texts()))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"width": 30}, r"model\.args\.width: 30 is no multiple of heads, 4"),
        ({"depth": 0}, r"model\.args\.depth: must be greater than or equal to 1, got 0"),
        ({"widht": 64}, r"model\.args\.widht"),
    ],
)
def test_bad_arguments_of_the_encoder(args: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        models.build(text_spec("bmctl:encoder", args=args))


@pytest.mark.parametrize("name", ["bmctl:rescnn", "bmctl:mlp", "torchvision:resnet18", "timm:test_vit"])
def test_a_model_of_images_is_given_no_texts(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"{name} takes images; the data give input_ids int64 \[batch, tokens\]"):
        models.build(text_spec(name))


def test_a_model_of_one_kind_is_not_given_the_other() -> None:
    with pytest.raises(RecipeError, match="transformers:vit takes images; the data give input_ids"):
        models.build(text_spec("transformers:vit"))
    for name in ("bmctl:encoder", "transformers:bert"):
        with pytest.raises(RecipeError, match=f"{name} takes texts; the data give input float32"):
            models.build(image_spec(name))


def test_misspelt_keys_of_a_configuration_are_guessed() -> None:
    for name, key, meant in (
        ("bert", "hiden_size", "hidden_size"),
        ("distilbert", "num_atention_heads", "num_attention_heads"),
    ):
        with pytest.raises(RecipeError, match=rf"model\.args\.{key}: transformers:{name} takes no") as caught:
            models.build(text_spec(f"transformers:{name}", args={key: 3}))
        assert f"did you mean {meant}?" in caught.value.hint
    for key in ("output_hidden_states", "return_dict", "problem_type"):  # of every configuration, of no architecture
        with pytest.raises(RecipeError, match=rf"model\.args\.{key}"):
            models.build(text_spec("transformers:bert", args={key: True}))
    with pytest.raises(RecipeError, match=r"model\.args\.vocab_size: bmctl sets this itself"):
        models.build(text_spec("transformers:bert", args={"vocab_size": 3}))


def test_texts_longer_than_the_model_are_refused_before_they_come() -> None:
    args = {**TINY_BERT, "max_position_embeddings": 12}
    with pytest.raises(RecipeError, match=r"data\.input\.max_tokens: 16, but .* takes at most 12"):
        models.build(text_spec("transformers:bert", args=args))
    with pytest.raises(RecipeError, match="cannot be built"):  # positions begin behind the padding
        models.build(text_spec("transformers:roberta", args={**args, "max_position_embeddings": 16}))


# -- a folder ---------------------------------------------------------------------------------------


def publish(folder: Path, *, with_head: bool = True) -> torch.nn.Module:
    """A tiny BERT as its owner would have saved it, with 5 classes or as a body alone."""
    torch.manual_seed(1)
    args = {**TINY_BERT, "max_position_embeddings": 32}
    model = models.build(text_spec("transformers:bert", args=args, num_classes=5)).eval()
    whole = model.model
    if with_head:
        whole.config.id2label = {index: f"kind {index}" for index in range(5)}
    (whole if with_head else whole.bert).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 20}))
    return model


def test_a_folder_brings_configuration_weights_and_tokenizer(tmp_path: Path) -> None:
    model = publish(tmp_path / "m")
    name = f"transformers:{tmp_path / 'm'}"
    known = models.published(ModelConfig(name=name, pretrained=True))
    files = {"tokenizer.json": str(tmp_path / "m" / "tokenizer.json")}
    assert known.of("text") == {"max_tokens": 20, "vocab_size": 50, "pad_id": 0, "files": files}
    assert known.of("image") == {}
    assert (known.num_classes, known.class_names) == (5, tuple(f"kind {index}" for index in range(5)))
    spec = models.resolve(text_spec(name, num_classes=5))
    with torch.no_grad():
        built = models.build(spec, pretrained=True).eval()
        assert torch.equal(built(*texts()), model(*texts()))
    (tmp_path / "m").rename(tmp_path / "elsewhere")  # what was resolved needs the folder no more
    again = models.build(ModelSpec.model_validate_json(spec.model_dump_json()))
    again.load_state_dict(model.state_dict(), strict=True)


def test_a_folder_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "m")
    name = "transformers:${ENV:SOME_MODELS}/m"
    with pytest.raises(RecipeError, match="environment variables not set: SOME_MODELS"):
        models.published(ModelConfig(name=name))
    monkeypatch.setenv("SOME_MODELS", str(tmp_path))
    assert models.published(ModelConfig(name=name)).of("text")["max_tokens"] == 20
    spec = models.resolve(text_spec(name, num_classes=5))
    monkeypatch.delenv("SOME_MODELS")
    assert models.build(spec)(*texts()).shape == (3, 5)


def test_a_body_gets_a_new_head(tmp_path: Path) -> None:
    model = publish(tmp_path / "m", with_head=False)
    name = f"transformers:{tmp_path / 'm'}"
    known = models.published(ModelConfig(name=name, pretrained=True))
    assert (known.has_weights, known.num_classes) == (True, None)
    built = models.build(models.resolve(text_spec(name, num_classes=3)), pretrained=True)
    mine, theirs = built.state_dict(), model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs if "classifier" not in key)
    assert mine["model.classifier.weight"].shape == (3, 16)


def test_weights_of_another_body_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "m")
    spec = models.resolve(text_spec(f"transformers:{tmp_path / 'm'}", args={"num_hidden_layers": 3}))
    with pytest.raises(RecipeError, match=r"the published weights of .* do not fit \(bert\.encoder\.layer\.2"):
        models.build(spec, pretrained=True)
    spec = models.resolve(text_spec(f"transformers:{tmp_path / 'm'}", args={"intermediate_size": 8}))
    with pytest.raises(RecipeError, match=r"do not fit \(bert\.encoder\.layer\.0"):
        models.build(spec, pretrained=True)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = publish(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(DependencyError, match=r"model\.safetensors"):
        models.build(models.resolve(text_spec(f"transformers:{tmp_path / 'm'}")), pretrained=True)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "m")
    with pytest.raises(RecipeError, match=r"data\.input\.tokenizer: it has 51 tokens, .* knows 50"):
        models.build(models.resolve(text_spec(f"transformers:{tmp_path / 'm'}", vocab_size=51)))


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vits"}))
    with pytest.raises(RecipeError, match=r"is of the type 'vits', which is neither a classifier of images or texts"):
        models.published(ModelConfig(name=f"transformers:{tmp_path}"))
