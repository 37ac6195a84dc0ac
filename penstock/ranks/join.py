"""Makes the group of this process from what its launcher says in the environment.

`penstock train --nproc` and torchrun say it in the same variables; so does any launcher that sets
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from penstock.embedding.sharded.store import Ranks
from penstock.errors import ConfigError, GroupError
from penstock.ranks.environment import MEETING, whole_number
from penstock.ranks.group import ALONE, Group, Processes

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

RENDEZVOUS_S = 300.0
"""How long ranks wait for each other to start."""
COLLECTIVE_S = 1800.0
"""How long a rank waits for the others once all have met. One that ends is noticed at once; this is
for a machine that is gone, and must be longer than the slowest rank's part of a checkpoint.
"""


class Place(NamedTuple):
    """Which of the ranks this process is."""

    rank: int
    size: int
    local_rank: int | None
    """Among those of this machine; None: the launcher does not say."""


def place_of(environment: Mapping[str, str]) -> Place | None:
    """What a launcher's variables say; None: there is none, or it started one process alone.

    Raises:
      ConfigError: a variable is missing, no number, or does not fit the others.
    """
    size = whole_number(environment, "WORLD_SIZE")
    rank = whole_number(environment, "RANK")
    if size is None:
        if rank is not None:
            raise ConfigError(
                f"RANK is {rank}, but WORLD_SIZE is not set: a launcher sets both; unset RANK to "
                "train in one process"
            )
        return None
    if size < 1:
        raise ConfigError(f"WORLD_SIZE is {size}: it is the number of ranks, at least 1")
    if rank is None:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but RANK is not set: give each process its number from 0 to "
            f"{size - 1}, or unset WORLD_SIZE to train in one process"
        )
    if rank >= size:
        raise ConfigError(
            f"RANK is {rank} of WORLD_SIZE {size}: ranks are numbered from 0 to {size - 1}"
        )
    if size == 1:
        return None
    return Place(rank, size, whole_number(environment, "LOCAL_RANK"))


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group of this process, while the block runs.

    Where the block ends well, all ranks leave together; where it raises, the caller is to end the
    process at once (os._exit): what torch would take apart may wait for ranks that are gone.

    Args:
      device: `run.device` of the job. `cuda` becomes the GPU number LOCAL_RANK.

    Raises:
      ConfigError: the environment is wrong, or there is no such GPU.
      GroupError: the others do not come within `RENDEZVOUS_S`.
    """
    place = place_of(os.environ)
    if place is None:
        yield ALONE
        return
    _take_gpu(device, place)
    group = _meet(place, "nccl" if device.startswith("cuda") else "gloo")
    yield group
    group.gathered(torch.tensor(0))
    distributed.destroy_process_group()


def _take_gpu(device: str, place: Place) -> None:
    if not device.startswith("cuda"):
        return
    if device != "cuda":
        raise ConfigError(
            f"run.device is {device}, and there are {place.size} ranks: set it to cuda, and each "
            "rank takes a GPU of its own"
        )
    number = place.local_rank
    if number is None:
        raise ConfigError(
            "LOCAL_RANK is not set: with run.device cuda it says which GPU a rank takes; set it to "
            "the rank's number among those of its machine, from 0"
        )
    count = torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"LOCAL_RANK is {number}, and this machine has {count} GPUs that torch can use: start "
            "at most as many ranks on it (--nproc), or set run.device to cpu"
        )
    torch.cuda.set_device(number)


def _meet(place: Place, backend: str) -> Group:
    store = _store(place)
    _wait_for_all(store, place)
    timeout = timedelta(seconds=COLLECTIVE_S)
    try:
        distributed.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
        words = distributed.new_group(backend="gloo", timeout=timeout)
        world = distributed.group.WORLD
        assert world is not None
        return Processes(Ranks(world, "sum"), words, timeout)
    except RuntimeError as error:
        raise GroupError(
            f"rank {place.rank} of {place.size} met the others and cannot reach one of them: "
            f"{error}. Over several machines GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) name the "
            "network interface between them"
        ) from error


def _store(place: Place) -> Store:
    """Where the ranks find each other: a file of our own launcher, or a port of another one."""
    patience = timedelta(seconds=RENDEZVOUS_S)
    if MEETING in os.environ:
        store: Store = distributed.FileStore(  # type: ignore[attr-defined]
            os.environ[MEETING], place.size
        )
        store.set_timeout(patience)
        return store
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(
                f"{name} is not set, and WORLD_SIZE is {place.size}: torchrun sets it; else set "
                "MASTER_ADDR to the machine of rank 0 and MASTER_PORT to a free port of it, or "
                "start ranks of one machine with --nproc"
            )
    address = os.environ["MASTER_ADDR"]
    port = whole_number(os.environ, "MASTER_PORT")
    if port is None or port > 65_535:
        raise ConfigError(f"MASTER_PORT is {port}: ports are numbered from 1 to 65535")
    try:
        found, _, _ = next(rendezvous("env://", timeout=patience))
    except (RuntimeError, ValueError) as error:
        if place.rank == 0:
            raise ConfigError(
                f"rank 0 cannot listen at MASTER_ADDR {address}, MASTER_PORT {port}: {error}; "
                "another job may have the port: set MASTER_PORT to a free one on all ranks"
            ) from None
        raise GroupError(
            f"rank {place.rank} of {place.size} finds no rank 0 at MASTER_ADDR {address}, "
            f"MASTER_PORT {port} within {RENDEZVOUS_S:g} s: {error}. Was rank 0 started, and is "
            "the port open to this machine?"
        ) from None
    shared: Store = found
    return shared


def _wait_for_all(store: Store, place: Place) -> None:
    """Returns once every rank has come; else says which have not."""
    keys = [f"penstock/rank-{rank}-is-here" for rank in range(place.size)]
    try:
        store.set(keys[place.rank], "yes")
        store.wait(keys, timedelta(seconds=RENDEZVOUS_S))
    except RuntimeError as error:
        raise GroupError(
            f"rank {place.rank} of {place.size} waited {RENDEZVOUS_S:g} s for "
            f"{_absent(store, keys)}, which did not come ({error}): WORLD_SIZE is the number of "
            "all processes; start as many, on all machines"
        ) from None


def _absent(store: Store, keys: list[str]) -> str:
    try:
        absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # whoever holds the store is gone
        return "the others"
    return f"rank {', '.join(absent[:8])}{' and more' if len(absent) > 8 else ''}"
