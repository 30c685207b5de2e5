"""CheckpointConfig: defaults, and a refusal that shows the offending value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.errors import ConfigError
from dcp_ckpt.policies import AnyOf, EverySteps, LatestN


def test_defaults_keep_two_and_save_when_the_user_says() -> None:
    config = CheckpointConfig()
    assert config.keep == LatestN(2)
    assert config.save_when is None
    assert config.verify is True
    assert config.allow_pickle is False


def test_fields_are_the_contract() -> None:
    assert [field.name for field in dataclasses.fields(CheckpointConfig)] == [
        "save_when",
        "keep",
        "suspect_when",
        "overlap",
        "reuse",
        "when_busy",
        "on_failure",
        "verify",
        "timeout_seconds",
        "grace_seconds",
        "recover_wait_seconds",
        "stop_after_seconds",
        "stop_grace_seconds",
        "stop_signals",
        "max_bandwidth_bytes",
        "dcp_metadata",
        "allow_pickle",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("save_when", LatestN(1)),
        ("save_when", 100),
        ("keep", EverySteps(1)),
        ("keep", AnyOf(EverySteps(7))),
        ("keep", 3),
        ("overlap", "full"),
        ("when_busy", "drop"),
        ("on_failure", None),
        ("dcp_metadata", "sometimes"),
        ("stop_after_seconds", -1.0),
        ("stop_grace_seconds", float("inf")),
        ("stop_signals", ("SIGKILL",)),
        ("stop_signals", ("TERM",)),
        ("verify", 1),
        ("verify", "yes"),
        ("timeout_seconds", 0),
        ("timeout_seconds", math.inf),
        ("timeout_seconds", "600"),
        ("timeout_seconds", True),
        ("grace_seconds", -1),
        ("recover_wait_seconds", math.nan),
    ],
)
def test_a_wrong_value_is_refused_and_shown(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("max_bandwidth_bytes", 1 << 20), ("allow_pickle", True)])
def test_what_is_not_built_is_refused_instead_of_ignored(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*not built yet"):
        CheckpointConfig(**{name: value})


def test_zero_waits_are_allowed() -> None:
    config = CheckpointConfig(grace_seconds=0, recover_wait_seconds=0, keep=None)
    assert config.keep is None
