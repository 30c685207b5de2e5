"""`python -m dcp_ckpt` is `dcp-ckpt`."""

from __future__ import annotations

from dcp_ckpt.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
