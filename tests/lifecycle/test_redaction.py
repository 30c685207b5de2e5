"""Redaction: no secret of a command line is recorded, and everything else is."""

from __future__ import annotations

import pytest

from dcp_ckpt.lifecycle.redaction import REDACTED, redact_secrets


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        (["t.py", "--token=abc", "--lr", "3"], ["t.py", "--token=<redacted>", "--lr", "3"]),
        (["--api-key", "X", "--lr=3"], ["--api-key", "<redacted>", "--lr=3"]),
        (["--hubToken", "X", "-v"], ["--hubToken", "<redacted>", "-v"]),
        (["--db_password", "-x"], ["--db_password", "<redacted>"]),
        (["-secret", "x"], ["-secret", "<redacted>"]),
        (["AWS_SECRET_ACCESS_KEY=a/b=c", "x"], ["AWS_SECRET_ACCESS_KEY=<redacted>", "x"]),
        (["+wandb.apiKey=x"], ["+wandb.apiKey=<redacted>"]),
        (['{"lr": 3, "api_key": "x"}'], ['{"lr": 3, "api_key": "<redacted>']),
        (["--header", "Authorization: Bearer x"], ["--header", "Authorization: <redacted>"]),
        (["--set=password=x"], ["--set=password=<redacted>"]),
        (["https://h/p?a=1&X-Amz-Signature=x"], ["https://h/p?a=1&X-Amz-Signature=<redacted>"]),
        (["https://u:p@w@h/x"], ["https://<redacted>@h/x"]),
        (["https://x@h", "redis://u:x@h"], ["https://<redacted>@h", "redis://u:<redacted>@h"]),
    ],
)
def test_what_is_named_like_a_secret_is_not_recorded(arguments: list[str], recorded: list[str]) -> None:
    assert redact_secrets(arguments) == recorded
    assert redact_secrets(recorded) == recorded


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "--lr", "0.1", "--max-tokens=12", "--tokens", "5", "--tokenizer", "gpt2", "-v", "x"],
        ["--eos-token", "</s>", "--pad_token_id=3", "--token-dim", "4", "--loss-per-token", "1"],
        ["s3://bucket/run-001@best", "git+ssh://git@host/x", "--key", "model.*", "a@b", "--author", "me"],
        # A flag that wants no value does not hide what follows.
        ["--use-auth-token", "--lr", "3"],
        ["--use-auth-token", "--lr=3"],
        ["--token="],
        [],
    ],
)
def test_everything_else_is_recorded_as_it_is(arguments: list[str]) -> None:
    assert redact_secrets(arguments) == arguments
    assert not any(REDACTED in argument for argument in arguments)
