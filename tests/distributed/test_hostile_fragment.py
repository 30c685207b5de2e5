"""A fragment that makes no sense, under right digests, sends all ranks to the step before, together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.fragment import Fragment, decode_fragment, encode_fragment, layout_digest
from dcp_ckpt.format.manifest import FragmentRef
from tests.distributed.test_fallback import load, save_steps
from tests.hostile.documents import signed_manifest

pytestmark = pytest.mark.distributed


def rewrite(step: Path, rank: int, changed: Fragment, name: str) -> None:
    """Put a fragment in the place of rank `rank`'s, and make every digest right again."""
    changed = replace(changed, layout=layout_digest(changed.meshes, changed.tensors, changed.chunks))
    data = encode_fragment(changed)
    (step / name).write_bytes(data)
    manifest = msgspec.json.decode((step / "manifest.json").read_bytes())
    manifest["fragments"][rank] = msgspec.to_builtins(FragmentRef.of(changed, data))
    (step / "manifest.json").write_bytes(encode_json(signed_manifest(manifest)))


@pytest.mark.parametrize("harm", ["a chunk twice", "rows that are not there", "an endless owner"])
def test_tables_of_one_rank_that_make_no_sense_are_refused_by_all(pool, tmp_path, harm):
    pool.run(save_steps, 2, str(tmp_path))
    step = tmp_path / "step-00000003"
    rank = 0 if harm == "an endless owner" else 1
    (path,) = step.glob(f"rank-0000{rank}.*.json")
    fragment = decode_fragment(path.read_bytes(), path=path.name)
    if harm == "an endless owner":
        tensor = replace(fragment.tensors[0], owners=[[0, 2**60]])
        changed = replace(fragment, tensors=[tensor, *fragment.tensors[1:]])
    else:
        offsets = [0, 0] if harm == "a chunk twice" else [2**60, 0]
        changed = replace(fragment, chunks=[replace(fragment.chunks[0], offsets=offsets)])
    rewrite(step, rank, changed, path.name)
    for told, report, found, restored in pool.run(load, 2, str(tmp_path), "latest"):
        assert told == ("ok", "")
        assert report.step == 2
        assert (found, restored) == ({2.0}, 2)
        assert "step-00000003" in report.rejected[0].path
    assert list((tmp_path / "marks" / "step-00000003").glob("bad-*.json"))
    for (kind, _), report, _, _ in pool.run(load, 2, str(tmp_path), 3):
        assert (kind, report) == ("CorruptCheckpoint", None)
