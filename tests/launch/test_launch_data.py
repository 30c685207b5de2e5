"""The driver's data: the same text everywhere, every sample once, on any number of ranks."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from launch.data import IGNORED, Corpus, FillUp, TextLoader, Windows, read_corpus


@pytest.fixture
def sources(tmp_path):
    for name, text in {
        "b.py": "bbbb",
        "a/z.py": "zz",
        "a/test/t.py": "no",
        "site-packages/s.py": "no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "c.txt").write_text("no")
    return tmp_path


def text_of(tensor: torch.Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def test_corpus_is_the_sources_in_order_of_path(sources):
    corpus = read_corpus(sources, validation_fraction=0.5)
    assert (text_of(corpus.train), text_of(corpus.validation)) == ("zzb", "bbb")
    assert text_of(read_corpus(sources, max_bytes=3, validation_fraction=0).train) == "zzb"


def test_fingerprint_tells_texts_apart(sources):
    before = read_corpus(sources).fingerprint
    assert before == read_corpus(sources).fingerprint
    (sources / "b.py").write_text("bbbc")
    assert before != read_corpus(sources).fingerprint


def test_corpus_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        read_corpus(tmp_path)


def test_this_python_has_enough_text():
    corpus = read_corpus()
    assert len(corpus.train) > 1 << 20
    assert len(corpus.validation) > 1 << 16


def test_targets_are_the_inputs_one_byte_later():
    windows = Windows(torch.arange(11, dtype=torch.uint8), context=5)
    assert len(windows) == 2
    inputs, targets = FillUp(num_rows=1, context=5)(windows.samples([1]))
    assert inputs.tolist() == [[5, 6, 7, 8, 9]]
    assert targets.tolist() == [[6, 7, 8, 9, 10]]


def test_what_a_part_is_filled_up_with_counts_nothing():
    windows = Windows(torch.arange(11, dtype=torch.uint8), context=5)
    for indices in ([], [1], [0, 1]):
        inputs, targets = FillUp(num_rows=3, context=5)(windows.samples(indices))
        assert inputs.shape == targets.shape == (3, 5)
        assert (targets[: len(indices)] == inputs[: len(indices)] + 1).all()
        assert (targets[len(indices) :] == IGNORED).all()


def loader(
    rank: int, world_size: int, *, batch_size: int, num_micro_batches: int = 1, num_workers: int = 0
) -> TextLoader:
    """Over the numbers 0 to 23, for training and for validation, one to a sample but the last."""
    text = torch.arange(24, dtype=torch.uint8)
    return TextLoader(
        Corpus(train=text, validation=text, fingerprint=""),
        context=1,
        global_batch_size=batch_size,
        num_micro_batches=num_micro_batches,
        rank=rank,
        world_size=world_size,
        seed=3,
        num_workers=num_workers,
    )


@pytest.mark.parametrize(
    ("batch_size", "world_size", "num_micro_batches", "rows"),
    [(16, 8, 1, 2), (10, 3, 1, 4), (10, 3, 3, 6), (8, 2, 4, 4), (2, 2, 4, 4)],
)
def test_rows_hold_the_largest_part_in_equal_micro_batches(batch_size, world_size, num_micro_batches, rows):
    text = loader(0, world_size, batch_size=batch_size, num_micro_batches=num_micro_batches)
    assert text.num_rows == rows
    for batch in (*islice(text.training(), 15), *text.validation(15)):
        assert batch.inputs.shape == batch.targets.shape == (rows, 1)


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_an_epoch_has_every_sample_once_on_any_world(world_size):
    ranks = [loader(rank, world_size, batch_size=5).training() for rank in range(world_size)]
    seen = []
    for parts in zip(*(islice(rank, 5) for rank in ranks), strict=True):
        assert all(part.sample_ids == parts[0].sample_ids for part in parts)
        seen += [int(value) for part in parts for value in part.inputs[part.targets != IGNORED]]
    assert sorted(seen) == list(range(23))


def test_workers_change_no_batch_and_the_position_is_that_of_the_training():
    alone, helped = (loader(0, 1, batch_size=5, num_workers=number) for number in (0, 2))
    with helped.loader:
        for own, theirs, _ in zip(alone.training(), helped.training(), range(7), strict=False):
            assert torch.equal(own.inputs, theirs.inputs)
            assert torch.equal(own.targets, theirs.targets)
            assert own.sample_ids == theirs.sample_ids
            assert own.num_tokens == theirs.num_tokens == len(own.sample_ids)
            assert alone.loader.state_dict() == helped.loader.state_dict()


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_validation_is_the_same_at_every_call_and_on_any_world(world_size):
    ranks = [loader(rank, world_size, batch_size=10) for rank in range(world_size)]

    def inputs() -> list[int]:
        found = []
        for rank in ranks:
            for batch in rank.validation(9):
                found += batch.inputs[batch.targets != IGNORED].tolist()
        return sorted(found)

    assert inputs() == inputs() == list(range(23))
