"""Who reads what, where several ranks want the same bytes. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.load.ranges import Read
from dcp_ckpt.load.read_plan import Target

__all__ = ["shares_of", "wants_digest"]


def wants_digest(directory: str, targets: Mapping[str, Target], *, verify: bool) -> str:
    """Equal for two ranks exactly when the same reads, checked alike, serve both.

    Args:
        directory: of the checkpoint.
        targets: by stored name.
    """
    boxes = [[name, list(target.box.offsets), list(target.box.sizes)] for name, target in targets.items()]
    return digest(encode_json([directory, verify, sorted(boxes)]))


def shares_of(reads: Sequence[Read], num_members: int) -> list[range]:
    """Divide reads among members: a run of neighbouring reads for each, of about as many bytes.

    Returns:
        The indices of the reads of each member; every read is one member's.
    """
    ends = list(itertools.accumulate(read.num_bytes for read in reads))
    total_bytes = ends[-1] if ends else 0
    cuts = [0]
    for member in range(1, num_members):
        wanted_bytes = total_bytes * member // num_members
        cut = cuts[-1]
        while cut < len(ends) and ends[cut] - reads[cut].num_bytes // 2 <= wanted_bytes:
            cut += 1
        cuts.append(cut)
    return [range(start, stop) for start, stop in itertools.pairwise([*cuts, len(reads)])]
