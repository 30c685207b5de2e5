"""What must hold at the end of every test here: one lineage, whole, and nothing else."""

from __future__ import annotations

from tests.crash.run_files import committed_manifests, debris, require_all_verify
from tests.crash.starts import LAST_STEP, Start, expected
from tests.epochs.places import Place

__all__ = ["OWNER_LAST_STEP", "SALTED", "require_fenced", "require_one_lineage", "require_resumed"]

OWNER_LAST_STEP = LAST_STEP + 2
SALTED = ("--salt", "1", "--steps", str(OWNER_LAST_STEP))
"""Makes the steps of one start differ from those of another, and trains further."""


def require_resumed(start: Start, step: int) -> None:
    """It went on from what the start before had saved of this step."""
    (resume,) = start.events("resume")
    assert (resume["step"], resume["digest"]) == (step, expected(1)[0][step]), start.output()


def require_fenced(start: Start, *, from_step: int) -> None:
    """It trained on to its end, and was told at each of its saves that it must not."""
    saves = {event["step"]: event.get("kind") for event in start.events("save")}
    assert {step: kind for step, kind in saves.items() if step >= from_step} == dict.fromkeys(
        range(from_step, LAST_STEP + 1), "Fenced"
    ), start.output()
    assert "another start of the same run owns it now" in start.output()


def require_one_lineage(place: Place, owner: Start, *, epoch: int = 2, kept: tuple[int, ...] = ()) -> None:
    """Another start finds what `owner` saved last, bit for bit, and leaves only whole checkpoints.

    Args:
        epoch: of the owner.
        kept: steps that stay besides the owner's last two.
    """
    (*_, newest) = owner.events("step")
    with place.start("last", *SALTED) as last:
        last.start.succeed()
        (resume,) = last.start.events("resume")
        assert (resume["step"], resume["digest"]) == (OWNER_LAST_STEP, newest["digest"]), last.start.output()
    require_all_verify(place.url)
    assert debris(place.url) == []
    orders = sorted((found.step, found.epoch) for found in committed_manifests(place.url).values())
    assert [step for step, _ in orders] == [*kept, OWNER_LAST_STEP - 1, OWNER_LAST_STEP]
    assert {found for step, found in orders if step not in kept} == {epoch}
    if place.endpoint_url is not None:
        assert place.unfinished_uploads() == []
