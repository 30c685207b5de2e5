"""Which ranks share a host, and how the others reach it. Linux.

Owns the identity of a host and its addresses. Knows nothing of ranks. Called by `coordination`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["LOOPBACK", "host_identity", "own_addresses", "reachable_address"]

LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 3.0
_SIOCGIFADDR = 0x8915
_ANYWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses of documentation: asking for the way there chooses a route and sends nothing."""


def host_identity() -> str:
    """Equal for two processes exactly when they reach each other over loopback; host names are not unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        return socket.gethostname()
    return f"{boot} {namespace}"


def own_addresses() -> list[str]:
    """The addresses by which other hosts may reach this one, the likeliest first; never loopback.

    That of the default route, those of the host's name, and those of all interfaces: networks of training
    jobs may have no default route, and names that lead to loopback.
    """
    found = [*_routed(), *_named(), *_of_interfaces()]
    return list(dict.fromkeys(address for address in found if not _is_local(address)))


def reachable_address(addresses: Sequence[str], port: int) -> str | None:
    """The first address where something listens on `port`; None when there is none. Blocks for seconds."""
    for address in addresses:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address, port), timeout=_CONNECT_SECONDS),
        ):
            return address
    return None


def _routed() -> Iterator[str]:
    for family, anywhere in _ANYWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            yield str(probe.getsockname()[0])


def _named() -> Iterator[str]:
    with contextlib.suppress(OSError, UnicodeError):
        for *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            yield str(address[0])


def _of_interfaces() -> Iterator[str]:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an address
                yield socket.inet_ntoa(fcntl.ioctl(asked, _SIOCGIFADDR, request)[20:24])


def _is_local(address: str) -> bool:
    """Loopback, or good on one link only."""
    return address.startswith(("127.", "fe80:")) or address in ("::1", "0.0.0.0")
