"""Every error that a user can mend, one exit code per class.

BmctlError                  1   a bug: anything that is none of the below
├── UsageError              2   the command line
├── RecipeError             3   the recipe
├── DataError               4   the data set, or an input to infer
├── PackageError            5   a package, checkpoint or artifact: missing, corrupt, untrusted, mismatched
├── DependencyError         6   a package, device or version that is not there
├── ResourceError           7   disk, memory, port, lock, permission
├── GateError               8   a quality gate failed: metric, parity, latency, size
├── DivergedError           9   loss or weights are no longer finite
├── WorkerError            10   a worker or peer failed or timed out
├── UnsupportedError       11   operator or graph not supported, already quantized, nothing left to prune
├── PreemptedError         75   a checkpoint was published; run the same command again
├── StuckError             93   no progress in three starts; running the same command again will not help
└── InterruptedRunError   130   Ctrl-C (143 for SIGTERM)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe: where it stands, what it says, what would be right.

    Attributes:
        where: ``file:line:col``, or ``--set a.b=1`` for an override.
        path: Dotted key path, such as ``train.optimizer.lr``.
        message: What was found and what was expected.
        hint: An edit or a command that mends it, or the empty string.
    """

    where: str
    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f"\n    hint: {self.hint}" if self.hint else ""
        path = f" {self.path}:" if self.path else ""
        return f"{self.where}:{path} {self.message}{hint}"


class BmctlError(Exception):
    """Something went wrong and the user is told what, where, and what to do.

    Args:
        message: What happened, where, what was got and what was expected.
        hint: A command or an edit that mends it.

    Attributes:
        has_document: With --json: stdout holds the command's document already, which tells of the failure too.
    """

    exit_code = 1
    has_document = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_dict(self) -> dict[str, object]:
        """The error as fields, for ``--json``."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "message": self.message,
            "hint": self.hint,
        }


class UsageError(BmctlError):
    exit_code = 2


class RecipeError(BmctlError):
    """One or more problems in a recipe, all reported at once."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.message, *(str(problem) for problem in self.problems)])

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"problems": [vars(problem) for problem in self.problems]}


class DataError(BmctlError):
    exit_code = 4


class PackageError(BmctlError):
    exit_code = 5


class FormatError(PackageError):
    """Sound, but of another version's format."""


class DependencyError(BmctlError):
    exit_code = 6


class ResourceError(BmctlError):
    exit_code = 7


class GateError(BmctlError):
    exit_code = 8


class DivergedError(BmctlError):
    exit_code = 9


class WorkerError(BmctlError):
    """A worker failed; carries the exit code of the error it raised, if that was one of ours."""

    exit_code = 10

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 10) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class UnsupportedError(BmctlError):
    exit_code = 11


class PreemptedError(BmctlError):
    exit_code = 75


class StuckError(BmctlError):
    exit_code = 93


class InterruptedRunError(BmctlError):
    """Stopped by the user: 130 after SIGINT, 143 after SIGTERM."""

    exit_code = 130

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def error_from_dict(fields: Mapping[str, Any], *, prefix: str = "") -> BmctlError:
    """The error that another process told of with `to_dict`: of the same class, with the same exit code.

    Args:
        fields: What `to_dict` gave.
        prefix: Stands before the message, such as ``rank 1: ``.
    """
    kind = globals().get(str(fields["error"]))
    kind = kind if isinstance(kind, type) and issubclass(kind, BmctlError) else WorkerError
    error: BmctlError = kind(f"{prefix}{fields['message']}", hint=str(fields["hint"]))
    error.exit_code = int(fields["exit_code"])
    return error


def first_line(error: BaseException) -> str:
    """What an exception of a library says: its first line, without colours and at most 300 characters long."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", str(error)).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
