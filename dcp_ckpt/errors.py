"""The errors of dcp_ckpt: one tree, each class says what the caller may do.

    CheckpointError                 anything this package raises
    |-- ConfigError                 a wrong argument or setting: fix the call
    |-- MissingDependencyError      an optional package is not installed: install the extra
    |-- StateError                  the state cannot be saved as it is: see the named key
    |-- StorageError                storage said no
    |   |-- StorageNotFound         the object is not there
    |   |-- StorageExists           exclusive create: the name is taken
    |   |-- StorageTransient        may succeed when repeated
    |   |-- StorageFull             no space or quota
    |   |-- StorageUnsuitable       this storage cannot keep the promises asked of it
    |-- SaveFailed                  one attempt failed on some rank; earlier checkpoints are untouched
    |   |-- StepAlreadySaved        that step is committed, or not after the last one
    |   |-- Fenced                  a newer start owns the run: stop
    |-- CommitUnknown               the commit may or may not have happened: do not delete, ask again
    |-- CoordinationError           ranks disagree, or one did not answer in time
    |-- LoadError                   a checkpoint could not be loaded
        |-- CheckpointNotFound      there is no such checkpoint
        |-- CorruptCheckpoint       bytes differ from their digest, or a file is missing
        |-- FormatTooNew            written by a newer version: upgrade
        |-- StateMismatch           the checkpoint does not fit this state; nothing was changed

Errors cross ranks: every class pickles, keeps plain fields only and shows them in its message.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "CommitUnknown",
    "ConfigError",
    "CoordinationError",
    "CorruptCheckpoint",
    "Fenced",
    "FormatTooNew",
    "LoadError",
    "MissingDependencyError",
    "SaveFailed",
    "StateError",
    "StateMismatch",
    "StepAlreadySaved",
    "StorageError",
    "StorageExists",
    "StorageFull",
    "StorageNotFound",
    "StorageTransient",
    "StorageUnsuitable",
]


class CheckpointError(Exception):
    """Root of all errors raised by dcp_ckpt.

    Args:
        message: what went wrong and what to do about it.
        rank: the rank on which it happened, if one rank is to blame.
        step: the training step of the checkpoint.
        phase: where in a save or load: `stage`, `write`, `commit`, `choose`, `read`, ...
        path: the file, object or directory.
        errno: the operating system's error number, where there was one.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        step: int | None = None,
        phase: str | None = None,
        path: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank
        self.step = step
        self.phase = phase
        self.path = path
        self.errno = errno

    def __str__(self) -> str:
        fields = (
            ("rank", self.rank),
            ("step", self.step),
            ("phase", self.phase),
            ("path", self.path),
            ("errno", self.errno),
        )
        where = ", ".join(f"{name} {value}" for name, value in fields if value is not None)
        return f"{self.message} [{where}]" if where else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # `path` by name: in a subclass of ImportError it is a slot of that class and not in __dict__.
        return _rebuild, (type(self), self.message, {**self.__dict__, "path": self.path})


def _rebuild(kind: type[CheckpointError], message: str, fields: dict[str, object]) -> CheckpointError:
    error = kind(message)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


class ConfigError(CheckpointError, ValueError):
    """A wrong argument or setting; the message says which and what is allowed."""


class MissingDependencyError(CheckpointError, ImportError):
    """An optional package is needed; the message names the extra to install."""


class StateError(CheckpointError):
    """The state cannot be saved as it is; the message names the key and the reason."""


class StorageError(CheckpointError):
    """The storage refused an operation for good; retrying will not help."""


class StorageNotFound(StorageError):
    """The object does not exist."""


class StorageExists(StorageError):
    """An exclusive create found the name taken. Read it: equal bytes mean it was us."""


class StorageTransient(StorageError):
    """The storage may answer when asked again. For a publish the outcome is unknown."""


class StorageFull(StorageError):
    """No space or quota left; free some and save again."""


class StorageUnsuitable(StorageError):
    """This storage cannot keep a promise (say, exclusive create), so it is refused."""


class SaveFailed(CheckpointError):
    """One attempt to save failed. Training may go on; earlier checkpoints are untouched."""


class StepAlreadySaved(SaveFailed):
    """The step is committed already, or does not lie after the last one."""


class Fenced(SaveFailed):
    """A newer start owns the run. This process must stop saving and should exit."""


class CommitUnknown(CheckpointError):
    """The commit may have happened. Nothing of the attempt was deleted; look again."""


class CoordinationError(CheckpointError):
    """Ranks disagree about what to do, or one did not answer before the deadline."""


class LoadError(CheckpointError):
    """A checkpoint could not be loaded."""


class CheckpointNotFound(LoadError):
    """There is no such run, step or checkpoint."""


class CorruptCheckpoint(LoadError):
    """Stored bytes differ from their digest, or a file is missing or has another size."""


class FormatTooNew(LoadError):
    """Written by a newer version of dcp_ckpt; upgrade to read it. Nothing is damaged."""


class StateMismatch(LoadError):
    """The checkpoint does not fit the state it is loaded into. Nothing was changed."""
