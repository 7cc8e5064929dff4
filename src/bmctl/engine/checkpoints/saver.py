"""Saving while training goes on: all processes together, in the order that lets none of them get ahead.

copy       every rank copies its part of the state into host memory, at a step border
write      every rank writes and hashes its copy in a thread; the loop asks all ranks at every border how it went
publish    once all have written, rank 0's thread writes the manifest and renames; only then comes retention
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from bmctl import store
from bmctl.disk import reach
from bmctl.engine.checkpoints import checkpoint, pieces, publication
from bmctl.engine.checkpoints.pieces import Entry
from bmctl.engine.checkpoints.state import KINDS, Snapshot, State
from bmctl.engine.checkpoints.tensorfile import TensorFile
from bmctl.engine.parallel import Group, Vote, gather, settle
from bmctl.errors import BmctlError, ResourceError, error_from_dict

IDLE, BUSY, FAILED = 0, 1, 2
_POLL_S = 0.2


class _AbandonedError(Exception):
    """The run ends by another error: what was being written is of no use."""


def _silent(step: int, doing: str) -> None:
    """Nobody listens."""


class Saver:
    """Writes a loop's checkpoints. `begin`, `advance` and `finish` are called by all ranks, in the same order.

    Args:
        folder: RUN/checkpoints/STAGE, which all ranks share.
        keep: Newest checkpoints to keep, beside the best.
        asynchronous: Whether training goes on while a checkpoint is written.
        note: Takes a sentence for the user; called by the thread that calls this object.
        beat: Called with the step and what is being done while `finish` waits.

    Attributes:
        saved_step: Of the newest checkpoint that is published; a loop that goes on from one sets it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: Group,
        keep: int,
        asynchronous: bool,
        note: Callable[[str], None],
        beat: Callable[[int, str], None] = _silent,
    ) -> None:
        self.saved_step: int | None = None
        self._folder, self._group, self._keep = folder, group, keep
        self._asynchronous, self._note, self._beat = asynchronous, note, beat
        pin = group.device.type == "cuda"
        self._files = {kind: TensorFile(pin=pin) for kind in KINDS}
        self._index: dict[str, dict[str, Entry]] = {}
        self._known: dict[Path, publication.Stamps] = {}
        self._notes: list[str] = []
        self._said_late = False
        self._phase: Literal["idle", "writing", "publishing"] = "idle"
        self._turn = self._asked = 0
        self._step = -1
        self._state = State()
        self._fields: Mapping[str, Any] = {}
        self._temporary = folder
        self._draft: store.Unpublished | None = None
        self._thread: threading.Thread | None = None
        self._error: BmctlError | None = None
        self._abandoned = threading.Event()
        self._copied: torch.cuda.Event | None = None

    # -- what the loop calls --------------------------------------------------------------------------

    def begin(self, snapshot: Snapshot, *, step: int, fields: Mapping[str, Any]) -> None:
        """Copy the state, and publish it as the checkpoint of `step`: in the background, or before this returns.

        Nothing happens for a step that is published or under way. Another save under way is finished first.

        Args:
            snapshot: Of this process; plain tensors count on rank 0 alone, but for those of `task`. `state.random` and
                `state.progress` hold this rank's alone.
            fields: Of the manifest: stage, best_step, num_steps, identity, threads, device, kernels, strategy, mesh,
                about.

        Raises:
            BmctlError: The same on every rank: of this save, where it is not asynchronous, or of the one before.
        """
        if step == self.saved_step or (self._phase != "idle" and step == self._step):
            return
        if self._phase != "idle":
            self._say_late()
            self.finish()
        self._open(step)
        self._state, self._fields = snapshot.state, fields
        try:
            self._copy(snapshot)
            reach("store:copied")
        except (MemoryError, RuntimeError, OSError) as error:
            self._error = ResourceError(
                f"the state of step {step} cannot be copied for saving: {str(error).splitlines()[0]}",
                hint="free some memory",
            )
        else:
            self._start(self._write)
        if not self._asynchronous:
            self.finish()

    def status(self) -> int:
        """How the save goes here, to be voted on: IDLE, BUSY or FAILED; all ranks get the largest."""
        self._asked = self._turn
        if self._thread is not None and self._thread.is_alive():
            return BUSY
        return FAILED if self._error is not None else IDLE

    def advance(self, agreed_status: int) -> None:
        """Go on to the next part of the save, where all ranks are done with this one.

        Args:
            agreed_status: The largest `status` of all ranks.

        Raises:
            BmctlError: The same on every rank: the checkpoint could not be written, and is not there.
            DivergedError: The state was not finite.
        """
        if self._phase == "idle" or agreed_status == BUSY or self._asked != self._turn:
            return
        self._turn += 1
        if agreed_status == FAILED:
            self._fail()
        elif self._phase == "writing":
            self._phase = "publishing"
            if self._group.leads:
                self._start(self._publish)
        else:
            self._end()
            self.saved_step = self._step

    def finish(self) -> None:
        """Wait until what is under way is published.

        Raises:
            BmctlError: As `advance` does.
        """
        while self._phase != "idle":
            if self._thread is not None:
                # Not longer, so that no rank waits for the others' votes until it is taken for hung.
                self._thread.join(_POLL_S)
            self._beat(self._step, "saving")
            self.advance(Vote(self._group, [self.status()]).result()[0])

    def abandon(self) -> None:
        """Give up what is under way, without asking the other ranks: the run ends by another error."""
        if self._phase != "idle":
            self._stop()
            self._end()

    # -- details ----------------------------------------------------------------------------------------

    def _say_late(self) -> None:
        is_late = self._thread is not None and self._thread.is_alive()
        if is_late and not self._said_late:
            self._said_late = True
            self._note(
                f"saving step {self._step} takes longer than the steps to the next checkpoint: training waits for it; "
                "raise train.checkpoint_every_steps"
            )

    def _open(self, step: int) -> None:
        """Rank 0 makes the hidden directory, and all learn where it is."""
        told: dict[str, Any] = {}
        if self._group.leads:
            try:
                self._draft = store.begin_publishing(checkpoint.path_of(self._folder, step))
                told = {"name": self._draft.path.name}
            except BmctlError as error:
                told = {"error": error.to_dict()}
        told = gather(self._group, told)[0]
        if "error" in told:
            raise error_from_dict(told["error"])
        self._step, self._phase = step, "writing"
        self._turn += 1
        self._temporary = self._folder / told["name"]
        self._abandoned.clear()

    def _copy(self, snapshot: Snapshot) -> None:
        rank = self._group.rank
        for kind in KINDS:
            tensors: checkpoint.Tensors = getattr(snapshot, kind)
            file = publication.file_name(kind, rank)
            self._index[kind] = pieces.entries(tensors, file=file, rank=rank, own=kind == "task")
            mine = {name: entry for name, entry in self._index[kind].items() if entry.pieces}
            self._files[kind].fill({name: pieces.held(tensors[name]) for name in mine})
        if self._group.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _start(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._guarded, args=(work,), name="bmctl-saver", daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _AbandonedError:
            pass
        except BmctlError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001  (told by the thread that trains)
            self._error = BmctlError(f"the checkpoint of step {self._step} could not be written: {error!r}")
            self._error.__cause__ = error

    def _write(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        if not self._temporary.is_dir():
            raise ResourceError(
                f"rank {self._group.rank} does not see {self._temporary}, which rank 0 made",
                hint="let the run be on a file system that all processes share: -o RUN",
            )
        publication.write_part(
            self._temporary,
            self._files,
            index=self._index,
            state=self._state,
            rank=self._group.rank,
            going_on=self._go_on,
        )

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise _AbandonedError

    def _publish(self) -> None:
        assert self._draft is not None
        draft = self._draft
        manifest = publication.publish(
            draft,
            state=self._state,
            world=self._group.world,
            fields=self._fields,
            parent=publication.parent_of(self._folder),
        )
        self._draft = None  # it is there, and not to be removed after an error
        store.replace_link(self._folder / "latest", draft.target.name)
        publication.remember(draft.target, self._known)
        publication.retain(
            self._folder,
            keep=self._keep,
            best_step=manifest.best_step,
            known=self._known,
            note=self._notes.append,
        )

    def _fail(self) -> None:
        """End the save with the same error on every rank."""
        self._stop()
        try:
            settle(self._group, self._error)
        finally:
            self._end()
        raise AssertionError("all ranks agreed that one has failed, and none says how")

    def _stop(self) -> None:
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()

    def _end(self) -> None:
        if self._draft is not None:
            store.abandon(self._draft)
        self._draft = self._thread = self._error = self._copied = None
        self._phase = "idle"
        self._turn += 1
        for text in self._notes:
            self._note(text)
        self._notes.clear()
