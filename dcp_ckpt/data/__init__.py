"""Data whose order and position do not depend on the number of ranks: a sampler, and a loader with workers.

The public names. A checkpoint knows them by their `state_dict()` only, so nothing in the package needs them.
"""

from __future__ import annotations

from dcp_ckpt.data.loader import ElasticLoader
from dcp_ckpt.data.sampler import ElasticSampler

__all__ = ["ElasticLoader", "ElasticSampler"]
