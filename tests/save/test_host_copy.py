"""Copies into host memory: all of them are there when the call returns, from whichever device they come."""

from __future__ import annotations

import pytest
import torch

from dcp_ckpt.save.arena import Arena
from dcp_ckpt.save.host_copy import copy_to_host

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_all_bytes_are_there_when_the_call_returns(device: str) -> None:
    sources = [torch.full((1 << 20,), 0.0, device=device), torch.arange(7, device=device)]
    for _ in range(50):
        sources[0].add_(1.0)
    views = [torch.zeros(1 << 20), torch.zeros(7, dtype=torch.int64)]
    copy_to_host(views, sources)
    assert bool((views[0] == 50.0).all())
    assert views[1].tolist() == list(range(7))


@needs_gpu
def test_an_arena_is_pinned_once_and_not_for_ever() -> None:
    with Arena(1 << 20, require=lambda num_bytes: None) as arena:
        memory = arena.bytes
        arena.pin_for([torch.ones(1)])
        assert not memory.is_pinned()
        arena.pin_for([torch.ones(1, device="cuda")])
        arena.pin_for([torch.ones(1, device="cuda")])
        assert memory.is_pinned()
    assert not memory.is_pinned()


@needs_gpu
def test_pages_that_are_given_back_are_not_copied_to_any_more() -> None:
    with Arena(1 << 20, require=lambda num_bytes: None) as arena:
        arena.pin_for([torch.ones(1, device="cuda")])
        arena.discard()
        copy_to_host([arena.bytes], [torch.ones(arena.size_bytes, dtype=torch.uint8, device="cuda")])
        assert bool((arena.bytes == 1).all())
