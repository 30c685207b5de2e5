"""What is saved and trained: states whose bytes follow from their names, and a training step over them.

Knows no checkpointing system. Contents are made in blocks of rows, so that every layout of the same state can
be checked block by block against digests of the first one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from benchmarks.measure import WrongBytes

__all__ = ["Digests", "State", "TrainingStep", "buffer_of", "replicated_state", "sharded_state"]

NUM_TENSORS = 48
COLUMNS = 1024
ROW_BYTES = COLUMNS * 4
BATCH = 8

Digests = Mapping[tuple[int, int], str]
"""Tensor and block -> digest of the block's bytes."""


class State:
    """The tensors of one rank, with their contents: the parameters of a model, and all that is saved of it.

    Args:
        tensors: in order; none on a rank outside of the layout.
        first_block: number of this rank's first block of rows, the same for all tensors.
        block_rows: rows of a block.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, first_block: int, block_rows: int) -> None:
        self.model = nn.Module()
        for number, tensor in enumerate(tensors):
            self.model.register_parameter(f"weight_{number}", nn.Parameter(tensor))
        # Without momentum: it adds no tensors. One that optimizes nothing is refused.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1) if tensors else None
        self.tensors: dict[str, torch.Tensor] = dict(self.model.state_dict())
        self.locals = [
            tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in self.tensors.values()
        ]
        self.local_bytes = sum(tensor.nbytes for tensor in self.locals)
        self._first_block = first_block
        self._block_rows = block_rows

    def fill(self) -> None:
        """Put the contents there that the digests are of."""
        for number, tensor in enumerate(self.locals):
            for block, rows in self._blocks(tensor):
                rows.normal_(generator=torch.Generator().manual_seed(number * 1000 + block))

    def update(self) -> None:
        """Change every element in place, as an optimizer does; twice gives the old contents again."""
        torch._foreach_neg_(self.locals)

    def scramble(self) -> None:
        """Make sure that a load that does nothing is found out."""
        for tensor in self.locals:
            tensor.fill_(float("nan"))

    def digests(self) -> dict[tuple[int, int], str]:
        return {
            (number, block): xxhash.xxh3_128_hexdigest(buffer_of(rows))
            for number, tensor in enumerate(self.locals)
            for block, rows in self._blocks(tensor)
        }

    def check(self, expected: Digests, system: str) -> None:
        """Compare every byte of this rank.

        Raises:
            WrongBytes: with the first block that differs.
        """
        for (number, block), found in self.digests().items():
            if found != expected[number, block]:
                raise WrongBytes(
                    f"{system} loaded other bytes than were saved: tensor {number}, block {block}"
                )

    def _blocks(self, tensor: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        starts = range(0, len(tensor), self._block_rows)
        return [
            (self._first_block + index, tensor[start : start + self._block_rows])
            for index, start in enumerate(starts)
        ]


def sharded_state(state_bytes: int, worlds: Sequence[int], ranks: Sequence[int]) -> State:
    """DTensors sharded on dimension 0, as FSDP2 makes them; called on all ranks, also those outside.

    Args:
        state_bytes: of all ranks together, about.
        worlds: sizes of all layouts of this state; each divides the number of blocks.
        ranks: the global ranks that hold it, from 0.
    """
    num_blocks = math.lcm(*worlds)
    block_rows = max(1, state_bytes // (NUM_TENSORS * ROW_BYTES * num_blocks))
    mesh = DeviceMesh("cpu", list(ranks))
    if dist.get_rank() not in ranks:
        return State([], first_block=0, block_rows=block_rows)
    local_blocks = num_blocks // len(ranks)
    tensors = [
        DTensor.from_local(torch.empty(local_blocks * block_rows, COLUMNS), mesh, [Shard(0)], run_check=False)
        for _ in range(NUM_TENSORS)
    ]
    return State(tensors, first_block=dist.get_rank() * local_blocks, block_rows=block_rows)


def replicated_state(state_bytes: int) -> State:
    """Plain tensors, equal on all ranks, as DDP has them; `state_bytes` on each rank, about."""
    rows = max(1, state_bytes // (NUM_TENSORS * ROW_BYTES))
    tensors = [torch.empty(rows, COLUMNS) for _ in range(NUM_TENSORS)]
    return State(tensors, first_block=0, block_rows=rows)


class TrainingStep:
    """A forward and backward through all local tensors of a state; reads them, writes only gradients.

    Gradients are dropped at once, so that the step needs no memory worth counting.
    """

    def __init__(self, state: State) -> None:
        self.num_passes = 1
        self._weights = [tensor.detach().requires_grad_() for tensor in state.locals]
        self._inputs = torch.randn(BATCH, COLUMNS, generator=torch.Generator().manual_seed(1))

    def run(self) -> None:
        for _ in range(self.num_passes):
            for weight in self._weights:
                loss = F.linear(self._inputs, weight).square().mean()
                torch.autograd.grad(loss, weight)

    def last_at_least(self, wanted_seconds: float, measure: Callable[[Callable[[], object]], float]) -> None:
        """Choose the number of passes; `measure` gives the time of the slowest rank."""
        self.run()
        pass_seconds = min(measure(self.run) for _ in range(3))
        self.num_passes = max(1, math.ceil(wanted_seconds / pass_seconds))


def buffer_of(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous tensor, for calls that take a buffer; valid while the tensor lives."""
    assert tensor.is_contiguous()
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
