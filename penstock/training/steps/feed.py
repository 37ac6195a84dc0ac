"""Batches on the device of a run: copied there beside the step before, checked on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.data.batches.channel import Channel, Closed, Ended
from penstock.data.batches.loader import Loader
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.position import Position
from penstock.types import Batch

_AHEAD = 2


class Fed(NamedTuple):
    """A batch, twice."""

    batch: Batch
    """On the CPU, as metrics read it."""
    there: Batch
    """What the step reads: `dense`, `sparse`, `labels`, `weights` are on the run's device."""


def origin_of(item: Batch | Sequence[Fed]) -> object:
    """Where the samples of a batch, or the first of a step, come from; in words by `str`."""
    return item.origin if isinstance(item, Batch) else item[0].batch.origin


class _Copy(NamedTuple):
    fed: Fed
    done: torch.cuda.Event | None


class Feed:
    """The batches of a loader, on the device of a collection.

    On a GPU a thread checks the keys, pins the memory and copies on a stream of its own, up to two
    batches ahead. To be used as a context manager, which also closes the loader.
    """

    def __init__(self, loader: Loader, collection: EmbeddingCollection) -> None:
        self._loader = loader
        self._collection = collection
        self._channel: Channel[_Copy] = Channel(_AHEAD)
        self._thread: threading.Thread | None = None
        self._fed = self._feed()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()
        self._loader.__exit__(kind, error, traceback)
        if self._thread is not None:
            self._thread.join()

    @property
    def idle_s(self) -> float:
        """Seconds so far in which there was nothing to feed, as files were still to appear."""
        return self._loader.waited_s

    @property
    def end(self) -> Position | None:
        """Where the data ends, once all of it was taken."""
        return self._loader.position if self._loader.has_ended else None

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Fed:
        return next(self._fed)

    def _feed(self) -> Iterator[Fed]:
        if self._collection.device.type == "cpu":
            for batch in self._loader:
                yield Fed(batch, on_device(batch, self._collection))
            return
        self._thread = threading.Thread(target=self._copy_all, name="penstock-feed", daemon=True)
        self._thread.start()
        while True:
            try:
                fed, done = self._channel.get()
            except Ended:
                return
            assert done is not None
            stream = torch.cuda.current_stream(self._collection.device)
            stream.wait_event(done)
            for tensor in _tensors(fed.there):
                tensor.record_stream(stream)
            yield fed

    def _copy_all(self) -> None:
        stream = torch.cuda.Stream(self._collection.device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                for batch in self._loader:
                    fed = Fed(batch, on_device(_pinned(batch), self._collection))
                    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    done.record(stream)
                    self._channel.put(_Copy(fed, done))
            self._channel.end()
        except Closed:
            return
        except BaseException as error:
            self._channel.fail(error)


def steps_of(batches: Iterable[Fed], per_step: int) -> Iterator[list[Fed]]:
    """Batches by step: so many each, and fewer at the end of an epoch."""
    taken: list[Fed] = []
    for fed in batches:
        if taken and fed.batch.end.epoch != taken[-1].batch.end.epoch:
            yield taken
            taken = []
        taken.append(fed)
        if len(taken) == per_step:
            yield taken
            taken = []
    if taken:
        yield taken


def on_device(batch: Batch, collection: EmbeddingCollection) -> Batch:
    """The batch with what a step reads on the device of the collection.

    Raises:
      ConfigError: its keys do not fit the collection.
    """
    device = collection.device
    if device.type == "cpu":
        return batch  # the look-up checks it
    weights = batch.weights
    return replace(
        batch,
        dense=batch.dense.to(device, non_blocking=True),
        sparse=collection.to_device(batch.sparse) if collection.features else batch.sparse,
        labels=batch.labels.to(device, non_blocking=True),
        weights=None if weights is None else weights.to(device, non_blocking=True),
    )


def _pinned(batch: Batch) -> Batch:
    weights, sparse = batch.weights, batch.sparse
    return replace(
        batch,
        dense=batch.dense.pin_memory(),
        sparse=replace(
            sparse,
            values=sparse.values.pin_memory(),
            offsets=sparse.offsets.pin_memory(),
            weights=None if sparse.weights is None else sparse.weights.pin_memory(),
        ),
        labels=batch.labels.pin_memory(),
        weights=None if weights is None else weights.pin_memory(),
    )


def _tensors(batch: Batch) -> list[Tensor]:
    sparse = batch.sparse
    found = (batch.dense, batch.labels, batch.weights, sparse.values, sparse.offsets)
    return [each for each in (*found, sparse.weights) if each is not None and each.is_cuda]
