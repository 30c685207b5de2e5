"""Provenance: on what machine and from what code a run was started.

Best effort and bounded in time: a start never fails because git is missing or slow. Imports no package that
it reports. Called by `dcp_ckpt.lifecycle.runs` when it creates a run.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["command_line", "git_state", "host_name", "package_versions"]

_GIT_TIMEOUT_SECONDS = 2.0
_PACKAGES = ("dcp_ckpt", "torch", "numpy")


def command_line() -> list[str]:
    """The program of this process and its arguments, as they were given."""
    return list(sys.argv)


def host_name() -> str:
    return os.uname().nodename


def git_state(directory: str = ".") -> dict[str, Any] | None:
    """Commit of the checkout that holds `directory` and whether tracked files differ from it, or None."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, without importing them."""
    # Only a new run needs it, and the command line, which lists runs, must start at once.
    from importlib import metadata

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(directory: str, *arguments: str) -> str | None:
    import subprocess

    try:
        finished = subprocess.run(
            ["git", "-C", directory, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return finished.stdout.strip()
