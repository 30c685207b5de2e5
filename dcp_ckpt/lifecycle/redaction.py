"""Redaction: a command line without the secrets that were given in it. Pure.

Called by `dcp_ckpt.lifecycle.provenance`, which records the command line of every new run. What it cannot
know is a secret without a name, or one behind a flag of a single letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["REDACTED", "redact_secrets"]

REDACTED = "<redacted>"

_BARE_FLAG = re.compile(r"--?[A-Za-z][\w.-]*")
_LONG_FLAG = re.compile(r"--[A-Za-z]")
_NAMED = re.compile(r"""(?P<name>[A-Za-z][\w.-]*)["']?\s*[=:]\s*["']?(?=.)""", re.DOTALL)
_USER_IN_URL = re.compile(r"(https?://|\w[\w+.-]*://[^/\s:@]*:)[^/\s]+@")
_SECRET_PARTS = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "credential",
    "authorization",
    "cookie",
    "signature",
    "apikey",
    "accesskey",
    "accountkey",
    "authkey",
    "encryptionkey",
    "privatekey",
    "signingkey",
)
_SECRET_ENDS = ("auth", "pwd", "sig", "token")
# Of language models, not of services.
_HARMLESS_TOKENS = frozenset({"bos", "cls", "eos", "mask", "pad", "per", "sep", "special", "unk"})


def redact_secrets(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `<redacted>` for whatever is named like a secret.

    That is the value in `--token=x`, `--api-key x`, `AWS_SECRET_ACCESS_KEY=x`, `wandb.api_key=x`, in JSON, in
    a header and in the query of a URL, with all that follows it in the same argument, and the user in
    `https://user:x@host`. When in doubt a name is that of a secret; a flag in two dashes is never a value.
    """
    redacted = []
    awaits_secret = False
    for argument in arguments:
        if awaits_secret and not _LONG_FLAG.match(argument):
            redacted.append(REDACTED)
            awaits_secret = False
        else:
            redacted.append(_USER_IN_URL.sub(rf"\1{REDACTED}@", _without_named_secret(argument)))
            awaits_secret = bool(_BARE_FLAG.fullmatch(argument)) and _names_a_secret(argument)
    return redacted


def _without_named_secret(argument: str) -> str:
    for match in _NAMED.finditer(argument):
        if _names_a_secret(match["name"]):
            return argument[: match.end()] + REDACTED
    return argument


def _names_a_secret(name: str) -> bool:
    words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower())
    joined = "".join(words)
    if any(part in joined for part in _SECRET_PARTS):
        return True
    return joined.endswith(_SECRET_ENDS) and not _HARMLESS_TOKENS & set(words)
