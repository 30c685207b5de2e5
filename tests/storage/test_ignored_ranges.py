"""A store, or a proxy before it, that answers every range with the whole object is found out at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dcp_ckpt.errors import StorageUnsuitable
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import ByteRange

WHOLE = b"0123456789"


class NoRanges(BaseHTTPRequestHandler):
    """What HTTP allows: a server need not know `Range`."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(WHOLE)))
        self.end_headers()
        self.wfile.write(WHOLE)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), NoRanges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield "s3://bucket/prefix"
        server.shutdown()


@pytest.mark.parametrize("into", [False, True], ids=["returned", "into memory"])
@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 4), (3, 4), (3, len(WHOLE))])
def test_other_bytes_than_those_asked_for_are_never_taken(
    url: str, offset: int, num_bytes: int, into: bool
) -> None:
    storage = open_storage(url)
    target = bytearray(num_bytes)
    found: list[bytes] = []
    offer = (lambda: [memoryview(target)]) if into else None
    wanted = ByteRange(key="a", offset=offset, num_bytes=num_bytes, into=offer)
    try:
        assert storage.read("a") == WHOLE
        with pytest.raises(StorageUnsuitable, match="ignores the Range header"):
            storage.read_ranges([wanted], lambda number, data: None, concurrency=1)
        whole = ByteRange(key="a", offset=0, num_bytes=len(WHOLE))
        storage.read_ranges([whole], lambda number, data: found.append(bytes(data)), concurrency=1)
        assert found == [WHOLE]
    finally:
        storage.close()
