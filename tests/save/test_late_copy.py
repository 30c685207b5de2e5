"""Late copies: the bytes of the moment, or an error that names what did not stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.save.late_copy import LateCopy, LateTensor, can_be_late
from dcp_ckpt.state.placements import local_tensor

Change = Callable[[Any], object]


def late(
    live: torch.Tensor, *, part: tuple[slice, ...] | None = None, is_sampled: bool = False
) -> LateTensor:
    local = local_tensor(live)
    shape = local.shape if part is None else local[part].shape
    view = torch.zeros(shape, dtype=local.dtype)
    return LateTensor(name="net.weight", live=live, local=local, is_sampled=is_sampled, parts=[(part, view)])


def view_of(tensor: LateTensor) -> torch.Tensor:
    return tensor.parts[0][1]


def go_on() -> bool:
    return True


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.arange(12.0).reshape(4, 3))


@pytest.fixture
def sharded() -> Iterator[Callable[[], nn.Parameter]]:
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, not in its __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda: nn.Parameter(distribute_tensor(torch.arange(12.0).reshape(4, 3), mesh, [Shard(0)]))
    dist.destroy_process_group()


def test_all_of_it_is_copied_and_sampled():
    whole, row = late(parameter(), is_sampled=True), late(parameter(), part=(slice(1, 2), slice(0, 3)))
    samples = LateCopy([whole, row]).run(go_on)
    assert torch.equal(view_of(whole), whole.local)
    assert torch.equal(view_of(row), whole.local[1:2])
    assert samples == {"net.weight": b'["float32",[4,3]]' + whole.local.numpy().tobytes()}


def test_what_only_reads_is_allowed():
    tensor = late(parameter())
    copy = LateCopy([tensor])
    (tensor.live * 2).sum().backward()
    tensor.live.detach().numpy().sum()
    assert copy.run(go_on) == {}
    assert torch.equal(view_of(tensor), tensor.local)


CHANGES: dict[str, Change] = {
    "add_": lambda t: t.add_(1.0),
    "copy_": lambda t: t.copy_(torch.ones_like(t)),
    "a row": lambda t: t[0].zero_(),
    "a detached alias": lambda t: t.detach().mul_(2.0),
}
PLAIN_CHANGES: dict[str, Change] = {
    "foreach": lambda t: torch._foreach_add_([t], 1.0),
    "set_": lambda t: t.set_(torch.ones(4, 3)),
    "data": lambda t: setattr(t, "data", torch.ones(4, 3)),
    "more storage": lambda t: t.untyped_storage().resize_(1 << 20),
    "no storage": lambda t: t.untyped_storage().resize_(0),
}
SHARDED_CHANGES: dict[str, Change] = {
    "the local part": lambda t: t.to_local().add_(1.0),
    "foreach of local parts": lambda t: torch._foreach_add_([t._local_tensor], 1.0),
    "another local part": lambda t: setattr(t, "_local_tensor", torch.ones(4, 3)),
}


def refuse(tensor: LateTensor, change: Change) -> None:
    copy = LateCopy([tensor])
    with torch.no_grad():
        change(tensor.live)
    with pytest.raises(SaveFailed, match=r"net\.weight.*fence\(\)") as caught:
        copy.run(go_on)
    assert caught.value.phase == "stage"
    assert not view_of(tensor).any(), "what was changed before is not even read"


@pytest.mark.parametrize("change", (CHANGES | PLAIN_CHANGES).values(), ids=CHANGES | PLAIN_CHANGES)
def test_a_change_is_found(change):
    refuse(late(parameter()), change)


@pytest.mark.parametrize("change", (CHANGES | SHARDED_CHANGES).values(), ids=CHANGES | SHARDED_CHANGES)
def test_a_change_of_a_shard_is_found(sharded, change):
    refuse(late(sharded()), change)


def test_a_change_during_the_copy_is_found():
    tensors = [late(parameter()), late(parameter())]

    def change_it() -> bool:
        with torch.no_grad():
            tensors[0].live.add_(1.0)
        return True

    with pytest.raises(SaveFailed, match=r"net\.weight;"):
        LateCopy(tensors).run(change_it)


def test_it_ends_when_the_save_has_failed():
    tensors = [late(torch.ones(9 << 20)) for _ in range(3)]
    LateCopy(tensors).run(lambda: False)
    assert [bool(view_of(tensor)[-1]) for tensor in tensors] == [True, False, False]


def test_memory_is_held_until_it_is_copied():
    live = parameter()
    tensor = late(live)
    expected = live.detach().clone()
    copy = LateCopy([tensor])
    del live
    copy.run(go_on)
    assert torch.equal(view_of(tensor), expected)


def test_tensors_without_a_version_are_not_late():
    with torch.inference_mode():
        unversioned = torch.ones(3)
    assert can_be_late(torch.ones(3))
    assert not can_be_late(unversioned)
    assert not can_be_late(torch.ones(3, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu_see_what_was_submitted_before_and_nothing_else():
    size = 32 << 20
    live = nn.Parameter(torch.zeros(size, device="cuda"))
    with torch.no_grad():
        for _ in range(50):
            live.add_(1.0)
    tensor = late(live, is_sampled=True)
    copy = LateCopy([tensor])
    work = live.detach() * 2
    samples = copy.run(go_on)
    assert bool((view_of(tensor) == 50.0).all())
    assert samples["net.weight"].endswith(torch.full((64,), 50.0).numpy().tobytes())
    assert work[-1].item() == 100.0
    refuse(late(live), CHANGES["add_"])
