"""What is saved: components that adapt models, optimizers, generators, data order and user state."""

from __future__ import annotations

from dcp_ckpt.state.component import Captured, Component, Path, Problem, StoredState, StoredTensor, Targets
from dcp_ckpt.state.mesh_roles import MeshRoles
from dcp_ckpt.state.model import ModelComponent
from dcp_ckpt.state.model_parts import ModelParts
from dcp_ckpt.state.optimizer import OptimizerComponent
from dcp_ckpt.state.part import PartComponent
from dcp_ckpt.state.per_rank import PerRankComponent
from dcp_ckpt.state.rng import RngComponent
from dcp_ckpt.state.stateful import DictComponent, Stateful, StatefulComponent
from dcp_ckpt.state.train_state import TrainState, components_of

__all__ = [
    "Captured",
    "Component",
    "DictComponent",
    "MeshRoles",
    "ModelComponent",
    "ModelParts",
    "OptimizerComponent",
    "PartComponent",
    "Path",
    "PerRankComponent",
    "Problem",
    "RngComponent",
    "Stateful",
    "StatefulComponent",
    "StoredState",
    "StoredTensor",
    "Targets",
    "TrainState",
    "components_of",
]
