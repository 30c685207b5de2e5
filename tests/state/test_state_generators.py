"""The global generators: read and set exactly, those of accelerators without ever beginning to use one."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy
import torch

from dcp_ckpt.state.generators import (
    HOST_KINDS,
    live_kinds,
    read_stream,
    seed_host_streams,
    seed_stream,
    undisturbed_streams,
    write_stream,
)

# torch lets a backend in Python stand for an accelerator: three devices with one generator each.
ACCELERATOR = """
import torch
from torch.utils import backend_registration

class Toy:
    def __init__(self, current):
        self.started, self.current = False, current
        self.generators = [torch.Generator() for _ in range(3)]
    def is_available(self): return True
    def is_initialized(self): return self.started
    def current_device(self):
        self.started = True
        return self.current
    def device_count(self): return 3
    def _index(self, device):
        self.started = True
        return self.current if device == "toy" else device
    def get_rng_state(self, device): return self.generators[self._index(device)].get_state()
    def set_rng_state(self, state, device): self.generators[self._index(device)].set_state(state)
    def _is_in_bad_fork(self): return False
    def manual_seed_all(self, seed):
        self.started = True
        [generator.manual_seed(seed) for generator in self.generators]
    def draw(self): return [torch.rand((), generator=generator).item() for generator in self.generators]

toy = Toy(current=0)
backend_registration._setup_privateuseone_for_python_backend("toy", backend_module=toy)
from dcp_ckpt.state.generators import *

assert "toy" not in live_kinds()
with undisturbed_streams():
    pass
unused = {"current": b"", "others": {}}
assert write_stream("toy", unused) == "toy is not in use here yet"
seed_stream("toy", bytes(32))
assert not toy.started, "an accelerator that is not in use stays so"

toy.started = True
for index, generator in enumerate(toy.generators):
    generator.manual_seed(index)
assert live_kinds()[-1] == "toy"
state = read_stream("toy")
first, second, third = toy.draw()
assert write_stream("toy", state) is None
assert toy.draw() == [first, second, third]
toy.current = 2
assert write_stream("toy", state) is None
assert toy.draw()[1:] == [second, first], "the stream of the device that was used goes to the one that is"
with undisturbed_streams():
    expected = toy.draw()
assert toy.draw() == expected
assert stream_identity("toy", state) == state["current"]
seed_stream("toy", bytes(31) + b"1")
seeded = toy.draw()
assert len(set(seeded)) == 1
assert write_stream("other", state) == "there is no other device here"
print("done")
"""


def draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(numpy.random.randn()), torch.randn(1).item()


def test_accelerators_are_read_and_set_when_they_are_in_use_and_never_before() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", ACCELERATOR],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


def test_a_stream_is_set_where_another_stood() -> None:
    with undisturbed_streams():
        draw()  # leaves half a pair of gaussians behind
        states = {kind: read_stream(kind) for kind in live_kinds()}
        assert set(states) >= set(HOST_KINDS)
        expected = draw(), draw()
        for kind, state in states.items():
            assert write_stream(kind, state) is None
        assert (draw(), draw()) == expected


def test_what_runs_undisturbed_changes_no_stream() -> None:
    states = {kind: read_stream(kind) for kind in HOST_KINDS}
    with undisturbed_streams(HOST_KINDS):
        draw()
        seed_host_streams(5)
    assert [repr(read_stream(kind)) for kind in HOST_KINDS] == [repr(states[kind]) for kind in HOST_KINDS]


def test_seeds_give_streams_that_repeat_and_differ() -> None:
    with undisturbed_streams():
        drawn = []
        for number in (1, 2, 1):
            for kind in HOST_KINDS:
                seed_stream(kind, bytes([number]) * 32)
            drawn.append(draw())
        assert drawn[0] == drawn[2]
        assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))
        seed_host_streams(2**62 + 5)
        first = draw()
        assert torch.initial_seed() == 2**62 + 5
        seed_host_streams(2**62 + 5)
        assert draw() == first
