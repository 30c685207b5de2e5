"""The model of a disk: what was synced is always there, what was not may be there in every way it claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_ckpt.testing.volatile_disk import NUM_EXTREMES, PAGE_BYTES, ROOT, VolatileDisk

SEEDS = range(200)
FILE, OTHER, DIRECTORY, SECOND = 1, 2, 3, 4


@pytest.fixture
def disk() -> VolatileDisk:
    return VolatileDisk()


def outcomes(disk: VolatileDisk, directory: Path) -> set[tuple[tuple[str, bytes | None], ...]]:
    """All trees that some seed leaves behind: names, and the content of files."""
    found = set()
    directory.mkdir(exist_ok=True)
    for seed in SEEDS:
        target = directory / str(seed)
        disk.write_out(target, seed=seed)
        found.add(
            tuple(
                (path.relative_to(target).as_posix(), None if path.is_dir() else path.read_bytes())
                for path in sorted(target.rglob("*"))
            )
        )
    return found


def names(disk: VolatileDisk, directory: Path) -> set[tuple[str, ...]]:
    return {tuple(name for name, _ in tree) for tree in outcomes(disk, directory)}


def test_what_was_synced_is_always_there(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.make_directory(DIRECTORY, ROOT, "d")
    disk.create(FILE, DIRECTORY, "f")
    disk.write(FILE, 0, b"content")
    for node in (FILE, DIRECTORY, ROOT):
        disk.sync(node)
    assert outcomes(disk, tmp_path) == {(("d", None), ("d/f", b"content"))}


def test_a_file_needs_its_directory_synced_too(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.create(FILE, ROOT, "f")
    disk.write(FILE, 0, b"content")
    disk.sync(FILE)
    assert outcomes(disk, tmp_path) == {(), (("f", b"content"),)}


def test_a_directory_needs_its_parent_synced_too(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.make_directory(DIRECTORY, ROOT, "d")
    disk.create(FILE, DIRECTORY, "f")
    disk.sync(DIRECTORY)
    assert names(disk, tmp_path) == {(), ("d", "d/f")}


def test_an_unsynced_page_is_new_old_zero_or_garbage(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.create(FILE, ROOT, "f")
    disk.write(FILE, 0, b"o" * (2 * PAGE_BYTES))
    disk.sync(FILE)
    disk.sync(ROOT)
    disk.write(FILE, PAGE_BYTES, b"n" * PAGE_BYTES)
    contents = [tree[0][1] for tree in outcomes(disk, tmp_path)]
    assert all(content is not None and len(content) == 2 * PAGE_BYTES for content in contents)
    assert {content[:PAGE_BYTES] for content in contents if content} == {b"o" * PAGE_BYTES}
    pages = {content[PAGE_BYTES:] for content in contents if content}
    known = {fill * PAGE_BYTES for fill in (b"o", b"n", b"\0")}
    assert known < pages, "garbage is missing, or one of the others"


def test_an_unsynced_file_may_have_any_size_that_it_had(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.create(FILE, ROOT, "f")
    disk.sync(ROOT)
    disk.write(FILE, 0, b"x" * 5000)
    disk.truncate(FILE, 100)
    sizes = {len(tree[0][1] or b"") for tree in outcomes(disk, tmp_path)}
    assert {0, 100, 5000} < sizes, "sizes in between belong to it"
    assert max(sizes) == 5000


def test_changes_of_different_names_are_on_the_disk_in_any_combination(
    disk: VolatileDisk, tmp_path: Path
) -> None:
    disk.create(FILE, ROOT, "a")
    disk.create(OTHER, ROOT, "b")
    assert names(disk, tmp_path) == {(), ("a",), ("b",), ("a", "b")}


def test_changes_of_one_name_come_in_their_order(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.create(FILE, ROOT, "f")
    disk.write(FILE, 0, b"first")
    disk.sync(FILE)
    disk.sync(ROOT)
    disk.remove(ROOT, "f")
    disk.create(OTHER, ROOT, "f")
    disk.write(OTHER, 0, b"second")
    disk.sync(OTHER)
    assert outcomes(disk, tmp_path) == {(("f", b"first"),), (), (("f", b"second"),)}


def test_a_rename_within_a_directory_is_one_change(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.create(FILE, ROOT, "draft")
    disk.sync(ROOT)
    disk.rename(ROOT, "draft", ROOT, "final")
    assert names(disk, tmp_path) == {("draft",), ("final",)}


def test_a_rename_to_another_directory_may_leave_both_names_and_never_none(
    disk: VolatileDisk, tmp_path: Path
) -> None:
    disk.make_directory(DIRECTORY, ROOT, "a")
    disk.make_directory(SECOND, ROOT, "b")
    disk.create(FILE, DIRECTORY, "f")
    disk.sync_all()
    disk.rename(DIRECTORY, "f", SECOND, "f")
    assert names(disk, tmp_path / "1") == {("a", "a/f", "b"), ("a", "a/f", "b", "b/f"), ("a", "b", "b/f")}
    disk.sync(DIRECTORY)
    assert names(disk, tmp_path / "2") == {("a", "b", "b/f")}


def test_names_of_one_file_share_what_is_left_of_it(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.create(FILE, ROOT, "a")
    disk.link(FILE, ROOT, "b")
    disk.sync(ROOT)
    disk.write(FILE, 0, b"x" * PAGE_BYTES)
    for tree in outcomes(disk, tmp_path):
        (_, first), (_, second) = tree
        assert first == second


def test_a_later_sync_says_nothing_about_what_one_failed_to_sync(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.create(FILE, ROOT, "f")
    disk.write(FILE, 0, b"x")
    disk.fail_sync(FILE)
    disk.fail_sync(ROOT)
    disk.sync(FILE)
    disk.sync(ROOT)
    left = outcomes(disk, tmp_path)
    assert {(), (("f", b""),), (("f", b"x"),)} <= left


def test_a_name_that_is_changed_again_is_durable_when_synced(disk: VolatileDisk, tmp_path: Path) -> None:
    disk.make_directory(DIRECTORY, ROOT, "d")
    disk.fail_sync(ROOT)
    disk.remove(ROOT, "d")
    disk.make_directory(SECOND, ROOT, "d")
    disk.sync(ROOT)
    assert names(disk, tmp_path) == {("d",)}


@pytest.mark.parametrize("seed", [*range(NUM_EXTREMES), 50, 51])
def test_a_seed_always_leaves_the_same(disk: VolatileDisk, tmp_path: Path, seed: int) -> None:
    for node in range(1, 9):
        disk.create(node, ROOT, f"f{node}")
        disk.write(node, 0, bytes([node]) * 9000)
    for attempt in ("first", "second"):
        disk.write_out(tmp_path / attempt, seed=seed)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / attempt).iterdir()}
        for attempt in ("first", "second")
    )
    assert first == second
