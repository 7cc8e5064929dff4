"""kill -9, then the same command with --resume: the same weights, bit for bit, as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.runs import end, make_run, run_to_end, same, start, steps, weights

SMALL = ("train.checkpoint_every_steps=4", "data.input.augment.shift=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    run = make_run(tmp_path_factory.mktemp("whole"), *SMALL)
    ended = run_to_end(run)
    assert ended.code == 0, ended.stderr
    assert ended.stderr == ""
    return run


# At a step in the middle of an epoch, and at points of the save protocol.
@pytest.mark.parametrize(
    ("fault", "env"),
    [
        pytest.param("kill:0:17", {}, id="mid-epoch"),
        pytest.param("", {"BMCTL_FAULT": "store:written"}, id="mid-save"),
        pytest.param("", {"BMCTL_FAULT": "store:link-made"}, id="before-latest", marks=pytest.mark.slow),
        pytest.param("kill:0:2", {}, id="before-any-checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, whole: Path, fault: str, env: dict[str, str]) -> None:
    run = make_run(tmp_path, *SMALL)
    assert run_to_end(run, fault=fault, **env).code == -9
    assert not (run / "packages").exists()
    ended = run_to_end(run, "--resume")
    assert ended.code == 0, ended.stderr
    assert same(weights(run), weights(whole))
    assert not [path for path in (run / "checkpoints").rglob(".*.tmp-*") if not path.is_symlink()]
    assert steps(run)[0] == "latest"


@pytest.mark.slow
def test_killed_from_outside_at_any_moment(tmp_path: Path, whole: Path) -> None:
    run = make_run(tmp_path, *SMALL)
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
def test_a_killed_bf16_run_with_batch_statistics_goes_on_bit_for_bit(tmp_path: Path) -> None:
    overrides = ("model.name=bmctl:rescnn", "train.precision=auto", "train.checkpoint_every_steps=3", "train.epochs=2")
    first, second = make_run(tmp_path, *overrides, name="first"), make_run(tmp_path, *overrides, name="second")
    assert run_to_end(first).code == 0
    assert run_to_end(second, fault="kill:0:8").code == -9
    ended = run_to_end(second, "--resume")
    assert ended.code == 0, ended.stderr
    assert same(weights(first), weights(second))
