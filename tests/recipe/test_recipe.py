"""Recipes: loading, includes, overrides, shorthand, variables, saving."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmctl.errors import RecipeError
from bmctl.recipe import (
    Recipe,
    bare_recipe,
    builtin_recipes,
    describe,
    find_recipe,
    load_recipe,
    recipe_schema,
    recipe_yaml,
)
from bmctl.recipe.yamlio import parse_yaml
from bmctl.schema import resolve_env

BASE = """\
name: r
model: bmctl:rescnn
data: {source: bundled}
train: {epochs: 2, optimizer: {name: adamw, lr: 1e-3, weight_decay: 0.1}}
compress: [structured, {method: ptq}]
export: {backends: [onnxruntime, openvino]}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe file under tmp_path, return its path."""

    def write(text: str = BASE, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def problems(path: Path | str, *overrides: str) -> str:
    """All that is wrong, with tmp_path cut off the file names."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides=overrides)
    assert caught.value.exit_code == 3
    assert caught.value.problems
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    folder = f"{Path(path).parent}/"
    return "\n".join(str(problem).replace(folder, "") for problem in caught.value.problems)


# -- loading ----------------------------------------------------------------------------------------


def test_shorthand_is_the_long_form(write: Write) -> None:
    long = """\
name: r
model: {name: "bmctl:rescnn"}
data: {source: {kind: bundled}}
task: {kind: classify}
train: {epochs: 2, optimizer: {name: adamw, lr: 0.001, weight_decay: 0.1}}
compress: [{method: structured}, {method: ptq}]
export: {backends: [{name: onnxruntime}, {name: openvino}]}
"""
    assert load_recipe(write()) == load_recipe(write(long, "long.yaml"))


def test_data_is_classified_by_default(write: Write) -> None:
    assert load_recipe(write()).task.kind == "classify"
    assert load_recipe(write("name: r\nmodel: bmctl:mlp\n")).task is None
    smooth = load_recipe(write(), overrides=["task.label_smoothing=0.1"])
    assert (smooth.task.kind, smooth.task.label_smoothing) == ("classify", 0.1)


def test_optimizer_is_adamw_by_default(write: Write) -> None:
    recipe = load_recipe(write("name: r\nmodel: bmctl:mlp\ndata: {source: digits}\ntrain: {optimizer: {lr: 2e-3}}\n"))
    assert recipe.train is not None
    assert (recipe.train.optimizer.name, recipe.train.optimizer.lr) == ("adamw", 2e-3)


def test_built_in_recipes_load_and_are_found_by_name() -> None:
    names = builtin_recipes()
    assert "fashion-mnist" in names
    for name in names:
        assert load_recipe(name).name == name
        assert load_recipe(str(names[name])) == load_recipe(name)


def test_unknown_built_in_name() -> None:
    with pytest.raises(RecipeError, match="no built-in recipe 'fashion-mist'") as caught:
        find_recipe("fashion-mist")
    assert "did you mean fashion-mnist?" in caught.value.hint
    assert "bmctl recipes ls" in caught.value.hint


def test_a_file_named_without_slash_is_pointed_to(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(name="mine").parent)
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine")
    assert caught.value.hint == "for the file say ./mine"
    assert load_recipe("./mine").name == "r"


def test_bare_recipe() -> None:
    assert bare_recipe("x", ["data={source: digits}"]).data is not None
    with pytest.raises(RecipeError, match="--set dat=1: dat: unknown key"):
        bare_recipe("x", ["dat=1"])


# -- overrides --------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_wins(write: Write) -> None:
    recipe = load_recipe(
        write(),
        overrides=[
            "train.epochs=7",
            "train.epochs=5",
            "compress.0.ratio=0.25",
            "export.backends=[openvino]",
            "infer={data: x.png}",
            "gates.max_drop=1e-2",
            "train.optimizer.name=sgd",
            "model.args.width=8",
            "train.max_steps=",
            "seed=0x10",
        ],
    )
    assert recipe.train is not None and recipe.model is not None and recipe.infer is not None
    assert recipe.train.epochs == 5
    assert recipe.compress[0].ratio == 0.25
    assert [backend.name for backend in recipe.export.backends] == ["openvino"]
    assert (recipe.infer.data, recipe.gates.max_drop) == ("x.png", 0.01)
    assert (recipe.train.optimizer.name, recipe.train.optimizer.lr) == ("sgd", 1e-3)
    assert (recipe.model.args, recipe.train.max_steps, recipe.seed) == ({"width": 8}, None, 16)


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("train.epoch=1", r"^--set train\.epoch=1: train\.epoch: unknown key\n +hint: did you mean epochs\?"),
        ("trian.epochs=1", r"--set trian\.epochs=1: trian: unknown key\n +hint: did you mean train\?"),
        ("lr=1", r"--set lr=1: lr: unknown key\n +hint: did you mean train\.optimizer\.lr\?"),
        ("train.epochs=x", r'--set train\.epochs=x: train\.epochs: must be a whole number, got "x"'),
        ("train.optimizer.lr=-1", r"--set .*: train\.optimizer\.lr: must be greater than 0, got -1"),
        ("compress.2.ratio=1", r"compress has 2 item\(s\)"),
        ("compress.x.ratio=1", r"compress has 2 item\(s\), counted from 0, got 'x'"),
        ("compress.-1.ratio=1", r"got '-1'"),
        ("compress.0.ratio=2", r"--set .*: compress\.0\.ratio: must be"),
        ("name.x=1", r"name is a single value"),
        ("foo", r"--set foo: expected KEY=VALUE"),
        ("=1", r"an empty key"),
        ("a..b=1", r"an empty key"),
        ("seed=[1", r"--set seed=\[1: seed: not YAML"),
        ("seed=!!int 1", r"seed: the tag"),
        ("seed={a: 1, a: 2}", r"seed: the key 'a' is already given"),
        ("include=x.yaml", r"an include cannot be set"),
        ("export.backends=[openvin]", r"export\.backends\.0\.name: must be one of.*\n +hint: did you mean openvino\?"),
        (".".join("x" * 40) + "=1", r"more than 32 keys"),
        ("gates=null\nx: 1", r"not YAML|must be a mapping"),
        ("x" * 5000 + "=1", r"^--set x{60,80}\.\.\.: x+\.\.\.: unknown key"),
        ("\x1b[31m=1", r"^--set \\x1b\[31m=1: \\x1b\[31m: unknown key"),
    ],
)
def test_refused_overrides(write: Write, override: str, pattern: str) -> None:
    assert re.search(pattern, problems(write(), override))


def test_item_of_a_list_that_is_not_there(write: Write) -> None:
    found = problems(write("name: r\n"), "compress.0.ratio=1")
    assert "compress is not given, it has no item 0" in found


# -- includes ---------------------------------------------------------------------------------------


def test_includes_merge_mappings_and_replace_lists(write: Write) -> None:
    write(BASE, "parts/base.yaml")
    write("train: {epochs: 9, batch_size: 16}\n", "parts/long.yaml")
    path = write("include: [parts/base.yaml, parts/long.yaml]\nname: top\ntrain: {batch_size: 32}\ncompress: [svd]\n")
    recipe = load_recipe(path, overrides=["train.max_steps=3", "compress.0.ratio=0.5"])
    assert recipe.train is not None
    assert (recipe.name, recipe.train.epochs, recipe.train.batch_size, recipe.train.max_steps) == ("top", 9, 32, 3)
    assert recipe.train.optimizer.weight_decay == 0.1
    assert [step.method for step in recipe.compress] == ["svd"]
    assert [backend.name for backend in recipe.export.backends] == ["onnxruntime", "openvino"]


def test_include_of_a_built_in_recipe(write: Write) -> None:
    recipe = load_recipe(write("include: fashion-mnist\nname: mine\nseed: 4\n"))
    assert recipe == load_recipe("fashion-mnist").model_copy(update={"name": "mine", "seed": 4})


def test_another_kind_replaces_what_is_included(write: Write) -> None:
    write(BASE, "base.yaml")
    recipe = load_recipe(write("include: base.yaml\ntrain: {optimizer: {name: sgd, momentum: 0.5}}\n"))
    assert recipe.train is not None
    assert recipe.train.optimizer.momentum == 0.5
    assert recipe.train.optimizer.lr == 0.1  # sgd's own default, not what adamw was told


def test_problems_are_located_in_the_file_that_says_it(write: Write) -> None:
    write("name: r\ntrain:\n  epochs: 0\n  batch_size: 0\nsed: 1\n", "parts/base.yaml")
    path = write("include: parts/base.yaml\ntrain: {batch_size: -1}\nmodel: bmctl:mlp\ndata: {source: digits}\n")
    found = problems(path).splitlines()
    assert [line for line in found if "hint" not in line] == [
        "parts/base.yaml:3:3: train.epochs: must be at least 1, got 0",
        "parts/base.yaml:5:1: sed: unknown key",
        "r.yaml:2:9: train.batch_size: must be at least 1 or auto, got -1",
    ]


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ({"r.yaml": "include: r.yaml\n"}, r"r\.yaml:1:1: include: 'r\.yaml' includes itself"),
        (
            {"r.yaml": "include: [a.yaml]\n", "a.yaml": "include: ./r.yaml\n"},
            r"^a\.yaml:1:1: include: .* includes itself",
        ),
        ({"r.yaml": "include: ../out.yaml\n"}, r"r\.yaml:1:1: include: .* is outside the recipe's directory"),
        ({"r.yaml": "include: [/etc/passwd]\n"}, r"r\.yaml:1:11: include: .* is outside"),
        (
            {"r.yaml": "include: sub/a.yaml\n", "sub/a.yaml": "include: ../../x.yaml\n"},
            r"sub/a\.yaml:1:1: .* is outside",
        ),
        ({"r.yaml": "include: gone.yaml\n"}, r"r\.yaml:1:1: include: gone\.yaml: no such file"),
        ({"r.yaml": "include: sub/\n", "sub/a.yaml": ""}, r"r\.yaml:1:1: include: sub: is a directory"),
        ({"r.yaml": "include: fashion-mnits\n"}, r"include: no built-in recipe 'fashion-mnits'\n.*did you mean"),
        ({"r.yaml": "include: 5\n"}, r"include: must be text or a list of texts"),
        ({"r.yaml": "include: [[a.yaml]]\n"}, r"include: must be text or a list"),
        ({"r.yaml": "include: a.yaml\n", "a.yaml": "- x\n"}, r"a\.yaml:1:1: is a list, expected a mapping"),
        ({"r.yaml": "include: a.yaml\n", "a.yaml": "b: [\n"}, r"a\.yaml:2:1: not YAML"),
    ],
)
def test_refused_includes(write: Write, files: dict[str, str], pattern: str) -> None:
    write(BASE, "../out.yaml")
    for name, text in files.items():
        path = write(text, name)
    path = path.parent.parent / "r.yaml" if path.parent.name == "sub" else path.parent / "r.yaml"
    assert re.search(pattern, problems(path), re.MULTILINE)


def test_include_through_a_link_out_of_the_tree(write: Write, tmp_path: Path) -> None:
    outside = write(BASE, "out/x.yaml")
    path = write("include: x.yaml\n", "in/r.yaml")
    (path.parent / "x.yaml").symlink_to(outside)
    assert "is outside" in problems(path)


def test_many_includes_are_refused(write: Write) -> None:
    for i in range(8):
        write(f"include: [{', '.join(f'l{i + 1}.yaml' for _ in range(4))}]\n", f"l{i}.yaml")
    write("name: r\n", "l8.yaml")
    assert "more than 64 files" in problems(write("include: l0.yaml\n"))


# -- variables --------------------------------------------------------------------------------------


def test_variables_stay_unresolved(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMCTL_TEST_ROOT", "/secret")
    text = BASE.replace("source: bundled", "source: {kind: folder, root: '${ENV:BMCTL_TEST_ROOT}/x'}")
    recipe = load_recipe(write(text))
    assert recipe.data is not None
    assert recipe.data.source.root == "${ENV:BMCTL_TEST_ROOT}/x"
    assert "/secret" not in recipe_yaml(recipe)
    assert resolve_env(recipe.data.source.root) == "/secret/x"


def test_variables_that_are_not_set(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BMCTL_TEST_A", raising=False)
    text = BASE.replace("source: bundled", "source: {kind: folder, root: '${ENV:BMCTL_TEST_A}/${HOME}'}")
    found = problems(write(text))
    assert re.search(r"r\.yaml:3:31: data\.source\.root: the environment variable BMCTL_TEST_A is not set", found)
    assert "is not a variable" in found
    with pytest.raises(RecipeError, match="BMCTL_TEST_A, BMCTL_TEST_B"):
        resolve_env("${ENV:BMCTL_TEST_B}${ENV:BMCTL_TEST_A}")


# -- saving and showing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [[], ["train=", "compress=[]"], ["seed=7", "data.input={size: [8, 9], mean: [.5], std: [1]}"]]
)
def test_saved_recipe_loads_as_an_equal_one(write: Write, overrides: list[str]) -> None:
    recipe = load_recipe(write(), overrides=overrides)
    text = recipe_yaml(recipe)
    assert load_recipe(write(text, "saved.yaml")) == recipe
    assert recipe_yaml(load_recipe(write(text, "saved.yaml"))) == text
    assert list(parse_yaml(text, name="x").data) == list(Recipe.model_fields)


def test_schema_knows_shorthand_and_includes() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    assert {"name", "include", "compress"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    items = schema["properties"]["compress"]["items"]
    assert {"structured", "ptq"} <= set(items["anyOf"][0]["enum"])
    assert "discriminator" in items["anyOf"][1]
    assert recipe_schema() == schema


def test_plan_names_every_stage(write: Write) -> None:
    recipe = load_recipe(
        write(),
        overrides=["compress.0.recover={fit: {epochs: 4}}", "gates.max_drop=0.02", "infer={data: x.png}"],
    )
    lines = dict(describe(recipe))
    assert list(lines) == ["train", "compress", "export", "gates", "infer"]
    assert "bmctl:rescnn on bundled; 2 epochs of batches of 64, adamw lr 0.001" in lines["train"]
    assert "ratio 0.5" in lines["compress"] and "recover: 4 epochs" in lines["compress"]
    assert "ptq" in lines["compress"] and "calibrated on 300 samples of train" in lines["compress"]
    assert "onnxruntime, openvino; batches of 1 to 64" in lines["export"]
    assert "at most 0.02" in lines["gates"]
    assert "x.png" in lines["infer"]


@pytest.mark.parametrize(
    ("samples", "limit", "most"), [(None, None, 300), (500, None, 500), (500, 90, 90), (20, 90, 20)]
)
def test_plan_says_how_many_samples_calibrate(write: Write, samples: int | None, limit: int | None, most: int) -> None:
    overrides = [f"compress=[{{method: ptq, samples: {samples or 'null'}}}]", f"data.calib.limit={limit or 'null'}"]
    assert f"calibrated on {most} samples" in dict(describe(load_recipe(write(), overrides=overrides)))["compress"]


def test_importing_the_recipe_is_light() -> None:
    code = """import sys, bmctl.recipe
bmctl.recipe.load_recipe("fashion-mnist")
print(*{name.split(".")[0] for name in sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "PIL", "torchvision", "timm", "rich"}
    assert not heavy & set(done.stdout.split())


def test_recipes_are_frozen(write: Write) -> None:
    recipe: Any = load_recipe(write())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
