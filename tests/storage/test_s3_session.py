"""The session of S3 clients is small, and finds what every other session finds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiobotocore.session import AioSession

from dcp_ckpt.storage.objects.s3_session import make_session

REGIONS = ("us-east-1", "eu-central-1", "us-gov-west-1", "cn-north-1", "ap-new-9")


async def endpoints(session: Any) -> list[str]:
    """Where requests go, by service and region."""
    found = []
    for service in ("s3", "sts", "sso", "sso-oidc"):
        for region in REGIONS:
            async with session.create_client(
                service, region_name=region, aws_access_key_id="x", aws_secret_access_key="y"
            ) as client:
                found.append(client.meta.endpoint_url)
    return found


def test_requests_go_where_those_of_every_session_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert asyncio.run(endpoints(make_session())) == asyncio.run(endpoints(AioSession()))


def test_nothing_large_is_kept() -> None:
    session = make_session()
    loader = session.get_component("data_loader")
    model = loader.load_service_model("s3", "service-2")
    assert model["operations"]["GetObject"]["input"] == {"shape": "GetObjectRequest"}
    assert len(str(model)) < 500_000, "1.3 MB with the documentation"
    assert len(str(loader.load_data("endpoints"))) < 100_000, "1.0 MB with all services"
