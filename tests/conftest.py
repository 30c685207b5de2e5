"""Settings for all tests: what the command line or pyproject.toml cannot say."""

from __future__ import annotations

from hypothesis import settings

# Fixed examples, so that a red run is red again; no deadline, since a busy machine is no failure;
# no database, so that nothing is left on disk.
settings.register_profile("dcp_ckpt", derandomize=True, deadline=None, database=None)
settings.load_profile("dcp_ckpt")
