"""Saves and loads on a real S3 server, with the latency and the bandwidth per connection of a network.

    python benchmarks/s3.py --json out.json

Starts the server (SeaweedFS on loopback), a proxy in front of it that delays, limits and counts, and a
torchrun of `s3_ranks.py`, and ends all of them. NOTES.md says how each number is defined.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import Answers, Handler, run_job
from benchmarks.pss import Sampler
from dcp_ckpt.testing import fault_proxy, proxy_faults, s3_server

__all__ = ["main"]

BUCKET = "checkpoints"
LATENCY_SECONDS = 0.040
BYTES_PER_SECOND = 20e6
_QUIET_SECONDS = 0.3
_MOST_SECONDS = 10.0
_JOB_SECONDS = 1800.0
_RANKS_PROGRAM = Path(__file__).with_name("s3_ranks.py")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags; see `--help`."""

    num_ranks: int
    size_mib: int
    rounds: int
    json: Path | None


class Watcher:
    """What the ranks ask of this process: the proxy's log, and the memory of processes."""

    def __init__(self, proxy: fault_proxy.FaultProxy) -> None:
        self._proxy = proxy
        self._sampler: Sampler | None = None
        self._num_writers = 0
        self.handlers: dict[str, Handler] = {
            "forget": self._proxy.reset_log,
            "counts": self._counts,
            "weigh": self._weigh,
            "weighed": self._weighed,
        }

    def _counts(self) -> Mapping[str, float]:
        """Requests by kind, and the bytes of the ranges that were asked for; once no more come, then forget.

        Without the leases, which a run renews all the time.
        """
        start = changed = time.monotonic()
        num_requests = -1
        while time.monotonic() - changed < _QUIET_SECONDS and time.monotonic() - start < _MOST_SECONDS:
            found = [item for item in self._proxy.requests() if not item.path.endswith(".lease")]
            if len(found) != num_requests:
                num_requests, changed = len(found), time.monotonic()
            time.sleep(_QUIET_SECONDS / 10)
        self._proxy.reset_log()
        counts: Counter[str] = Counter(str(item.kind) for item in found)
        counts["bytes"] = sum(_range_bytes(item) for item in found)
        return counts

    def _weigh(self, pids: list[int]) -> None:
        self._sampler = Sampler(pids, pids)

    def _weighed(self) -> float:
        assert self._sampler is not None, "something is weighed"
        return self._sampler.stop().writer_bytes


def _range_bytes(request: fault_proxy.Request) -> int:
    """Of a read of a part; 0 for others."""
    first, _, last = request.headers.get("range", "").removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1 if last else 0


def main() -> None:
    options = parse_options()
    link = proxy_faults.Link(
        latency_up_seconds=LATENCY_SECONDS / 2,
        latency_down_seconds=LATENCY_SECONDS / 2,
        bytes_per_second=BYTES_PER_SECOND,
    )
    settings = {"latency_seconds": LATENCY_SECONDS, "bytes_per_second_and_connection": BYTES_PER_SECOND}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-s3-") as directory,
        s3_server.S3Server() as server,
        fault_proxy.FaultProxy(server.endpoint_url, link=link) as proxy,
        Answers(Watcher(proxy).handlers) as answers,
    ):
        server.make_bucket(BUCKET)
        run_job(
            _RANKS_PROGRAM,
            [
                *("--url", f"s3://{BUCKET}", "--state-bytes", str(options.size_mib << 20)),
                *("--rounds", str(options.rounds), "--dir", directory, "--control", answers.address),
                *("--settings", json.dumps(settings)),
                *(("--json", str(options.json.resolve())) if options.json is not None else ()),
            ],
            num_ranks=options.num_ranks,
            deadline_seconds=_JOB_SECONDS,
            environment={**server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint_url},
        )


def parse_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="128 MiB and 2 rounds, for half a minute")
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--size-mib", type=int, help="of the state, over all ranks (default: 256)")
    parser.add_argument("--rounds", type=int, help="rounds that count (default: 7)")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    return Options(
        num_ranks=given.ranks,
        size_mib=given.size_mib or (128 if given.quick else 256),
        rounds=given.rounds or (2 if given.quick else 7),
        json=given.json,
    )


if __name__ == "__main__":
    main()
