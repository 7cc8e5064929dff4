"""Where the machines of one job meet: a store at `launch.rendezvous`, served by the machine of that name.

Nothing here ever takes localhost for a host that cannot be found.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from bmctl.errors import RecipeError, ResourceError, WorkerError
from bmctl.recipe import LaunchConfig

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

RESOLVE_S = 20.0
"""A name may take so long to become known, as that of a pod that starts."""
CONNECT_S = 5.0
ANSWER_S = 15.0
LAST_CALL_S = 30.0
KEEP_ALIVE_S, KEEP_ALIVE_ATTEMPTS = 2, 5


@dataclass(frozen=True)
class Meeting:
    """Where the machines of one job agree on who takes part."""

    handler: DynamicRendezvousHandler
    store: TCPStore

    def end(self) -> None:
        """Tell the other machines that this job is to stop, not only to go on without this one."""
        self.store.set("bmctl/ending", "1")

    def is_ending(self) -> bool:
        return bool(self.store.check(["bmctl/ending"]))


def meet(launch: LaunchConfig, *, recipe_hash: str, told: Callable[[], bool]) -> Meeting:
    """Go to where the machines of this job meet.

    Args:
        recipe_hash: The same on all machines.
        told: Whether this process was told to stop meanwhile.

    Raises:
        WorkerError: The host cannot be found, or nothing answers there within `launch.timeout_s`.
        ResourceError: The port is in use by another program.
        RecipeError: The other machines came with another recipe.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    many = launch.nodes.max > 1
    host, port = split_endpoint(launch.rendezvous or "") if many else ("127.0.0.1", 0)
    address = _resolve(host, timeout_s=min(RESOLVE_S, launch.timeout_s), told=told)
    mine = _is_mine(address)
    store = _open_store(address, port, is_host=mine, timeout_s=launch.timeout_s, name=f"{host}:{port}", told=told)
    found = store.compare_set("bmctl/recipe", "", recipe_hash).decode()
    if found != recipe_hash:
        raise RecipeError(
            f"the machines that met at {host}:{port} came with another recipe",
            hint="start bmctl distribute with the same recipe and the same overrides on all of them",
        )
    run_id = "bmctl" if many else uuid.uuid4().hex
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{host}:{port}",
        run_id=run_id,
        min_nodes=launch.nodes.min,
        max_nodes=launch.nodes.max,
        local_addr=_local_address(address, port),
        join_timeout=_whole(launch.timeout_s),
        last_call_timeout=_whole(min(LAST_CALL_S, launch.timeout_s / 20)),
        close_timeout=10,
        keep_alive_interval=KEEP_ALIVE_S,
        keep_alive_max_attempt=KEEP_ALIVE_ATTEMPTS,
    )
    return Meeting(create_handler(store, C10dRendezvousBackend(store, run_id), parameters), store)


def split_endpoint(text: str) -> tuple[str, int]:
    """``HOST:PORT``, the host of an IPv6 address in brackets."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _whole(seconds: float) -> int:
    return max(1, round(seconds))


def _resolve(host: str, *, timeout_s: float, told: Callable[[], bool]) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0])
        except OSError as error:
            if told() or time.monotonic() >= deadline:
                raise WorkerError(
                    f"launch.rendezvous: the host {host} cannot be found: {error.strerror or error}",
                    hint="name a machine that all others can resolve, or its address",
                ) from error
        time.sleep(min(1.0, timeout_s))


def _is_mine(address: str) -> bool:
    """Whether an address is one of this machine's: only then can a socket be bound to it."""
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _local_address(address: str, port: int) -> str:
    """By which the others reach this machine: the address that it uses towards where they meet."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((address, port or 9))  # a datagram socket sends nothing
        return str(probe.getsockname()[0])
    return address


def _open_store(
    address: str, port: int, *, is_host: bool, timeout_s: float, name: str, told: Callable[[], bool]
) -> TCPStore:
    """The store that one machine serves and all use."""
    from torch._C._distributed_c10d import TCPStore

    deadline = time.monotonic() + timeout_s
    while True:
        if is_host:
            with suppress(RuntimeError):
                return TCPStore(
                    address, port, is_master=True, multi_tenant=True, wait_for_workers=False, timeout=_io(timeout_s)
                )
        if _answers(address, port):
            store = _connected(address, port)
            if store is None:
                raise ResourceError(
                    f"launch.rendezvous: port {port} of {name.rpartition(':')[0]} is in use by another program",
                    hint="name a free port, the same on all machines",
                )
            store.set_timeout(_io(timeout_s))
            return store
        if told() or time.monotonic() >= deadline:
            raise WorkerError(
                f"launch.rendezvous: nothing answers at {name} within {timeout_s:g} s (launch.timeout_s)",
                hint="start bmctl distribute on the machine of that name as well, and let its port through",
            )
        time.sleep(0.5)


def _connected(address: str, port: int) -> TCPStore | None:
    """The store that is served there; None if it is no store: torch would wait for an answer for minutes."""
    from torch._C._distributed_c10d import TCPStore

    found: list[TCPStore] = []

    def connect() -> None:
        timeout = timedelta(seconds=ANSWER_S)
        with suppress(RuntimeError, ValueError):
            found.append(TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout))

    thread = threading.Thread(target=connect, name="bmctl-connect", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return found[0] if found else None


def _io(timeout_s: float) -> timedelta:
    return timedelta(seconds=max(CONNECT_S, min(60.0, timeout_s)))


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


def own_suffix() -> str:
    """Ends the names of this machine's files among those of others: its name, and this process."""
    return f"-{socket.gethostname().split('.')[0]}-{os.getpid()}"
