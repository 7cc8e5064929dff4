"""Reinforcement learning the whole way, with the command line: trained, stopped and gone on with, shipped, played."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.runs import end, make_context, run_to_end, same, start, weights

from bmctl.cli import main
from bmctl.engine.artifacts.opening import open_model
from bmctl.engine.checkpoints.checkpoint import open_checkpoint
from bmctl.engine.evaluation import feeds
from bmctl.job import Logs
from bmctl.package import open_package
from bmctl.recipe import find_recipe, load_recipe, recipe_yaml
from bmctl.restore import load_model

SMALL = (
    "name=small",
    "model.args.hidden=[32, 32]",
    "data.source.episodes={train: 4, val: 8, test: 20}",
    "task.epoch_steps=150",
    "task.warmup=200",
    "task.memory=2000",
    "task.exploration.steps=100",
    "train.epochs=2",
    "train.batch_size=32",
    "launch.threads=1",
    "launch.device=cpu",
    "gates={}",
)


def make_run(folder: Path, *overrides: str, name: str = "run") -> Path:
    """A run's directory with the built-in recipe, made small, for a job."""
    run = folder / name
    Logs(run).folder.mkdir(parents=True)
    recipe = load_recipe(find_recipe("cartpole"), overrides=(*SMALL, *overrides))
    Logs(run).recipe.write_text(recipe_yaml(recipe))
    return run


def owned(run: Path) -> dict[str, torch.Tensor]:
    """What the feed left in the newest checkpoint: memory, target network, episodes and their luck."""
    found = open_checkpoint(run / "checkpoints" / "train" / "latest")
    return {name: found.read("task", name, None) for name in found.names("task")}


def bmctl(*command: str) -> None:
    assert main(list(command)) == 0


STOPPED = ("train.checkpoint_every_steps=40", "task.prioritised={steps: 200}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    run = make_run(tmp_path_factory.mktemp("whole"), *STOPPED)
    ended = run_to_end(run)
    assert ended.code == 0, ended.stderr
    return run


@pytest.mark.parametrize(("fault", "code"), [("SIGTERM:0:97", 75), ("kill:0:97", -9)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, whole: Path, fault: str, code: int) -> None:
    run = make_run(tmp_path, *STOPPED)
    assert run_to_end(run, fault=fault).code == code
    ended = run_to_end(run, "--resume")
    assert ended.code == 0, ended.stderr
    assert "going on from step" in ended.seen.notes
    assert same(weights(run), weights(whole))
    assert same(owned(run), owned(whole))
    names = {name.split("/")[1] for name in owned(run)}
    assert names == {"memory", "target", "episodes", "generator", "num_steps"}


@pytest.mark.slow
def test_killed_from_outside_at_any_moment(tmp_path: Path, whole: Path) -> None:
    run = make_run(tmp_path, *STOPPED)
    process = start(run)
    assert process.stdout is not None
    for line in process.stdout:
        if '"evaluation"' in line:
            process.kill()
            break
    assert end(process).code == -9
    assert run_to_end(run, "--resume").code == 0
    assert same(weights(run), weights(whole))


@pytest.mark.slow
def test_two_processes_play_episodes_of_their_own(tmp_path: Path) -> None:
    found = []
    for name, fault in (("whole", ""), ("killed", "kill:1:97")):
        run = make_run(tmp_path, *STOPPED, "launch.nproc=2", "launch.max_restarts=0", name=name)
        if fault:
            assert run_to_end(run, fault=fault).code == 10
        ended = run_to_end(run, *(["--resume"] if fault else []))
        assert ended.code == 0, ended.stderr
        found.append(owned(run))
    first, second = (
        {name.removeprefix(rank): tensor for name, tensor in found[0].items() if name.startswith(rank)}
        for rank in ("rank-0/", "rank-1/")
    )
    assert first.keys() == second.keys()
    assert not torch.equal(first["memory/observations"], second["memory/observations"])
    targets = [name for name in first if name.startswith("target/")]
    assert all(torch.equal(first[name], second[name]) for name in targets)
    assert same(*found)


@pytest.mark.slow
def test_a_model_in_parts_does_not_play(tmp_path: Path) -> None:
    ended = run_to_end(make_run(tmp_path, "launch.nproc=2", "launch.strategy=fsdp"))
    assert ended.code == 11
    assert ended.error["hint"] == "--set launch.strategy=ddp"


# -- what ships -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, pruned, recovered, quantized and exported, all of it briefly."""
    folder = tmp_path_factory.mktemp("shipped")
    run = folder / "run"
    settings = (
        *SMALL,
        "export={backends: [onnxruntime, openvino], measure: {batch_size: 8, rounds: 3}}",
        "compress=[{method: structured, ratio: 0.5, recover: {fit: {epochs: 1, batch_size: 32, precision: fp32}}},"
        " {method: ptq}]",
        "infer.data=CartPole-v1:3:5",
    )
    bmctl("run", "-r", "cartpole", "-o", str(run), "-q", *(f"--set={one}" for one in settings))
    return run


def evaluated(capsys: pytest.CaptureFixture[str], path: Path) -> dict:
    capsys.readouterr()
    bmctl("evaluate", str(path), "--split", "test", "--json")
    return json.loads(capsys.readouterr().out)


def test_every_artifact_plays_the_same_episodes(shipped: Path) -> None:
    report = json.loads((shipped / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    for backend in ("onnxruntime", "openvino"):
        row = rows[f"deploy/{backend}"]
        assert (row["status"], row["precision"]) == ("ran", "int8")
        test = row["test"]
        assert (test["name"], test["better"], test["num_samples"]) == ("return", "higher", 20)
        assert test["low"] <= test["value"] <= test["high"] and 15 < test["trivial"] < 35
        assert row["drop"] is not None and row["latency"]["p50_ms"] > 0
    whole, pruned = (rows[f"packages/{name}"]["num_params"] for name in ("00-train", "01-structured"))
    assert pruned < whole / 2
    manifest = json.loads((shipped / "packages/02-ptq/manifest.json").read_text())
    assert manifest["input"] == {"kind": "observation", "env": "CartPole-v1", "max_steps": 500, "size": 4}
    assert manifest["facts"] == {"kind": "dqn", "env": "CartPole-v1", "max_steps": 500, "num_actions": 2}
    assert manifest["calibration"]["used"] > 4 * 8  # decisions along four episodes, not their beginnings alone


def test_artifacts_are_compared_along_episodes_and_timed_for_a_decision(shipped: Path) -> None:
    context = make_context(shipped, load_recipe(shipped / "recipe.yaml"))
    package = open_package(shipped / "packages" / "00-train")
    runners = open_model(load_model(package), package.manifest)
    compared = feeds.validation_calls(context, package, runners, num_samples=8)
    seen = [call.feed["observation"] for call in compared]
    assert len(seen) >= 8 and len(seen[0]) == 8 and len({rows.tobytes() for rows in seen}) == len(seen)
    (timed,) = feeds.timing_calls(context, package, runners, num_samples=16)
    assert timed.feed["observation"].shape == (16, 4)
    assert [len(call.feed["observation"]) for call in feeds.example_calls(context, package, runners)] == [2]


def test_infer_plays_as_the_metric_does(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (shipped / "predictions.jsonl").read_text().splitlines()]
    assert [(one["input"], one["seed"]) for one in lines] == [(f"CartPole-v1#{i}", 5 + i) for i in range(3)]
    assert all(set(one) == {"input", "seed", "return", "length"} for one in lines)
    where = ("-m", str(shipped / "deploy" / "onnxruntime"), "-q")
    test_seeds = 3 * 2**29
    bmctl("infer", f"CartPole-v1:20:{test_seeds}", *where)
    returns = [json.loads(line)["return"] for line in capsys.readouterr().out.splitlines()]
    report = json.loads((shipped / "report.json").read_text())
    (row,) = (row for row in report["rows"] if row["name"] == "deploy/onnxruntime")
    assert np.mean(returns) == pytest.approx(row["test"]["value"], rel=0.05)  # one wide call may round otherwise


def test_infer_of_observations_and_tables(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "seen.npz", observation=np.zeros((2, 4), np.float32))
    where = ("-m", str(shipped / "deploy" / "onnxruntime"), "-q")
    bmctl("infer", str(tmp_path / "seen.npz"), *where)
    assert all(json.loads(line)["action"] in (0, 1) for line in capsys.readouterr().out.splitlines())
    bmctl("infer", "CartPole-v1:2", *where, "--format", "csv")
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "input,seed,return,length,action,value"
    assert [row.split(",")[:2] for row in rows] == [["CartPole-v1#0", "0"], ["CartPole-v1#1", "1"]]


def test_a_film(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pygame")
    film = tmp_path / "play.gif"
    where = ("-m", str(shipped / "deploy" / "onnxruntime"), "-q")
    bmctl("infer", "CartPole-v1:2", *where, "--format", "gif", "--to", str(film))
    first, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    with Image.open(film) as shown:
        assert shown.format == "GIF" and shown.size == (600, 400)
        assert 1 < shown.n_frames <= first["length"] // 2 + 1


@pytest.mark.parametrize(
    ("data", "flags", "code", "said"),
    [
        ("Acrobot-v1", (), 4, "the policy plays CartPole-v1"),
        ("CartPole-v1:0", (), 4, "expected 1 to"),
        ("CartPole-v1:3:x", (), 4, "whole numbers"),
        ("CartPole-v1:1:2147483648", (), 4, "seeds up to"),
        ("os:CartPole-v1", (), 4, "the policy plays CartPole-v1"),
        ("CartPole-v1", ("--format", "gif"), 2, "a film needs a file"),
    ],
)
def test_what_infer_refuses(
    shipped: Path, capsys: pytest.CaptureFixture[str], data: str, flags: Sequence[str], code: int, said: str
) -> None:
    assert main(["infer", data, "-m", str(shipped / "deploy" / "onnxruntime"), *flags]) == code
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole_is_solved_and_stays_solved(tmp_path: Path, seed: int) -> None:
    """The built-in recipe as it is, whose gates ask for a mean return of 475 on every runtime here."""
    run = tmp_path / "run"
    bmctl("run", "-r", "cartpole", "-o", str(run), "-q", "--set", f"seed={seed}", "--set", "launch.threads=1")
    rows = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    for name in ("packages/00-train", "deploy/onnxruntime", "deploy/openvino"):
        assert rows[name]["test"]["value"] >= 475 and rows[name]["test"]["num_samples"] == 100
