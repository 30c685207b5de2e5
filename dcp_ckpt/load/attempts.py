"""The loads of one Checkpointer, and in what state the last one left what it loads into.

Called by the Checkpointer, on the main thread of all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel
from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    FormatTooNew,
    LoadError,
    StateMismatch,
)
from dcp_ckpt.lifecycle.catalogue import Catalogue
from dcp_ckpt.load.by_path import load_path
from dcp_ckpt.load.choose import Which, path_of
from dcp_ckpt.load.loader import Loader
from dcp_ckpt.load.report import LoadReport
from dcp_ckpt.load.restore import Components
from dcp_ckpt.load.selection import Selection
from dcp_ckpt.storage.base import Storage

__all__ = ["LoadAttempts"]


class LoadAttempts:
    """One rank's part; made on all ranks.

    `failure` is why the state may hold parts of several checkpoints; None after a load that succeeded or
    changed nothing. `seconds`: how long the last one took that succeeded.
    """

    def __init__(self, storage: Storage, channel: Channel, config: CheckpointConfig) -> None:
        self._storage = storage
        self._channel = channel
        self._config = config
        self._begun = 0
        self.failure: CheckpointError | None = None
        self.seconds = 0.0

    @property
    def tag(self) -> str:
        """Of the newest attempt; unique in the life of the channel."""
        return f"load/{self._begun}"

    def load(
        self,
        components: Components,
        which: Which,
        selection: Selection,
        catalogue: Callable[[], Catalogue],
        marks_changed: Callable[[], None],
    ) -> LoadReport | None:
        """One load; see `Checkpointer.load`. Collective; blocks.

        Args:
            catalogue: of the run; called on rank 0.
            marks_changed: called where a damaged checkpoint may have been marked.
        """
        self._begun += 1
        started = time.monotonic()
        path = path_of(which)
        try:
            if path is not None:
                report: LoadReport | None = load_path(
                    path, components, self._channel, self._config, self.tag, selection
                )
            else:
                loader = Loader(
                    self._storage, self._storage.url, self._channel, self._config, self.tag, selection
                )
                report = loader.load(components, which, catalogue)
        except (CheckpointNotFound, StateMismatch, FormatTooNew, ConfigError):
            raise
        except CheckpointError as error:
            marks_changed()
            if error.phase != "choose":
                # The state may hold parts of several checkpoints now: saving it would make that last.
                self.failure = error
            raise
        except BaseException as error:
            # An interrupt, most likely: what was read so far is in the state.
            self.failure = LoadError(f"it was broken off by {error!r}", phase="read")
            raise
        self.failure = None
        self.seconds = time.monotonic() - started
        if report is not None and report.rejected:
            marks_changed()
        return report
