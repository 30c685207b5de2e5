"""The moments of a save, a removal and a start at which these tests hold a process."""

from __future__ import annotations

from dcp_ckpt.testing.s3_operations import S3Operation
from tests.epochs.places import Moment

__all__ = [
    "AFTER_CLAIM",
    "AFTER_FRAGMENT",
    "AFTER_SEAL",
    "BEFORE_CLAIM",
    "BEFORE_DATA",
    "BEFORE_FRAGMENT",
    "BEFORE_MANIFEST",
    "BEFORE_NEXT_DATA",
    "BEFORE_REMOVAL",
    "BEFORE_SEAL",
    "claim_of",
    "data_of",
]

STEP = "step-00000003"
_FRAGMENT = f"{STEP}/rank-00000.*.json"
_MANIFEST = f"{STEP}/manifest.json"
_TRASH = f"trash/{STEP}.*"

# Of the save of step 3, in its order.
BEFORE_FRAGMENT = Moment(role="writer", call="link", path=_FRAGMENT)
AFTER_FRAGMENT = Moment(role="writer", call="link", path=_FRAGMENT, after=True)
BEFORE_MANIFEST = Moment(role="trainer", call="link", path=_MANIFEST)
# Of the removal of step 1, which follows the commit of step 3.
BEFORE_REMOVAL = Moment(
    role="trainer", call="unlink", path="step-00000001/.metadata", request=S3Operation.DELETE
)
# Of a start that finds step 3 without a manifest.
BEFORE_SEAL = Moment(role="trainer", call="rename", path=_TRASH, key=_MANIFEST)
AFTER_SEAL = Moment(role="trainer", call="rename", path=_TRASH, key=_MANIFEST, after=True)


def data_of(step: int) -> Moment:
    return Moment(role="writer", call="open", path=f"step-{step:08}/__0_0.*.distcp")


def claim_of(epoch: int, *, after: bool) -> Moment:
    return Moment(role="trainer", call="link", path=f"epochs/{epoch:08}.json", after=after)


BEFORE_DATA = data_of(3)
BEFORE_NEXT_DATA = data_of(4)
BEFORE_CLAIM = claim_of(1, after=False)
AFTER_CLAIM = claim_of(2, after=True)
