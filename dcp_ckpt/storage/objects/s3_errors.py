"""What S3 and its client library say, in our own errors: what happened, and what to do about it.

Owns the table of S3 error codes. Classifies by code, status and type, never by text. Nothing secret gets into
a message: of credentials only the variable names are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcp_ckpt.errors import (
    ConfigError,
    StorageError,
    StorageExists,
    StorageFull,
    StorageNotFound,
    StorageTransient,
    StorageUnsuitable,
)

__all__ = ["from_client_library", "from_response"]

_CREDENTIALS = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile (AWS_PROFILE)"
)

_ADVICE: Mapping[str, str] = {
    "NoSuchBucket": "the bucket does not exist, and is never created here; make it, or correct the URL",
    "InvalidBucketName": "this is no valid bucket name; correct the URL",
    "InvalidAccessKeyId": f"the access key is not known to this store; {_CREDENTIALS} and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": f"the secret key is wrong for this access key; {_CREDENTIALS}",
    "ExpiredToken": f"the session token has expired; renew it, then {_CREDENTIALS}",
    "InvalidToken": f"the session token is not valid; {_CREDENTIALS}",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    "AccessDenied": f"access is denied; {_CREDENTIALS}; docs/s3.md lists the permissions that are needed",
    "AllAccessDisabled": "access to the bucket is disabled",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the region is wrong for this bucket; set AWS_DEFAULT_REGION",
    "IllegalLocationConstraintException": "the region is wrong for this bucket; set AWS_DEFAULT_REGION",
}

_BY_STATUS: Mapping[int, str] = {
    301: "PermanentRedirect",
    403: "AccessDenied",
}

_REPEATABLE_CODES = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
_REPEATABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_FULL_CODES = frozenset({"EntityTooLarge", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"})


def from_response(response: Mapping[str, Any], *, operation: str, path: str) -> StorageError:
    """The error that an answer of the store stands for.

    Args:
        response: as botocore's ClientError carries it.
        operation: name of the request, for the message.
        path: URL of the object or prefix.
    """
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"{operation} failed: {code or 'no code'} (status {status})"
    if code in _REPEATABLE_CODES or (status in _REPEATABLE_STATUS and code not in _ADVICE):
        return StorageTransient(said, path=path)
    if status == 412 or code == "PreconditionFailed":
        return StorageExists("the name is taken", path=path)
    if code in _ADVICE:
        return StorageError(f"{said}: {_ADVICE[code]}", path=path)
    if status == 404:
        return StorageNotFound("there is no such object", path=path)
    if code in _FULL_CODES or status == 507:
        return StorageFull(f"{said}: the store takes no more bytes", path=path)
    if status == 501 or code == "NotImplemented":
        return StorageUnsuitable(f"{said}: the store cannot do this", path=path)
    advice = _ADVICE.get(_BY_STATUS.get(status, ""), "")
    return StorageError(f"{said}: {advice}" if advice else said, path=path)


def from_client_library(error: Exception, *, operation: str, path: str) -> StorageError | ConfigError:
    """The error that an exception of botocore or the HTTP client stands for, when there was no usable answer.

    Only trouble with the network is worth repeating: whatever is not known to be that fails at once.
    """
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    said = f"{operation} failed: {type(error).__name__}"
    if isinstance(
        error,
        boto.NoCredentialsError
        | boto.PartialCredentialsError
        | boto.CredentialRetrievalError
        | boto.TokenRetrievalError
        | boto.SSOError,
    ):
        return StorageError(f"{said}: no credentials were found; {_CREDENTIALS}", path=path)
    if isinstance(error, boto.ProfileNotFound):
        return ConfigError(f"{said}: AWS_PROFILE names a profile that is not in the AWS config", path=path)
    if isinstance(error, boto.NoRegionError | boto.InvalidRegionError):
        return ConfigError(f"{said}: set AWS_DEFAULT_REGION", path=path)
    if isinstance(error, boto.SSLError):
        return StorageError(f"{said}: the store's certificate was not accepted: {error}", path=path)
    if isinstance(
        error,
        boto.HTTPClientError
        | boto.ConnectionError
        | boto.IncompleteReadError
        | aiohttp.ClientError
        | OSError,  # TimeoutError is one
    ):
        # Refused, reset, cut off, timed out, a name that does not resolve.
        return StorageTransient(f"{said}: no answer from the store; check AWS_ENDPOINT_URL", path=path)
    if isinstance(error, ResponseParserError):
        return StorageError(f"{said}: what answers is no S3 store; check AWS_ENDPOINT_URL", path=path)
    if isinstance(error, boto.BotoCoreError | ValueError):
        return ConfigError(f"{said}: {error}; check the AWS environment and config", path=path)
    return StorageError(f"{said}: the answer was not understood", path=path)
