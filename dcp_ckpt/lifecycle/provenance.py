"""Provenance: on what machine and from what code a run was started.

Best effort and bounded in time: a start never fails because git is missing, slow or stuck, or because a name
is not text. Imports no package that it reports. Called by `dcp_ckpt.lifecycle.runs` when it creates a run.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from dcp_ckpt.bounded_calls import BoundedCalls
from dcp_ckpt.lifecycle.redaction import redact_secrets

__all__ = ["command_line", "git_state", "host_name", "package_versions"]

_GIT_TIMEOUT_SECONDS = 2.0
_GIT_PATIENCE_SECONDS = 5.0
_PACKAGES = ("dcp_ckpt", "torch", "numpy")


def command_line() -> list[str]:
    """The program of this process and its arguments as they were given, without the secrets among them."""
    return redact_secrets([_as_text(argument) for argument in sys.argv])


def host_name() -> str:
    return _as_text(os.uname().nodename)


def git_state(directory: str = ".") -> dict[str, Any] | None:
    """Commit of the checkout that holds `directory` and whether tracked files differ from it, or None.

    Whether they differ is None where git did not say so in time.
    """
    calls = BoundedCalls("dcp_ckpt-git")
    try:
        # git has a deadline of its own; but on a network disk that hangs, it cannot even be killed.
        return calls.call(lambda: _git_state(directory), patience_seconds=_GIT_PATIENCE_SECONDS)
    except TimeoutError:
        return None
    finally:
        calls.close()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, without importing them."""
    # Only a new run needs it, and the command line, which lists runs, must start at once.
    from importlib import metadata

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            version: Any = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if isinstance(version, str):  # a broken installation has None
            versions[package] = version
    return versions


def _git_state(directory: str) -> dict[str, Any] | None:
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(directory: str, *arguments: str) -> str | None:
    import subprocess

    # It only looks: no index is rewritten under the user's own git commands, no monitor is left running.
    looking = ("--no-optional-locks", "-c", "core.fsmonitor=false")
    try:
        finished = subprocess.run(
            ["git", "-C", directory, *looking, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return finished.stdout.strip()


def _as_text(name: str) -> str:
    """With what is not UTF-8 replaced: JSON cannot hold it."""
    return name.encode(errors="replace").decode()
