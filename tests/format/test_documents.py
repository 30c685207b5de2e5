"""Documents are decoded by many threads at once, from the first one on."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, threading
from dataclasses import make_dataclass
import msgspec
from dcp_ckpt.format.documents import decode_document
from dcp_ckpt.format.fields import Count, Version

sys.setswitchinterval(1e-6)
for number in range(100):
    inner = make_dataclass("Inner", [(f"field{n}", int) for n in range(5)])
    fields = [("format", str), ("format_version", Version)]
    fields += [("items", list[inner]), ("counts", dict[str, Count])]
    outer = make_dataclass("Outer", fields)
    inner.__module__ = outer.__module__ = __name__
    item = {f"field{n}": n for n in range(5)}
    content = {"format": "x", "format_version": 1, "items": [item], "counts": {}}
    data = msgspec.json.encode(content, order="sorted")
    start, found = threading.Barrier(6), []

    def decode():
        start.wait()
        found.append(decode_document(data, outer, format="x", path="p"))

    threads = [threading.Thread(target=decode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(one == found[0] for one in found)
print("done")
"""


def test_several_threads_may_be_the_first_to_decode_a_type() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
