"""What the file system of a local directory can do, found by trial.

Called by the local storage; raises plain `OSError`.
"""

from __future__ import annotations

import os
from contextlib import suppress

from dcp_ckpt.errors import StorageUnsuitable
from dcp_ckpt.storage.base import StorageCapabilities
from dcp_ckpt.storage.keys import temporary_name
from dcp_ckpt.storage.publishing import Publisher, temporary_file
from dcp_ckpt.storage.system_calls import SystemCalls

__all__ = ["try_out", "usual_capabilities"]


def try_out(root: str, publisher: Publisher, calls: SystemCalls) -> StorageCapabilities:
    """Create files exclusively, link and write directly in `root`; leaves nothing behind."""
    second = os.path.join(root, temporary_name("probe", os.urandom(8).hex()))
    with temporary_file(os.path.join(root, "probe"), b"", calls) as first:
        direct_io = _does_direct_io(first, calls)
        try:
            publisher.publish(first, second)
        except StorageUnsuitable:
            return _capabilities(exclusive_create=False, direct_io=direct_io, links=False)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(second)
    return _capabilities(exclusive_create=bool(publisher.atomic), direct_io=direct_io, links=publisher.links)


def usual_capabilities() -> StorageCapabilities:
    """Those of an ordinary file system, for a directory where nothing can be tried."""
    return _capabilities(exclusive_create=True, direct_io=hasattr(os, "O_DIRECT"), links=True)


def _does_direct_io(path: str, calls: SystemCalls) -> bool:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        calls.set_direct(fd, True)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _capabilities(*, exclusive_create: bool, direct_io: bool, links: bool) -> StorageCapabilities:
    return StorageCapabilities(
        exclusive_create=exclusive_create,
        directories=True,
        direct_io=direct_io,
        lease_ends_with_holder=True,
        shared=True,
        links=links,
    )
