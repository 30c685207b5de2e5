"""Object stores pass the suite: a real S3 server, and fsspec's memory file system."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.testing.storage_suite import StorageSuite

_numbers = itertools.count()


class TestS3Storage(StorageSuite):
    @pytest.fixture
    def storage(self, s3_prefix: str) -> Iterator[Storage]:
        storage = open_storage(s3_prefix)
        yield storage
        storage.close()

    def reopen(self, storage: Storage) -> Storage:
        return open_storage(storage.url)


class TestMemoryUrl(StorageSuite):
    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        storage = open_storage(f"memory://suite-{next(_numbers)}/runs")
        yield storage
        storage.delete([info.key for info in storage.list("")])
        storage.close()

    def reopen(self, storage: Storage) -> Storage:
        return open_storage(storage.url)
