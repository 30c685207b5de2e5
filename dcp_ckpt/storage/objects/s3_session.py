"""The session that S3 clients are made of, with the descriptions of AWS held small.

Owns how the client library's data files are read. As it comes, it keeps the documentation of every operation
of S3 and the endpoints of all services of AWS for as long as it lives: 11 MiB in each process, of which 2 are
used (benchmarks/NOTES.md). Called by `S3Client`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

__all__ = ["make_session"]

_ENDPOINTS_FILE = "endpoints.json"
_SERVICES = frozenset({"s3", "s3express", "sts", "oidc", "portal.sso", "sso"})
"""Those that are asked for objects and for credentials; a service without endpoints gets the default ones."""

_Pairs = list[tuple[str, Any]]


def make_session() -> Any:
    """An `AioSession` that finds credentials, settings and data files as every other does."""
    from aiobotocore.session import AioSession
    from botocore.loaders import JSONFileLoader, create_loader

    class SmallFiles(JSONFileLoader):  # type: ignore[misc]
        """Reads the files of `botocore/data`, but for what makes them large."""

        def _load_file(self, full_path: str, open_method: Callable[..., Any]) -> Any:
            if not os.path.isfile(full_path):
                return None
            with open_method(full_path, "rb") as file:
                return json.loads(file.read(), object_pairs_hook=_shortened_for(full_path))

    session = AioSession()

    def make_loader() -> Any:
        loader = create_loader(session.get_config_variable("data_path"))
        loader.file_loader = SmallFiles()
        return loader

    # Not before it is needed: the settings may be wrong, which the first request is to tell.
    session.lazy_register_component("data_loader", make_loader)
    return session


def _shortened_for(path: str) -> Callable[[_Pairs], dict[str, Any]]:
    return _without_services if os.path.basename(path) == _ENDPOINTS_FILE else _without_documentation


def _without_documentation(pairs: _Pairs) -> dict[str, Any]:
    # Emptied, not left out: it is asked for. What is no text is a shape's member of that name.
    return {key: "" if key == "documentation" and isinstance(value, str) else value for key, value in pairs}


def _without_services(pairs: _Pairs) -> dict[str, Any]:
    return {
        key: {name: service for name, service in value.items() if name in _SERVICES}
        if key == "services"
        else value
        for key, value in pairs
    }
