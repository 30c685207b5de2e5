"""S3 and what speaks its protocol, through s3fs and the client that it makes.

Owns the requests and their settings: credentials, endpoint and region are those of the standard AWS
environment and config files; a request is sent once (repeating is `RetryingClient`'s); payloads are neither
signed nor hashed again, since every block has a digest of its own (botocore would run SHA-256 over every body
sent over plain http).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from dcp_ckpt.errors import (
    ConfigError,
    MissingDependencyError,
    StorageError,
    StorageNotFound,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.storage.base import Buffer, ObjectInfo
from dcp_ckpt.storage.objects.client import Page, StoreTraits
from dcp_ckpt.storage.objects.fetch import Filling
from dcp_ckpt.storage.objects.s3_body import RequestBody
from dcp_ckpt.storage.objects.s3_errors import from_client_library, from_response
from dcp_ckpt.storage.objects.s3_session import make_session

__all__ = ["AnswerTimes", "S3Client"]

_CONNECTIONS = 64
_SLOWEST_BYTES_PER_SECOND = 256 << 10
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AnswerTimes:
    """How long the store is waited for.

    Args:
        connect_seconds: for a connection.
        answer_seconds: for an answer, and for each stretch of silence in one; the sending of a body is not
            silence.
    """

    connect_seconds: float = 5.0
    answer_seconds: float = 30.0


class S3Client:
    """One bucket and prefix; see `ObjectClient` for the methods.

    Args:
        bucket: must exist.
        prefix: empty, or without a slash at either end.
        times: after which an attempt has failed.

    Raises:
        MissingDependencyError: s3fs is not installed.
    """

    def __init__(self, bucket: str, prefix: str, times: AnswerTimes) -> None:
        try:
            import s3fs
        except ImportError as error:
            raise MissingDependencyError(
                "s3:// needs the s3fs package: pip install 'dcp_ckpt[s3]'", path=f"s3://{bucket}"
            ) from error
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._times = times
        self._reached = False
        self._succeeded = False
        self._closed = False
        self._fs = s3fs.S3FileSystem(
            session=make_session(),
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "max_pool_connections": _CONNECTIONS,
                "connect_timeout": times.connect_seconds,
                "read_timeout": times.answer_seconds,
                "s3": {"payload_signing_enabled": False},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                # It refuses bodies that are sent from memory without copying them.
                "parameter_validation": False,
            },
        )

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self._fs.loop
        return loop

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def traits(self) -> StoreTraits:
        return StoreTraits(conditional_put=True, shared=True, parts=True)

    @property
    def reached(self) -> bool:
        return self._reached

    async def get(self, key: str, *, offset: int = 0, num_bytes: int | None = None) -> bytearray:
        data = bytearray()

        def make_room(size_bytes: int) -> list[memoryview]:
            nonlocal data
            data = bytearray(size_bytes)
            return [memoryview(data)]

        await self._receive(key, offset, num_bytes, make_room)
        return data

    async def get_into(self, key: str, parts: Sequence[memoryview], *, offset: int) -> int:
        return await self._receive(key, offset, sum(map(len, parts)), lambda _: parts)

    async def _receive(
        self,
        key: str,
        offset: int,
        num_bytes: int | None,
        make_room: Callable[[int], Sequence[memoryview]],
    ) -> int:
        """The bytes of one answer, in order, in what `make_room` gives for so many; returns how many."""
        span = {} if num_bytes is None else {"Range": f"bytes={offset}-{offset + num_bytes - 1}"}
        async with self._asking("GET", key, num_bytes or 0) as s3:
            answer = await s3.get_object(**self._at(key), **span)
            size_bytes = int(answer["ContentLength"])
            self._require_range(key, answer, offset, num_bytes)
            filling = Filling(make_room(size_bytes))
            async with answer["Body"] as body:
                while piece := await body.read(_READ_BYTES):
                    filling.add(piece)
        if filling.num_bytes != size_bytes:
            raise StorageTransient(
                f"the answer broke off after {filling.num_bytes} of {size_bytes} bytes", path=self._where(key)
            )
        return size_bytes

    def _require_range(self, key: str, answer: Mapping[str, Any], offset: int, num_bytes: int | None) -> None:
        """The bytes asked for, and not the object from its start, from what does not know `Range`."""
        if num_bytes is None:
            return
        told = str(answer.get("ContentRange", "bytes 0-"))
        if not told.startswith(f"bytes {offset}-") or int(answer["ContentLength"]) > num_bytes:
            raise StorageUnsuitable(
                f"{num_bytes} bytes from {offset} were asked for, and others came ({told}): "
                "the store, or a proxy before it, ignores the Range header",
                path=self._where(key),
            )

    async def size(self, key: str) -> int:
        answer = await self._head(key)
        return int(answer["ContentLength"])

    async def age_seconds(self, key: str) -> float:
        answer = await self._head(key)
        # Both moments are the store's, so no clock of ours counts where it tells the time.
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)
        age: float = (now - answer["LastModified"]).total_seconds()
        return age

    async def put(self, key: str, data: Buffer, *, only_if_absent: bool) -> None:
        condition = {"IfNoneMatch": "*"} if only_if_absent else {}
        async with self._asking("PUT", key, len(data)) as s3:
            await s3.put_object(**self._at(key), Body=RequestBody(data), **condition)

    async def start_upload(self, key: str) -> str:
        async with self._asking("CreateMultipartUpload", key) as s3:
            answer = await s3.create_multipart_upload(**self._at(key))
        return str(answer["UploadId"])

    async def put_part(self, key: str, upload: str, number: int, data: Buffer) -> str:
        async with self._asking("UploadPart", key, len(data)) as s3:
            answer = await s3.upload_part(
                **self._at(key), UploadId=upload, PartNumber=number, Body=RequestBody(data)
            )
        return str(answer["ETag"])

    async def complete_upload(
        self, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, only_if_absent: bool
    ) -> None:
        condition = {"IfNoneMatch": "*"} if only_if_absent else {}
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, start=1)]
        async with self._asking("CompleteMultipartUpload", key) as s3:
            await s3.complete_multipart_upload(
                **self._at(key), UploadId=upload, MultipartUpload={"Parts": parts}, **condition
            )

    async def abort_upload(self, key: str, upload: str) -> None:
        with contextlib.suppress(StorageNotFound):
            async with self._asking("AbortMultipartUpload", key) as s3:
                await s3.abort_multipart_upload(**self._at(key), UploadId=upload)

    async def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        found = []
        async with self._asking("ListMultipartUploads", prefix) as s3:
            pages = s3.get_paginator("list_multipart_uploads")
            async for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for upload in page.get("Uploads", ()):
                    if upload["Key"].startswith(self._prefix + prefix):
                        found.append((upload["Key"].removeprefix(self._prefix), upload["UploadId"]))
        return found

    async def list_page(self, prefix: str, *, names_only: bool, token: str = "") -> Page:
        options = {"Delimiter": "/"} if names_only else {}
        if token:
            options["ContinuationToken"] = token
        async with self._asking("LIST", prefix) as s3:
            page = await s3.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + prefix, **options)
        objects = [
            ObjectInfo(key=item["Key"].removeprefix(self._prefix), size_bytes=int(item["Size"]))
            for item in page.get("Contents", ())
            # Some stores keep an empty object for a directory.
            if not item["Key"].endswith("/")
        ]
        folders = [item["Prefix"].removeprefix(self._prefix) for item in page.get("CommonPrefixes", ())]
        keys = [*folders, *(info.key for info in objects)] if names_only else []
        return Page(
            objects=() if names_only else tuple(objects),
            names=tuple(name for key in keys if (name := key.removeprefix(prefix))),
            next_token=page["NextContinuationToken"] if page.get("IsTruncated") else "",
        )

    async def delete(self, keys: Sequence[str]) -> None:
        if len(keys) == 1:
            async with self._asking("DELETE", keys[0]) as s3:
                await s3.delete_object(**self._at(keys[0]))
            return
        batch = [{"Key": self._prefix + key} for key in keys]
        async with self._asking("DeleteObjects", keys[0]) as s3:
            answer = await s3.delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
        for failed in answer.get("Errors") or ():
            path = f"s3://{self._bucket}/{failed.get('Key', '')}"
            raise from_response({"Error": failed}, operation="DELETE", path=path)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        creator = self._fs._s3creator if self._fs._s3 is not None else None
        if creator is not None:
            self._fs.close_session(self._fs.loop, creator)

    async def _head(self, key: str) -> dict[str, Any]:
        try:
            async with self._asking("HEAD", key) as s3:
                answer: dict[str, Any] = await s3.head_object(**self._at(key))
                return answer
        except StorageTransient:
            raise
        except StorageError:
            # The answer to a HEAD has no body that says whether key, bucket or credentials are wrong.
            if not self._succeeded:
                async with self._asking("LIST", key) as s3:
                    await s3.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + key, MaxKeys=1)
            raise

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _where(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    @contextlib.asynccontextmanager
    async def _asking(self, operation: str, key: str, num_bytes: int = 0) -> AsyncIterator[Any]:
        """The client for one request, bounded in time, its errors translated."""
        from botocore.exceptions import ClientError

        if self._closed:
            raise ConfigError("this storage is closed", path=self._where(key))
        times = self._times
        limit = times.connect_seconds + times.answer_seconds + num_bytes / _SLOWEST_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(limit):
                yield await self._fs.set_session()
            self._reached = self._succeeded = True
        except ClientError as error:
            self._reached = True
            raise from_response(error.response, operation=operation, path=self._where(key)) from error
        except (StorageError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise from_client_library(error, operation=operation, path=self._where(key)) from error
