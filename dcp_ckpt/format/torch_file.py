"""A `torch.save` file that holds a flat dictionary of tensors: what stands around their bytes.

Pure, and free of torch; read by `torch.load`, also with `weights_only=True` and `mmap=True`. Written against
torch 2.13. Unlike the containers of a data file it has the right CRC-32 of every record, for readers of zip
archives that are not torch. Called by `dcp_ckpt.ops.exporting`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from dcp_ckpt.format.archive import ArchiveWriter
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.tensor_pickle import dict_pickle

__all__ = ["torch_file_framing"]

_ALIGNMENT_BYTES = 64


def torch_file_framing(
    tensors: Sequence[tuple[Sequence[str], str, tuple[int, ...]]],
) -> Generator[bytes, int, None]:
    """The bytes before the first tensor, between two, and after the last, which are one more than tensors.

    Their lengths do not depend on the CRCs.

    Args:
        tensors: names, dtype and sizes of each, contiguous and row-major, in the order of their bytes.

    Yields:
        The bytes up to those of the next tensor; sent in return: the CRC-32 of that tensor's bytes.
    """
    archive = ArchiveWriter()
    archive.add("data.pkl", dict_pickle(tensors))
    archive.add("byteorder", b"little")
    for number, (_, dtype, sizes) in enumerate(tensors):
        num_bytes = dtype_info(dtype).item_bytes * math.prod(sizes)
        archive.reserve(f"data/{number}", num_bytes, _ALIGNMENT_BYTES, crc_follows=True)
        archive.describe((yield archive.take()))
    archive.add("version", b"3\n")
    archive.finish()
    yield archive.take()
