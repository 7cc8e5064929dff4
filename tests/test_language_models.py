"""A language model the whole way, small: trained, compressed, exported with a cache, going on with texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bmctl.cli import main

TEXT = (
    "the of a man woman said to and it was she he not very happy much house dear Emma walked could never think of "
    "seeing her again, naïve—"
)
WORDS = TEXT.split()
PROMPTS = ["The house was very", "she", "Emma walked to the house. He said it was not", "a"]
RECIPE = """
name: tiny
model: {name: "%s", args: %s}
data:
  source: {kind: corpus, path: text.txt, piece: 96, val: 0.1, test: 0.1}
  input: {tokenizer: {vocab_size: 320}}
task: {kind: lm, generate: {max_tokens: 12}}
train: {epochs: 2, batch_size: 16, optimizer: {lr: 0.02}, precision: fp32}
launch: {threads: 1}
compress: %s
export:
  backends: [%s]
  axes: {batch: {min: 1, opt: 4, max: 16}}
  measure: {batch_size: 4, rounds: 3}
"""
DECODER = "{width: 32, depth: 2, heads: 4, kv_heads: 2}"


def write(folder: Path, *, model: str, args: str, compress: str, backends: str) -> None:
    luck = random.Random(0)
    lines = [" ".join(luck.choices(WORDS, k=luck.randint(4, 11))).capitalize() for _ in range(320)]
    (folder / "text.txt").write_text(".\n".join(lines), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "r.yaml").write_text(RECIPE % (model, args, compress, backends))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as it was trained and in int8, both on ONNX Runtime and OpenVINO."""
    folder = tmp_path_factory.mktemp("lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(
            folder, model="bmctl:decoder", args=DECODER, compress="[{method: ptq, samples: 24}]",
            backends="onnxruntime, openvino",
        )  # fmt: skip
        assert main(["run", "--recipe", "./r.yaml", "--quiet"]) == 0
    return folder / "runs" / "tiny"


def go_on(model: Path, data: Path | str, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict]:
    capsys.readouterr()
    assert main(["infer", str(data), "--model", str(model), "--quiet", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_artifact_is_measured_in_bits_per_byte(run: Path) -> None:
    rows = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    trained = rows["packages/00-train"]["test"]
    assert (trained["name"], trained["better"], trained["unit"]) == ("bits_per_byte", "lower", "bits")
    assert 0 < trained["low"] < trained["value"] < trained["high"] < 4 and trained["trivial"] > 1
    for name in ("deploy/baseline/onnxruntime", "deploy/baseline/openvino"):
        assert rows[name]["test"]["value"] == pytest.approx(trained["value"], rel=1e-5 if "onnx" in name else 0.02)
    for name in ("deploy/onnxruntime", "deploy/openvino"):
        assert rows[name]["precision"] == "int8"
        assert rows[name]["test"]["value"] == pytest.approx(trained["value"], rel=0.05)
    manifest = json.loads((run / "packages/00-train/manifest.json").read_text())
    assert set(manifest["metrics"]["val"]["values"]) == {"bits_per_byte", "perplexity", "loss"}
    assert manifest["aliases"] == {"head.weight": "tokens.weight"}


def test_one_graph_reads_prompts_and_single_tokens(run: Path) -> None:
    import onnx

    graph = onnx.load(run / "deploy/onnxruntime/model.onnx").graph
    shapes = {
        each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in graph.input
    }
    assert list(shapes)[:3] == ["input_ids", "attention_mask", "at"]
    assert shapes["input_ids"] == ["batch", "tokens"] and shapes["at"] == ["batch", "kept"]
    assert shapes["past.1.value"] == ["batch", 2, "past", 8] and len(shapes) == 3 + 4
    assert [each.name for each in graph.output] == [
        "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value",
    ]  # fmt: skip


def test_texts_go_on_alike_token_for_token(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch, ONNX Runtime and OpenVINO, prompts of four lengths together and each alone."""
    prompts = run.parents[1] / "prompts.txt"
    right = go_on(run / "packages/00-train", prompts, capsys)
    assert [one["input"] for one in right] == [f"prompts.txt:{i}" for i in range(1, 5)]
    assert all(len(one["tokens"]) == 12 for one in right) and len({tuple(one["tokens"]) for one in right}) > 1
    for name in ("onnxruntime", "openvino"):
        found = go_on(run / "deploy/baseline" / name, prompts, capsys)
        assert [one["tokens"] for one in found] == [one["tokens"] for one in right], name
    for prompt, one in zip(PROMPTS, right, strict=True):
        (alone,) = go_on(run / "deploy/baseline/onnxruntime", prompt, capsys)
        assert alone["tokens"] == one["tokens"] and alone["text"] == one["text"]


def test_how_texts_go_on_is_asked_for_each_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = go_on(run, PROMPTS[0], capsys)
    how = ("--set", "task.generate={max_tokens: 20, temperature: 1.5, top_k: 50, top_p: 0.95, seed: 3}")
    drawn = go_on(run, PROMPTS[0], capsys, *how)
    assert len(greedy[0]["tokens"]) == 12 and len(drawn[0]["tokens"]) == 20
    assert go_on(run, PROMPTS[0], capsys, *how) == drawn
    other = go_on(run, PROMPTS[0], capsys, "--set", how[1].replace("seed: 3", "seed: 4"))
    assert other[0]["tokens"] != drawn[0]["tokens"]
    assert main(["infer", PROMPTS[0], "--model", str(run), "--quiet", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("input,text,stopped\n")


@pytest.mark.parametrize(
    ("prompt", "pattern"), [("word " * 200, "tokens, and the model takes"), (" ", "there is no text")]
)
def test_prompts_that_cannot_be_gone_on_with(
    run: Path, prompt: str, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["infer", prompt, "--model", str(run), "--quiet"]) == 4
    assert pattern in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "args", "compress"),
    [
        ("bmctl:decoder", DECODER, "[{method: svd, ratio: 0.8, min_weights: 1000, ignore: [head]}, {method: cast}]"),
        (
            "bmctl:decoder",
            "{width: 32, depth: 2, heads: 4, positions: learned, norm: layer, tied: false}",
            "[{method: structured, ratio: 0.25, ignore: ['*.query', '*.key', '*.value']}, {method: magnitude}]",
        ),
        ("transformers:gpt2", "{n_embd: 32, n_layer: 2, n_head: 4}", "[{method: ptq, samples: 24}]"),
        (
            "transformers:llama",
            "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
            "intermediate_size: 64}",
            "[{method: ptq, samples: 24}]",
        ),
    ],
    ids=["svd-cast", "structured-magnitude", "gpt2", "llama"],
)
def test_other_models_and_methods_go_the_whole_way(
    model: str, args: str, compress: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path, model=model, args=args, compress=compress, backends="onnxruntime, openvino, tensorrt_rtx")
    assert main(["run", "--recipe", "./r.yaml", "--quiet", "--set", "train.epochs=1"]) == 0
    run = tmp_path / "runs" / "tiny"
    assert (run / "deploy/tensorrt_rtx/model.rtx.engine").is_file()
    right = go_on(run / "packages/00-train", tmp_path / "prompts.txt", capsys)
    found = go_on(run / "deploy/baseline/onnxruntime", tmp_path / "prompts.txt", capsys)
    assert [one["tokens"] for one in found] == [one["tokens"] for one in right]


def test_a_published_model_is_adapted_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with config.json, weights and a tokenizer whose one mark both begins and ends texts, as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    write(tmp_path, model="transformers:./tiny-gpt2", args="{}", compress="[]", backends="onnxruntime")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    mark = tokenizer.token_to_id("<|endoftext|>")
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=32, n_layer=1, n_head=2, n_positions=128, bos_token_id=mark,
        eos_token_id=mark,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained("tiny-gpt2")
    tokenizer.save("tiny-gpt2/tokenizer.json")
    recipe = (tmp_path / "r.yaml").read_text()
    lora = (
        "compress: [{method: lora, recover: {teacher: none, fit: {epochs: 1, batch_size: 16, optimizer: {lr: 0.03}}}}]"
    )
    recipe = recipe.replace("input: {tokenizer: {vocab_size: 320}}", "input: {}").replace("compress: []", lora)
    (tmp_path / "r.yaml").write_text(recipe.replace("args: {}", "pretrained: true"))
    assert main(["import", "transformers:./tiny-gpt2", "-r", "./r.yaml", "-o", "run", "--quiet"]) == 0
    assert main(["compress", "run", "-r", "./r.yaml", "-o", "run", "--quiet"]) == 0
    first, second = (
        json.loads((tmp_path / "run/packages" / name / "manifest.json").read_text())
        for name in ("00-import", "01-lora")
    )
    assert first["input"]["begin_id"] == first["input"]["end_id"] == mark
    assert second["metrics"]["val"]["value"] < first["metrics"]["val"]["value"] - 0.03
    found = go_on(tmp_path / "run", "she was", capsys)
    assert len(found[0]["tokens"]) == 12 or found[0]["stopped"] == "end"
