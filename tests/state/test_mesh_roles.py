"""The reading of a mesh: in one process, over the fake process group that torch has for such arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_ckpt import MeshRoles
from dcp_ckpt.errors import ConfigError, StateError
from dcp_ckpt.state.mesh_roles import Holders


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """2 pipeline stages of 2 x 2 ranks, seen from rank 5: stage 1, data coordinate 0, tensor coordinate 1."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
    dist.destroy_process_group()


def test_ranks_of_one_tensor_group_share_their_data(mesh: DeviceMesh) -> None:
    roles = MeshRoles(mesh=mesh, data=("dp",), pipeline=("pp",))
    assert roles.data_size == 2
    assert roles.data_coordinate == 0
    assert roles.data_coordinates() == {0: 0, 1: 0, 2: 1, 3: 1, 4: 0, 5: 0, 6: 1, 7: 1}


def test_a_stage_is_what_shares_the_pipeline_coordinate(mesh: DeviceMesh) -> None:
    assert MeshRoles(mesh=mesh, data=("dp",), pipeline=("pp",)).stage_ranks() == (4, 5, 6, 7)
    assert MeshRoles(mesh=mesh, data=("pp", "dp")).stage_ranks() == tuple(range(8))


def test_several_data_dimensions_are_counted_as_one(mesh: DeviceMesh) -> None:
    roles = MeshRoles(mesh=mesh, data=("pp", "dp"))
    assert roles.data_size == 4
    assert [roles.data_coordinates()[rank] for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert roles.data_coordinate == 2


def test_without_names_all_ranks_share_their_data(mesh: DeviceMesh) -> None:
    roles = MeshRoles(mesh=mesh)
    assert (roles.data_size, set(roles.data_coordinates().values())) == (1, {0})


@pytest.mark.parametrize(
    ("data", "pipeline", "message"),
    [(("ep",), (), "no dimension 'ep'; it has pp, dp, tp"), (("pp",), ("pp",), "cannot be both")],
)
def test_roles_that_cannot_be_are_refused(
    mesh: DeviceMesh, data: tuple[str, ...], pipeline: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshRoles(mesh=mesh, data=data, pipeline=pipeline)


def test_a_rank_outside_of_the_mesh_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ConfigError, match="not part of the mesh"):
        MeshRoles(mesh=DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp",)), data=("dp",))


def stage(mesh: DeviceMesh) -> Holders:
    """That of rank 5: ranks 4 to 7."""
    return MeshRoles(mesh=mesh, data=("dp",), pipeline=("pp",)).holders()


def test_a_plain_tensor_is_held_by_all_ranks_of_its_stage(mesh: DeviceMesh) -> None:
    assert stage(mesh).copies((5,)) == ((4,), (5,), (6,), (7,))
    everywhere = MeshRoles(mesh=mesh, data=("dp",)).holders()
    assert everywhere.copies((5,)) == tuple((rank,) for rank in range(8))


@pytest.mark.parametrize(
    ("ranks", "copies"),
    [
        ((4, 5), ((4, 5), (6, 7))),
        ((5, 7), ((4, 6), (5, 7))),
        ((7, 5), ((6, 4), (7, 5))),
        ((4, 5, 6, 7), ((4, 5, 6, 7),)),
        ((4, 7), ((4, 7),)),
        ((1, 5), ((1, 5),)),
        ((5, 8), ((5, 8),)),
    ],
    ids=["rows", "columns", "in another order", "all of it", "no slice", "across stages", "beyond the mesh"],
)
def test_what_a_part_of_a_stage_shards_the_other_parts_hold_copies_of(
    mesh: DeviceMesh, ranks: tuple[int, ...], copies: tuple[tuple[int, ...], ...]
) -> None:
    found = stage(mesh).copies(ranks)
    assert found == copies
    assert all(stage(mesh).copies(copy) == copies for copy in found), "whichever is asked"


def test_a_shared_parameter_is_held_by_all_stages_that_have_it(mesh: DeviceMesh) -> None:
    roles = MeshRoles(mesh=mesh, data=("dp",), pipeline=("pp",), shared={"embed.weight": (1, 0)})
    assert roles.holders("embed.weight").copies((5, 7)) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert roles.holders("other").copies((5, 7)) == ((4, 6), (5, 7))
    assert roles.holders("other") is roles.holders()


def test_a_parameter_that_is_shared_by_other_stages_is_refused(mesh: DeviceMesh) -> None:
    roles = MeshRoles(mesh=mesh, pipeline=("pp", "dp"), shared={"embed.weight": (0, 3)})
    with pytest.raises(StateError, match=r"stages 0, 3 have embed\.weight, and stage 2 has it, too"):
        roles.holders("embed.weight")


@pytest.mark.parametrize("stages", [(0,), (0, 0), (0, 2), (-1, 0)])
def test_stages_that_cannot_share_are_refused(mesh: DeviceMesh, stages: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="of 2 stage"):
        MeshRoles(mesh=mesh, pipeline=("pp",), shared={"embed.weight": stages})
