"""Ranks that find each other, talk, and leave; for test_join.py."""

import os
from pathlib import Path

from penstock.ranks.environment import end_with_launcher

end_with_launcher()

import torch  # noqa: E402

from penstock.embedding.collection import available_cores  # noqa: E402
from penstock.ranks.join import joined  # noqa: E402

LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def listening():
    """Addresses at which this process listens, as Linux prints them."""
    mine = set()
    for descriptor in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd", descriptor)
        if path.is_symlink():
            mine.add(os.readlink(path))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.add(fields[1].partition(":")[0])
    return found


with joined("cpu") as group:
    assert group.gathered(torch.tensor(group.rank + 1)).tolist() == [1, 2]
    assert group.gathered_bytes(b"x" * group.rank) == [b"", b"x"]
    total = torch.tensor([1.0, group.rank])
    group.add(total)
    assert total.tolist() == [2.0, 1.0]
    assert group.beside().gathered(torch.tensor(7)).tolist() == [7, 7]
    assert group.tables.part == (group.rank, 2)
    assert listening() <= LOOPBACK, listening()
    assert available_cores() == max(1, len(os.sched_getaffinity(0)) // 2)
assert not torch.distributed.is_initialized()
