"""Single S3 requests, signed by botocore and sent as they are: no retries, no parsing, no shared state.

Owns the signing of one request. Must not know what a checkpoint is, nor the server it talks to. Called by
`s3_server` to see whether the server works, and by tests that look at single answers.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

from dcp_ckpt.errors import MissingDependencyError

__all__ = ["S3Answer", "S3Requests"]


@dataclass(frozen=True, kw_only=True)
class S3Answer:
    """What came back: `headers` by name in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error_code(self) -> str | None:
        """The `Code` of an S3 error document, like `NoSuchKey`; None when the body is none."""
        try:
            root = ElementTree.fromstring(self.body)
        except ElementTree.ParseError:
            return None
        return root.findtext("Code") if root.tag == "Error" else None


@dataclass(frozen=True, kw_only=True)
class S3Requests:
    """Where to send requests, and as whom.

    Args:
        endpoint_url: like `http://127.0.0.1:8333`; plain http only.
        timeout_seconds: of connecting, and of each wait for the server.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    region: str
    timeout_seconds: float = 30.0

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> S3Answer:
        """Send one request over a connection of its own, and wait for the answer. Blocks.

        Args:
            path: `/bucket/key`, not quoted.
            query: of a sub-resource without value: `{"uploads": ""}`.

        Raises:
            MissingDependencyError: botocore is not installed.
            OSError: no connection, or no answer in time.
            http.client.HTTPException: what came back is no answer.
        """
        target = quote(path, safe="/~")
        if query:
            target += "?" + urlencode(query, quote_via=quote)
        signed = self._signed_headers(method, target, headers or {}, body)
        connection = http.client.HTTPConnection(
            urlsplit(self.endpoint_url).netloc, timeout=self.timeout_seconds
        )
        try:
            connection.request(method, target, body=body, headers=signed)
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return S3Answer(status=answer.status, headers=names, body=answer.read())
        finally:
            connection.close()

    def _signed_headers(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> dict[str, str]:
        try:
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest
            from botocore.credentials import Credentials
        except ImportError as error:
            raise MissingDependencyError(
                'signing S3 requests needs botocore: pip install "dcp_ckpt[s3]"'
            ) from error
        request = AWSRequest(method=method, url=self.endpoint_url + target, headers=dict(headers), data=body)
        S3SigV4Auth(Credentials(self.access_key, self.secret_key), "s3", self.region).add_auth(request)
        return dict(request.headers.items())
