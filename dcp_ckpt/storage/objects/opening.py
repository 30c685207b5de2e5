"""From a URL to an object storage: which client speaks to it, and how requests are repeated."""

from __future__ import annotations

from dataclasses import replace

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.storage.keys import check_key
from dcp_ckpt.storage.objects.client import ObjectClient
from dcp_ckpt.storage.objects.fsspec_client import FsspecClient
from dcp_ckpt.storage.objects.lease import LeaseTimes
from dcp_ckpt.storage.objects.looking import LookingClient
from dcp_ckpt.storage.objects.retry import RetryingClient, RetryPolicy
from dcp_ckpt.storage.objects.s3 import AnswerTimes, S3Client
from dcp_ckpt.storage.objects.storage import ObjectStorage

__all__ = ["open_object_storage"]

_SINGLE_WRITER = "+single-writer"
_BRIEF_SECONDS = 8.0


def open_object_storage(
    url: str,
    *,
    retry: RetryPolicy | None = None,
    answer_times: AnswerTimes | None = None,
    lease_times: LeaseTimes | None = None,
) -> ObjectStorage:
    """Open a store; nothing is asked of it yet.

    Args:
        url: `s3://BUCKET[/PREFIX]`, or the URL of another fsspec file system; a scheme that ends in
            `+single-writer` vouches that one process alone writes there.
        retry: how requests are repeated.
        answer_times: for how long S3 is waited for; other stores have settings of their own.
        lease_times: how long leases last; whoever shares a store must agree on them.

    Raises:
        ConfigError: the URL names no store.
        MissingDependencyError: its client is not installed.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    kind = scheme.removesuffix(_SINGLE_WRITER)
    path = rest.strip("/")
    if path:
        check_key(path)
    client: ObjectClient
    if kind in ("s3", "s3a"):
        bucket, _, prefix = path.partition("/")
        if not bucket or rest.startswith("/"):
            raise ConfigError(f"{url} names no bucket; write s3://BUCKET/PREFIX")
        client = S3Client(bucket, prefix, answer_times or AnswerTimes())
    else:
        client = FsspecClient(kind, path)
    single_writer = scheme.endswith(_SINGLE_WRITER)
    wrapper = LookingClient if single_writer else RetryingClient
    policy = retry or RetryPolicy()
    return ObjectStorage(
        wrapper(client, policy),
        wrapper(client, _brief(policy)),
        url=f"{scheme}://{path}",
        single_writer=single_writer,
        lease_times=lease_times or LeaseTimes(),
    )


def _brief(policy: RetryPolicy) -> RetryPolicy:
    """For what matters only now, or is only tidiness."""
    deadline = min(_BRIEF_SECONDS, policy.deadline_seconds)
    return replace(policy, deadline_seconds=deadline, attempt_seconds=deadline / 2)
