"""Every kind of wrong value: where it stands, what is said of it, what would mend it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bmctl.errors import RecipeError
from bmctl.recipe import load_recipe

HEAD = "name: r\nmodel: bmctl:mlp\ndata: {source: digits}\n"


def told(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return "\n".join(str(problem) for problem in caught.value.problems).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        # unknown keys, at every depth
        ("sed: 1", r"^r\.yaml:4:1: sed: unknown key\n    hint: did you mean seed\?$"),
        ("train: {batch-size: 1}", r"4:9: train\.batch-size: unknown key\n.*did you mean batch_size\?"),
        ("train: {lr: 1}", r"4:9: train\.lr: unknown key\n.*did you mean train\.optimizer\.lr\?"),
        ("train: {optimizer: {name: sgd, moment: 1}}", r"4:32: train\.optimizer\.moment: unknown.*\n.*momentum\?"),
        ("train: {optimizer: {name: sgd, sgd: 1}}", r"4:32: train\.optimizer\.sgd: unknown key"),
        ("compress: [ptq]\nlaunch:\n  a: 1", r"6:3: launch\.a: unknown key"),
        ("compress:\n - method: magnitude\n   recover: {fit: {epoch: 3}}", r"6:20: compress\.0\.recover\.fit\.epoch:"),
        ("model: {name: bmctl:mlp, _target_: os.system}", r"model\._target_: unknown key\n.*known here: args, dropout"),
        ("zzz: 1", r"zzz: unknown key\n    hint: known here: compress, data"),
        ("'\\x': 1", r"4:1: \\x: unknown"),
        ('"\\e[31m": 1', r"4:1: \\x1b\[31m: unknown key"),
        ('"a\\nb": 1', r"4:1: a\\nb: unknown key"),
        # wrong types
        ("seed: x", r'4:1: seed: must be a whole number, got "x"$'),
        ('seed: "5"', r'seed: must be a whole number, got "5"\n    hint: remove the quotes'),
        ("seed: 1e1", r"seed: must be a whole number, got 10\.0\n    hint: write 10"),
        ("seed: 1.5", r"seed: must be a whole number, got 1\.5$"),
        ("seed: true", r"seed: must be a whole number, got true"),
        ("seed: null", r"seed: must be a whole number, got nothing"),
        ("seed: [1]", r"seed: must be a whole number, got a list"),
        ("seed: {}", r"seed: must be a whole number, got a mapping"),
        ("train: {channels_last: no}", r"must be true or false, got \"no\"\n    hint: YAML 1\.2"),
        ("train: 5", r"4:1: train: must be a mapping, got 5"),
        ("compress: {method: svd}", r"4:1: compress: must be a list, got a mapping"),
        ("compress: svd", r"4:1: compress: must be a list, got \"svd\""),
        ("compress: [5]", r"4:12: compress\.0: must be a mapping, got 5"),
        ("compress: [[svd]]", r"4:12: compress\.0: must be a mapping, got a list"),
        ("infer: {data: 5}", r"infer\.data: must be text, got 5\n    hint: write it in quotes"),
        # ranges
        ("train: {epochs: 0}", r"4:9: train\.epochs: must be at least 1, got 0"),
        ("train: {optimizer: {lr: -1}}", r"4:21: train\.optimizer\.lr: must be greater than 0, got -1"),
        ("train: {optimizer: {lr: .nan}}", r"train\.optimizer\.lr: must be a finite number, got \.nan"),
        ("train: {optimizer: {lr: 1e999}}", r"must be a finite number, got \.inf"),
        ("seed: -1", r"seed: must be at least 0, got -1"),
        ("seed: 5000000000", r"seed: must be less than 4294967296, got 5000000000"),
        ("gates: {metrics: {loss: {mx: 1}}}", r"loss\.mx: unknown key\n    hint: did you mean max\?"),
        ("gates: {max_drop: 1.5}", r"4:9: gates\.max_drop: must be at most 1, got 1\.5"),
        # choices
        ("launch: {device: gpu}", r'4:10: launch\.device: must be one of auto, cpu, cuda, got "gpu"$'),
        ("train: {batch_size: many}", 'train\\.batch_size: must be a whole number or auto, got "many"'),
        ("train: {optimizer: {name: adam, momentum: 1}}", r"momentum: unknown key\n    hint: known here: betas, decay"),
        ("train: {precision: fp23}", r'one of auto, fp32, tf32, bf16, fp16, got "fp23"\n    hint: did you mean fp32\?'),
        ("train: {optimizer: adamm}", r"4:9: train\.optimizer\.name: must be one of .*adamw.*\n.*did you mean adam"),
        ("compress: [prt]", r"4:12: compress\.0\.method: must be one of .*\n    hint: did you mean ptq\?"),
        ("compress: [{ratio: 1}]", r"4:12: compress\.0: does not say its method, one of"),
        ("compress: [{method: 5}]", r"4:13: compress\.0\.method: must be one of .*, got \"5\""),
        ("compress: [{method: [svd]}]", r"compress\.0\.method: must be one of"),
        # names
        ("infer: {}", r"4:1: infer\.data: is missing"),
    ],
)  # fmt: skip
def test_problems(tmp_path: Path, text: str, pattern: str) -> None:
    key = text.partition(":")[0]
    head = "".join(line + "\n" for line in HEAD.splitlines() if not line.startswith(f"{key}:"))
    head += "\n" * (3 - head.count("\n"))
    found = told(tmp_path, head + text + "\n")
    assert re.search(pattern, found, re.MULTILINE), found
    assert len([line for line in found.splitlines() if "hint:" not in line]) == 1, found


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("x", 'data.input.size: must be a whole number or a list, got "x"'),
        ("{a: 1}", "data.input.size: must be a whole number or a list, got a mapping"),
        ("0", "data.input.size: must be at least 1, got 0"),
        ("[8, 0]", "data.input.size.1: must be at least 1, got 0"),
        ("[8, a]", 'data.input.size.1: must be a whole number, got "a"'),
    ],
)
def test_a_value_that_may_be_of_two_types_is_one_problem(tmp_path: Path, size: str, expected: str) -> None:
    found = told(tmp_path, f"name: r\ndata:\n  source: digits\n  input: {{size: {size}}}\n").splitlines()
    assert len(found) == 1
    assert found[0].endswith(f": {expected}")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("rescnn", r"must be SOURCE:NAME .*\n    hint: did you mean bmctl:rescnn\?"),
        ("resnet18", r"must be SOURCE:NAME"),
        ("torchvison:resnet18", r"must begin with .*\n    hint: did you mean torchvision:resnet18\?"),
        ("bmctl:rescn", r'must be one of .*bmctl:rescnn.*, got "bmctl:rescn"\n    hint: did you mean bmctl:rescnn\?'),
        ("timm:a b;rm -rf", r"must be timm: and then letters"),
        ("os.system", r"must be SOURCE:NAME"),
    ],
)
def test_names_of_models(tmp_path: Path, name: str, pattern: str) -> None:
    found = told(tmp_path, f"name: r\nmodel: '{name}'\n")
    assert re.search(rf"^r\.yaml:2:1: model\.name: {pattern}", found), found


@pytest.mark.parametrize("name", ["../x", "a b", "", "x" * 101, "$(id)", "a\\nb", "-x", "é"])
def test_names_of_recipes(tmp_path: Path, name: str) -> None:
    found = told(tmp_path, f'name: "{name}"\n')
    assert found.startswith("r.yaml:1:1: name: must be letters, digits")
    assert len(found) < 300


def test_everything_at_once_in_reading_order(tmp_path: Path) -> None:
    text = "name: r\nseed: -1\nx: 1\nlaunch:\n  nproc: 0\n  a: 1\n  a: 2\ncompress: [ptq, magnitude]\n"
    text += "gates: {max_drop: 2}\n"
    found = [line.split(": ")[0] for line in told(tmp_path, text).splitlines() if line.startswith("r.yaml")]
    places = ["2:1", "3:1", "5:3", "6:3", "7:3", "8:12", "8:17", "9:9", "9:9"]
    assert found == [f"r.yaml:{place}" for place in places]


def test_thousands_of_problems_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\n" + "".join(f"k{i}: 1\n" for i in range(2000)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.message == "2000 problems in the recipe, of which the first 50 are:"
    assert len(caught.value.problems) == 50
