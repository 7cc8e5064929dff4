"""What must hold between sections."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmctl.recipe import load_recipe
from bmctl.recipe.checks import check_sections
from bmctl.recipe.yamlio import parse_yaml

FULL = """
name: r
model: {name: bmctl:rescnn}
data: {source: {kind: digits}}
"""


def found(text: str) -> list[str]:
    return [
        f"{'.'.join(map(str, path))}: {message}" for path, message, _ in check_sections(parse_yaml(text, name="x").data)
    ]


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("name: r\nmodel: {name: bmctl:mlp}\ntrain: {}", "train", "needs a `data` section"),
        ("name: r\ndata: {source: {kind: digits}}\ntrain: {}", "train", "needs a `model` section"),
        ("name: r\ntask: {kind: classify}", "task", "needs a `data` section"),
        ("name: r\ngates: {max_drop: 0.1}", "gates.max_drop", "no metric"),
        (
            FULL + "gates: {min_speedup: 2}\nexport: {baseline: false}",
            "gates.min_speedup",
            "`export.baseline` is false",
        ),
        ("name: r\ngates: {metrics: {loss: {max: 1}}}", "gates.metrics", "no metric"),
        (FULL + "gates: {max_drop: 1.5}", "gates.max_drop", "must be at most 1, got 1.5"),
        (
            FULL + "gates: {metrics: {macrof1: {min: 0.8}}}",
            "gates.metrics.macrof1",
            "classify has no such metric; it has accuracy, macro_f1, loss",
        ),
        (FULL + "gates: {metrics: {accuracy: {min: 90}}}", "gates.metrics.accuracy.min", "must be at most 1, got 90"),
        (FULL + "gates: {metrics: {macro_f1: {max_drop: 2}}}", "gates.metrics.macro_f1.max_drop", "at most 1, got 2"),
        (FULL + "gates: {metrics: {loss: {}}}", "gates.metrics.loss", "has no limit"),
        (FULL + "gates: {metrics: {loss: {min: 2, max: 1}}}", "gates.metrics.loss", "min <= max, got 2, 1"),
        ("name: r\nmodel: {name: bmctl:mlp, pretrained: true}", "model.pretrained", "no published weights"),
        ("name: r\nmodel: {name: bmctl:rescn}", "model.name", "must be one of"),
        ("name: r\nmodel: {name: bmctl:rescnn, args: {widht: 8}}", "model.args.widht", "takes no such argument"),
        ("name: r\nmodel: {name: bmctl:mlp, args: {hidden: [0]}}", "model.args.hidden", "greater than or equal to 1"),
        (FULL + "train: {batch_size: 10}\nlaunch: {nproc: 4}", "train.batch_size", "do not divide by launch.nproc = 4"),
        (FULL + "train: {}\nlaunch: {nproc: 3}", "train.batch_size", "64 samples"),
        (FULL + "train: {batch_size: 12, accumulate: 8}", "train.batch_size", "of 8 parts each"),
        (
            FULL + "train: {batch_size: 8}\nlaunch: {nproc: 2, nodes: {max: 3}, rendezvous: 'a:1'}",
            "train.batch_size",
            "do not divide by 6 processes, which launch.nodes allows",
        ),
        (
            FULL + "compress: [{method: svd, recover: {fit: {batch_size: 3}}}]\nlaunch: {nproc: 2}",
            "compress.0.recover.fit.batch_size",
            "3 samples",
        ),
        (FULL + "train: {precision: fp16}\nlaunch: {device: cpu}", "train.precision", "fp16 needs a GPU"),
        (FULL + "train: {precision: tf32}\nlaunch: {device: cpu}", "train.precision", "tf32 is a format"),
        (FULL + "launch: {nodes: {min: 3, max: 2}, rendezvous: 'a:1'}", "launch.nodes", "must be min <= max, got 3, 2"),
        (FULL + "launch: {nodes: {max: 2}}", "launch.nodes", "2 machines must know where to meet"),
        (FULL + "launch: {strategy: ddp, cpu_offload: true}", "launch.cpu_offload", "only fsdp can offload it"),
        (FULL + "export: {axes: {batch: {min: 4, opt: 2}}}", "export.axes.batch", "got 4, 2, 64"),
        (FULL + "export: {axes: {batch: {max: 4}}}", "export.axes.batch", "got 1, 8, 4"),
        (
            FULL + "export: {axes: {batch: {max: 32}}, backends: [{name: tensorrt_rtx}]}",
            "export.measure.batch_size",
            "64 is outside the batch profile 1 to 32",
        ),
        (FULL + "compress: [{method: ptq}, {method: svd}]", "compress.1", "cannot follow ptq"),
        (FULL + "compress: [{method: svd}, {method: svd}]", "compress.1", "a second step named 'svd'"),
        (FULL + "compress: [{method: svd, name: train}]", "compress.0.name", "name of a stage"),
        ("name: r\ncompress: [{method: ptq}]", "compress.0", "needs a `data` section to calibrate"),
        ("name: r\ncompress: [{method: svd, recover: {}}]", "compress.0.recover", "needs a `data` section"),
        (
            FULL.replace("digits}", "digits}, input: {mean: [0.5], std: [1, 1]}"),
            "data.input.std",
            "mean has 1",
        ),
        (FULL.replace("digits}", "digits}, input: {mean: [1], channels: 3}"), "data.input.mean", "3 channel"),
        (FULL.replace("digits}", "digits}, input: {size: [8]}"), "data.input.size", "got 1 numbers"),
        (FULL + "infer: {data: x, backend: onnxrutime}", "infer.backend", "must be one of auto"),
    ],
)
def test_contradictions(text: str, path: str, words: str) -> None:
    problems = found(text)
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}: ")
    assert words in problems[0]


@pytest.mark.parametrize(
    "text",
    [
        FULL + "compress: [{method: svd}, {method: svd, name: svd-2}, {method: ptq}, {method: cast}]",
        FULL + "export: {axes: {batch: {max: 32}}, backends: [{name: openvino}]}",
        FULL + "gates: {min_speedup: 2, max_drop: 0.1}",
        FULL + "gates: {metrics: {loss: {max: 3, max_drop: 1.5}, accuracy: {min: 0.9, max_drop: 0.01}}}",
        FULL + "gates: {metrics: {loss: 3, accuracy: {min: x}}}",  # the sections' models report it
        FULL + "train: {batch_size: 12}\nlaunch: {nproc: 4}",
        "name: r\ncompress: [{method: svd}]",
        # nonsense that the models of the sections report
        "name: r\ncompress: 5\nexport: 3\ngates: [1]\nlaunch: {nproc: x}\ntrain: true\ndata: 1\nmodel: 2",
        "name: r\ncompress: [1, {method: [x]}, {method: nope}]",
    ],
)
def test_what_is_no_contradiction(text: str) -> None:
    assert not [line for line in found(text) if not line.startswith("train: ")]


def test_the_built_in_recipe_has_none() -> None:
    load_recipe("fashion-mnist")


@pytest.mark.parametrize("given", ["", "input: {}", "input: image", "input: {size: 8}", "input: {kind: image}"])
def test_the_kind_of_an_input_follows_from_the_source(given: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"name: r\ndata:\n  source: digits\n  {given}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data is not None
    assert recipe.data.input.kind == "image"
    assert recipe.data.input.size == (8 if "size" in given else None)
