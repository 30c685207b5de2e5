"""Which S3 operation an HTTP request is.

Pure. Knows path-style URLs (`/bucket/key`) only, which is what clients use with an address of their own.
Called by `fault_proxy` for its log and its faults.
"""

from __future__ import annotations

from collections.abc import Container
from enum import StrEnum
from urllib.parse import parse_qsl

__all__ = ["S3Operation", "operation_of"]


class S3Operation(StrEnum):
    """Equal to its name as a string. OTHER: settings of buckets and objects, and what is no S3."""

    ABORT_UPLOAD = "ABORT_UPLOAD"
    COMPLETE_UPLOAD = "COMPLETE_UPLOAD"
    COPY = "COPY"
    CREATE_BUCKET = "CREATE_BUCKET"
    CREATE_UPLOAD = "CREATE_UPLOAD"
    DELETE = "DELETE"
    DELETE_BUCKET = "DELETE_BUCKET"
    DELETE_MANY = "DELETE_MANY"
    GET = "GET"
    HEAD = "HEAD"
    HEAD_BUCKET = "HEAD_BUCKET"
    LIST = "LIST"
    LIST_BUCKETS = "LIST_BUCKETS"
    LIST_PARTS = "LIST_PARTS"
    LIST_UPLOADS = "LIST_UPLOADS"
    OTHER = "OTHER"
    PUT = "PUT"
    UPLOAD_PART = "UPLOAD_PART"
    UPLOAD_PART_COPY = "UPLOAD_PART_COPY"


# Settings of a bucket or an object; without them in the query, the same request would be about its content.
_SUB_RESOURCES = {
    "acl", "attributes", "cors", "encryption", "legal-hold", "lifecycle", "location", "logging",
    "notification", "object-lock", "policy", "replication", "retention", "tagging", "versioning", "website",
}  # fmt: skip
_COPY_SOURCE = "x-amz-copy-source"


def operation_of(method: str, path: str, query: str, header_names: Container[str]) -> S3Operation:
    """The operation of one request.

    Args:
        path: quoted or not; without the query.
        query: as in the URL, without the question mark.
        header_names: in lower case.
    """
    parameters = {name for name, _ in parse_qsl(query, keep_blank_values=True)}
    bucket, _, key = path.lstrip("/").partition("/")
    if parameters & _SUB_RESOURCES:
        return S3Operation.OTHER
    if key:
        return _object_operation(method, parameters, _COPY_SOURCE in header_names)
    return _bucket_operation(method, parameters) if bucket else _service_operation(method)


def _object_operation(method: str, parameters: set[str], is_copy: bool) -> S3Operation:
    in_upload = "uploadId" in parameters
    match method:
        case "PUT" if in_upload:
            return S3Operation.UPLOAD_PART_COPY if is_copy else S3Operation.UPLOAD_PART
        case "PUT":
            return S3Operation.COPY if is_copy else S3Operation.PUT
        case "GET":
            return S3Operation.LIST_PARTS if in_upload else S3Operation.GET
        case "HEAD":
            return S3Operation.HEAD
        case "DELETE":
            return S3Operation.ABORT_UPLOAD if in_upload else S3Operation.DELETE
        case "POST" if in_upload:
            return S3Operation.COMPLETE_UPLOAD
        case "POST" if "uploads" in parameters:
            return S3Operation.CREATE_UPLOAD
        case _:
            return S3Operation.OTHER


def _bucket_operation(method: str, parameters: set[str]) -> S3Operation:
    match method:
        case "GET":
            return S3Operation.LIST_UPLOADS if "uploads" in parameters else S3Operation.LIST
        case "POST" if "delete" in parameters:
            return S3Operation.DELETE_MANY
        case "PUT":
            return S3Operation.CREATE_BUCKET
        case "HEAD":
            return S3Operation.HEAD_BUCKET
        case "DELETE":
            return S3Operation.DELETE_BUCKET
        case _:
            return S3Operation.OTHER


def _service_operation(method: str) -> S3Operation:
    return S3Operation.LIST_BUCKETS if method == "GET" else S3Operation.OTHER
