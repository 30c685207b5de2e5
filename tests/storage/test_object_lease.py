"""Leases on S3: fresh while held, gone when given up, old soon after a kill; and those of orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from dcp_ckpt.errors import StorageNotFound
from dcp_ckpt.storage.objects.lease import LeaseTimes
from dcp_ckpt.storage.objects.opening import open_object_storage
from dcp_ckpt.storage.objects.retry import RetryPolicy
from dcp_ckpt.storage.objects.storage import ObjectStorage
from dcp_ckpt.testing.fault_proxy import FaultProxy, Request
from dcp_ckpt.testing.proxy_faults import SLOW_DOWN, Answer
from dcp_ckpt.writer.orphan import OrphanLease
from tests.eventually import eventually

KEY = "epochs/00000001.lease"
# S3 tells times in whole seconds.
TIMES = LeaseTimes(renew_seconds=0.3, expire_seconds=5.0)
WAIT_SECONDS = 30.0

HOLDER = f"""\
import sys, threading
from dcp_ckpt.storage.objects.lease import LeaseTimes
from dcp_ckpt.storage.objects.opening import open_object_storage
storage = open_object_storage(sys.argv[1], lease_times={TIMES!r})
lease = storage.hold_lease({KEY!r})
print("held", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy


@pytest.fixture
def opened(s3_prefix: str, proxy: FaultProxy) -> Iterator[Callable[[], ObjectStorage]]:
    storages: list[ObjectStorage] = []

    def open_it() -> ObjectStorage:
        retry = RetryPolicy(deadline_seconds=2.0)
        storages.append(open_object_storage(s3_prefix, retry=retry, lease_times=TIMES))
        return storages[-1]

    yield open_it
    proxy.set_faults()
    for storage in storages:
        storage.close()


@pytest.fixture
def storage(opened: Callable[[], ObjectStorage]) -> ObjectStorage:
    return opened()


def renewals(proxy: FaultProxy) -> list[Request]:
    return [request for request in proxy.requests() if request.kind == "PUT" and request.path.endswith(KEY)]


def wait_for_renewal(proxy: FaultProxy) -> None:
    num_renewals = len(renewals(proxy))
    assert eventually(lambda: len(renewals(proxy)) > num_renewals, timeout_seconds=WAIT_SECONDS)


def exists(storage: ObjectStorage) -> bool:
    try:
        storage.size(KEY)
    except StorageNotFound:
        return False
    return True


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def test_a_lease_stays_fresh_while_it_is_held_and_goes_with_close(opened, proxy):
    holder, observer = opened(), opened()
    assert not observer.lease_is_held(KEY)
    lease = holder.hold_lease(KEY)
    assert observer.lease_is_held(KEY)
    started = time.monotonic()
    outlived = TIMES.expire_seconds + 1.5
    while time.monotonic() - started < outlived:
        wait_for_renewal(proxy)
        assert observer.lease_is_held(KEY)
    lease.close()
    assert not observer.lease_is_held(KEY)
    assert not exists(observer)
    num_renewals = len(renewals(proxy))
    lease.close()
    assert len(renewals(proxy)) == num_renewals, "nothing is renewed after the end"


def test_the_lease_of_a_killed_holder_runs_out(storage, s3_prefix):
    with process(sys.executable, "-c", HOLDER, s3_prefix) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert storage.lease_is_held(KEY)
        holder.send_signal(signal.SIGKILL)
        holder.wait(WAIT_SECONDS)
        killed = time.monotonic()
    assert storage.lease_is_held(KEY), "its last renewal was just now"
    assert eventually(lambda: not storage.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)
    assert time.monotonic() - killed < TIMES.expire_seconds + 5.0
    assert exists(storage), "nobody gave it up"


def test_the_age_of_a_lease_is_told_by_the_store(storage, monkeypatch):
    with storage.hold_lease(KEY):
        for offset in (-1e6, 1e6):
            now = time.time() + offset
            monkeypatch.setattr(time, "time", lambda now=now: now)
            assert storage.lease_is_held(KEY)
            monkeypatch.undo()


def test_one_of_several_holders_may_go(opened):
    observer = opened()
    first, second = opened().hold_lease(KEY), opened().hold_lease(KEY)
    first.close()
    # Whoever wrote last removes the object when it goes; the other one writes it again.
    assert eventually(lambda: observer.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)
    third = opened().hold_lease(KEY)
    third.close()
    assert eventually(lambda: observer.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)
    second.close()
    assert not observer.lease_is_held(KEY)


def test_a_renewal_that_fails_is_made_up_for(storage, proxy, caplog):
    with storage.hold_lease(KEY):
        proxy.set_faults(lambda arrival: Answer(status=403, code="AccessDenied"))
        assert eventually(lambda: "was not renewed" in caplog.text, timeout_seconds=WAIT_SECONDS)
        proxy.set_faults()
        wait_for_renewal(proxy)
        assert storage.lease_is_held(KEY)


def test_a_lease_that_the_store_does_not_take_at_once_comes_later(storage, proxy, caplog):
    proxy.set_faults(lambda arrival: SLOW_DOWN)
    with storage.hold_lease(KEY):
        assert "a lease is not there yet" in caplog.text
        proxy.set_faults()
        assert eventually(lambda: storage.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)


def test_a_lease_that_cannot_be_given_up_is_left_to_run_out(storage, proxy, caplog):
    lease = storage.hold_lease(KEY)
    proxy.set_faults(lambda arrival: Answer(status=403, code="AccessDenied"))
    lease.close()
    assert "could not be given up" in caplog.text
    proxy.set_faults()
    assert eventually(lambda: not storage.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)


@pytest.fixture
def trainer() -> Iterator[subprocess.Popen[str]]:
    """A process that does nothing until it is killed."""
    with process(sys.executable, "-c", "import threading; threading.Event().wait()") as running:
        yield running


@pytest.fixture
def trainer_pidfd(trainer: subprocess.Popen[str]) -> Iterator[int]:
    descriptor = os.pidfd_open(trainer.pid)
    yield descriptor
    os.close(descriptor)


def test_a_writer_holds_no_lease_while_its_trainer_lives(storage, proxy, trainer, trainer_pidfd):
    for _ in range(3):
        with OrphanLease(storage, KEY, trainer=trainer_pidfd):
            assert trainer.poll() is None
    assert not proxy.requests(), "a job costs no request for it"


def test_a_writer_holds_the_lease_from_the_death_of_its_trainer(storage, proxy, trainer, trainer_pidfd):
    with OrphanLease(storage, KEY, trainer=trainer_pidfd):
        assert not renewals(proxy)
        trainer.kill()
        assert eventually(lambda: len(renewals(proxy)) > 3, timeout_seconds=WAIT_SECONDS)
        assert storage.lease_is_held(KEY)
    num_renewals = len(renewals(proxy))
    assert eventually(lambda: not storage.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)
    assert len(renewals(proxy)) == num_renewals


def test_several_orphans_hold_until_the_last_has_finished(opened, proxy, trainer, trainer_pidfd):
    observer = opened()
    trainer.kill()
    with OrphanLease(opened(), KEY, trainer=trainer_pidfd):
        with OrphanLease(opened(), KEY, trainer=trainer_pidfd):
            assert eventually(lambda: observer.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)
        assert observer.lease_is_held(KEY), "not even for a moment it is gone"
        wait_for_renewal(proxy)
    assert eventually(lambda: not observer.lease_is_held(KEY), timeout_seconds=WAIT_SECONDS)


def test_an_orphan_without_its_store_finishes_all_the_same(storage, proxy, trainer, trainer_pidfd):
    proxy.set_faults(lambda arrival: Answer(status=403, code="AccessDenied"))
    trainer.kill()
    with OrphanLease(storage, KEY, trainer=trainer_pidfd):
        assert eventually(lambda: bool(renewals(proxy)), timeout_seconds=WAIT_SECONDS)


def test_closing_the_storage_ends_the_renewals_of_what_is_held_still(opened, proxy):
    holder = opened()
    lease = holder.hold_lease(KEY)
    holder.close()
    num_renewals = len(renewals(proxy))
    assert not [thread for thread in threading.enumerate() if thread.name == "dcp_ckpt-lease"]
    lease.close()
    assert len(renewals(proxy)) == num_renewals
    assert opened().lease_is_held(KEY), "it was not given up: it runs out"
