"""Where machines meet: a host that cannot be found is never taken for this one; a port in use is said to be."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from bmctl.engine.worker import check_worlds
from bmctl.errors import RecipeError, ResourceError, WorkerError
from bmctl.job import torchrun_nodes
from bmctl.processes.rendezvous import meet, split_endpoint
from bmctl.recipe import LaunchConfig, load_recipe
from bmctl.recipe.sections import Nodes


def launch(rendezvous: str, timeout_s: float = 1.0) -> LaunchConfig:
    return LaunchConfig(nodes=Nodes(min=1, max=2), rendezvous=rendezvous, timeout_s=timeout_s)


def no() -> bool:
    return False


@pytest.mark.parametrize(
    ("text", "expected"),
    [("head:29500", ("head", 29500)), ("[::1]:1", ("::1", 1)), ("10.0.0.1:80", ("10.0.0.1", 80))],
)
def test_an_endpoint_is_a_host_and_a_port(text: str, expected: tuple[str, int]) -> None:
    assert split_endpoint(text) == expected


def test_a_host_that_cannot_be_found() -> None:
    with pytest.raises(WorkerError, match=r"the host no-such-host\.invalid cannot be found") as caught:
        meet(launch("no-such-host.invalid:29555"), recipe_hash="a", told=no)
    assert caught.value.exit_code == 10


def test_a_host_where_nothing_answers() -> None:
    """An address kept for documentation, which no machine has."""
    with pytest.raises(WorkerError, match=r"nothing answers at 192\.0\.2\.1:29555 within 0\.5 s"):
        meet(launch("192.0.2.1:29555", timeout_s=0.5), recipe_hash="a", told=no)


def test_who_is_told_to_stop_does_not_wait() -> None:
    with pytest.raises(WorkerError, match="nothing answers"):
        meet(launch("192.0.2.1:29555", timeout_s=10_000), recipe_hash="a", told=lambda: True)


def test_a_port_that_another_program_uses() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(ResourceError, match="is in use by another program") as caught:
            meet(launch(f"127.0.0.1:{other.getsockname()[1]}", timeout_s=3), recipe_hash="a", told=no)
    assert caught.value.exit_code == 7


def test_machines_meet_with_the_same_recipe_only() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first = meet(launch(f"127.0.0.1:{port}"), recipe_hash="a", told=no)
    second = meet(launch(f"127.0.0.1:{port}"), recipe_hash="a", told=no)
    assert not second.is_ending()
    first.end()
    assert any(second.is_ending() or time.sleep(0.1) for _ in range(100))  # told by way of the store
    with pytest.raises(RecipeError, match="came with another recipe"):
        meet(launch(f"127.0.0.1:{port}"), recipe_hash="b", told=no)


# -- somebody else's torchrun -------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("1:4", (1, 4)), ("3", (3, 3)), ("", None), ("many", None)])
def test_the_range_of_machines_is_read(monkeypatch, text: str, expected: tuple[int, int] | None) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("PET_NNODES", text)
    assert torchrun_nodes() == expected


def test_every_number_of_machines_must_share_a_batch(monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text('name: r\nmodel: {name: "bmctl:mlp"}\ndata: {source: {kind: bundled}}\ntrain: {batch_size: 24}\n')
    recipe = load_recipe(path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for nodes, fits in {"1:4": True, "1:5": False, "5": False, "6": True}.items():
        monkeypatch.setenv("PET_NNODES", nodes)
        if fits:
            check_worlds(recipe)
        else:
            with pytest.raises(RecipeError, match="which 10 processes cannot share evenly"):
                check_worlds(recipe)
