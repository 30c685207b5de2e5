"""Hook points before and after a save, for code of the training."""

from __future__ import annotations

from dcp_ckpt.save.handle import SaveHandle

__all__ = ["SaveHooks"]


class SaveHooks:
    """Subclass it, and give it to the Checkpointer on all ranks. Both methods do nothing here."""

    def before_save(self, step: int) -> None:
        """Called on every rank inside of `save()`, before the state is looked at; it may change the state.

        It holds up training. What it raises on any rank fails the save, on all ranks.
        """

    def after_save(self, handle: SaveHandle) -> None:
        """Called on every rank when the outcome is known: `handle.outcome`, `handle.error`.

        On a background thread; the next save becomes durable no sooner than it returns. What it raises is
        logged. Not called for saves that were skipped.
        """
