"""Ranks that hold different parts of a model plan alone and agree: random cuts, without processes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from dcp_ckpt.format.boxes import Box, Mesh, expand_ranks, tiling_problem
from dcp_ckpt.save.plan import SavePlan, make_plan
from dcp_ckpt.state.component import Captured
from dcp_ckpt.state.mesh_roles import Holders

SHAPES = [(), (0, 3), (1,), (7,), (5, 3), (40, 9), (4096, 1024)]
"""The last is large enough to be split among the ranks that hold it."""


@dataclass(frozen=True)
class Piece:
    """A plain tensor, and the stages that have it; None: all ranks have it, and no part of the model does."""

    name: str
    tensor: torch.Tensor
    stages: tuple[int, ...] | None


def random_world(rng: random.Random) -> tuple[Mesh, list[Piece]]:
    """A mesh of stages, data and tensor parallelism in any order of ranks."""
    shape = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 2)
    ranks = list(range(math.prod(shape)))
    rng.shuffle(ranks)
    pieces = []
    for number in range(rng.randint(1, 8)):
        stages = tuple(sorted(rng.sample(range(shape[0]), rng.randint(1, shape[0]))))
        pieces.append(Piece(f"t{number}", torch.empty(rng.choice(SHAPES)), rng.choice([stages, None])))
    return Mesh(shape, tuple(ranks)), pieces


def holders(mesh: Mesh, piece: Piece) -> list[int]:
    stages = dict(zip(mesh.ranks, (at[0] for at in mesh.coordinates()), strict=True))
    return [rank for rank in sorted(mesh.ranks) if piece.stages is None or stages[rank] in piece.stages]


def plan_of(rank: int, mesh: Mesh, pieces: list[Piece]) -> SavePlan:
    """What a rank plans, which knows its own tensors only."""
    held = [piece for piece in pieces if rank in holders(mesh, piece)]
    captured = Captured(
        tensors={(piece.name,): piece.tensor for piece in held},
        holders={
            (piece.name,): Holders(mesh=mesh, pipeline=(0,), stages=tuple((one,) for one in piece.stages))
            for piece in held
            if piece.stages is not None
        },
    )
    world = len(mesh.ranks)
    return make_plan(captured, rank=rank, world_size=world, global_ranks=range(world))


def test_every_tensor_is_stored_once_by_ranks_that_have_it_and_share_the_work():
    rng = random.Random(0)
    for _ in range(150):
        mesh, pieces = random_world(rng)
        plans = [plan_of(rank, mesh, pieces) for rank in range(len(mesh.ranks))]
        for piece in pieces:
            check(piece, holders(mesh, piece), plans)


def check(piece: Piece, having: list[int], plans: list[SavePlan]) -> None:
    boxes: dict[int, list[Box]] = {}
    for rank, plan in enumerate(plans):
        for chunk in plan.chunks:
            if chunk.tensor == piece.name:
                boxes.setdefault(rank, []).append(chunk.box)
    assert tiling_problem(piece.tensor.shape, [box for found in boxes.values() for box in found]) is None
    indexed = [
        (rank, entry) for rank, plan in enumerate(plans) for entry in plan.tensors if entry.name == piece.name
    ]
    ((indexing, entry),) = indexed
    assert indexing == having[0]
    assert boxes.keys() <= set(expand_ranks(entry.owners)) <= set(having)
    if entry.mesh is None:
        assert len(having) == len(plans)
    else:
        assert sorted(expand_ranks(plans[indexing].meshes[entry.mesh].ranks)) == having
    for rank in having:
        compared = plans[rank].replicas.get(plans[rank].names.index(piece.name))
        if len(having) == 1:
            assert compared is None
        else:
            assert compared == (() if len(having) == len(plans) else tuple(having))
    if piece.tensor.nbytes > 1 << 20:
        written = [sum(box.num_elements for box in boxes.get(rank, ())) for rank in having]
        assert max(written) - min(written) <= piece.tensor.numel() / 2


def test_stages_write_as_much_as_they_hold():
    """Two stages of two ranks, one with twice as much: nobody writes for the other stage."""
    mesh = Mesh((2, 2), (0, 1, 2, 3))
    pieces = [Piece(f"t{number}", torch.empty(4096, 256), (0 if number < 2 else 1,)) for number in range(6)]
    written = [
        sum(chunk.box.num_elements for chunk in plan_of(rank, mesh, pieces).chunks) for rank in range(4)
    ]
    assert written == [4096 * 256, 4096 * 256, 4096 * 512, 4096 * 512]
