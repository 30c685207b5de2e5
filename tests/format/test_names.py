"""Names: one spelling for each thing, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_ckpt.format.names import (
    AttemptId,
    StepDir,
    data_file_name,
    epoch_name,
    fragment_name,
    lease_name,
    parse_data_file_name,
    parse_epoch_name,
    parse_fragment_name,
    parse_lease_name,
    parse_run_name,
    resumed_name,
    run_name,
)

numbers = st.one_of(st.integers(0, 200), st.integers(0, 10**12))
positive = numbers.map(lambda number: number + 1)
attempts = st.builds(AttemptId, positive, positive)
directories = st.builds(StepDir, numbers, st.none() | positive)


def test_names_are_those_of_the_specification():
    attempt = AttemptId(3, 7)
    assert str(attempt) == "e0003-s000007"
    assert str(StepDir(1000)) == "step-00001000"
    assert str(StepDir(1000, 4)) == "step-00001000.e4"
    assert fragment_name(3, attempt) == "rank-00003.e0003-s000007.json"
    assert data_file_name(3, 0, attempt) == "__3_0.e0003-s000007.distcp"
    assert (epoch_name(3), lease_name(3)) == ("00000003.json", "00000003.lease")
    assert resumed_name(3) == "00000003.resumed.json"
    assert run_name(1) == "run-001"


@given(attempts, directories, numbers, numbers)
def test_what_is_written_is_read_back(attempt, directory, rank, index):
    assert AttemptId.parse(str(attempt)) == attempt
    assert StepDir.parse(str(directory)) == directory
    assert parse_fragment_name(fragment_name(rank, attempt)) == (rank, attempt)
    assert parse_data_file_name(data_file_name(rank, index, attempt)) == (rank, index, attempt)
    assert parse_epoch_name(epoch_name(index)) == index
    assert parse_lease_name(lease_name(index)) == index
    assert parse_run_name(run_name(index)) == index


@given(st.lists(st.tuples(directories, attempts), min_size=2, max_size=2))
def test_order_is_that_of_the_numbers(pairs):
    (first, first_attempt), (second, second_attempt) = pairs
    assert (first < second) == ((first.step, first.epoch or 0) < (second.step, second.epoch or 0))
    assert (first_attempt < second_attempt) == (
        (first_attempt.epoch, first_attempt.save) < (second_attempt.epoch, second_attempt.save)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step-1",
        "step-000000001",
        "step-00000001.e0",
        "step-00000001.e01",
        "step-00000001.",
        "step-00000001/",
        "step-00000001\n",
        " step-00000001",
        "step-0000000\N{FULLWIDTH DIGIT ONE}",
        "step--0000001",
        "Step-00000001",
        "step-00000001.e2.e3",
        "../step-00000001",
        "step-00000001.0123456789abcdef",
    ],
)
def test_other_spellings_are_no_step(text):
    assert StepDir.parse(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "e1-s1",
        "e00001-s000001",
        "e0001-s0000001",
        "e0001-s000001\n",
        "e0001_s000001",
        "e0001-s00000\N{SUPERSCRIPT ONE}",
    ],
)
def test_other_spellings_are_no_attempt(text):
    assert AttemptId.parse(text) is None
    assert parse_fragment_name(f"rank-00000.{text}.json") is None
    assert parse_data_file_name(f"__0_0.{text}.distcp") is None


@pytest.mark.parametrize(
    "text",
    [
        "rank-0.e0001-s000001.json",
        "rank-000000.e0001-s000001.json",
        "rank-00000.e0001-s000001.json.bak",
        ".rank-00000.e0001-s000001.json",
        "__00_0.e0001-s000001.distcp",
        "__0_00.e0001-s000001.distcp",
        "__0_0.e0001-s000001.distcp~",
        "a/__0_0.e0001-s000001.distcp",
        "__0_0.distcp",
        ".metadata",
        "manifest.json",
    ],
)
def test_other_files_are_neither_fragment_nor_data(text):
    assert parse_fragment_name(text) is None
    assert parse_data_file_name(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "1.json",
        "000000001.json",
        "00000001.resumed.json",
        "00000001.jsonx",
        "00000001",
        "1.lease",
        "run-1",
        "run-0001",
    ],
)
def test_other_spellings_are_no_epoch_and_no_run(text):
    assert parse_epoch_name(text) is None
    assert parse_lease_name(text) is None
    assert parse_run_name(text) is None
