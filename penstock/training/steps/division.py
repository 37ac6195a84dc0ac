"""How the samples of a step are divided: over ranks, and where it matters, lane by lane.

Where `training.deterministic` asks for the same bits on any number of ranks, and where a model
looks at the other samples of a batch (batch norm), the lanes of a batch are computed one by one,
each as if it were a batch, and what comes of them is summed in the order of lanes. Otherwise a rank
computes all that it has of a batch at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from penstock.errors import DivergedElsewhere, FailedElsewhere, NonFiniteError, PenstockError
from penstock.models import looks_at_other_samples
from penstock.ranks.group import ALONE, Group
from penstock.training.objective import Objective
from penstock.training.steps.finite import Flag
from penstock.types import Batch


class Part(NamedTuple):
    """Samples of a batch that are computed at once."""

    slot: int
    """Its number among the parts of all ranks."""
    rows: slice
    """Of what this rank has of the batch."""


class Division:
    """Of the batches of a run. Alone, and not lane by lane, it costs nothing."""

    def __init__(
        self,
        model: nn.Module,
        group: Group = ALONE,
        *,
        lanes: int = 1,
        deterministic: bool = False,
        seed: int = 0,
    ) -> None:
        """Divides nothing yet.

        Args:
          model: whose gradients and buffers are summed up.
          group: the ranks of the run.
          lanes: into which the data is divided.
          deterministic: bits do not depend on the number of ranks.
          seed: of what is drawn in lanes.
        """
        self.group, self.lanes, self._seed = group, lanes, seed
        self.by_lane = lanes > 1 and (deterministic or looks_at_other_samples(model))
        self._is_whole = group.size == 1 and not self.by_lane
        self.slots = lanes if self.by_lane else group.size
        self._parameters = [one for one in model.parameters() if one.requires_grad]
        self._buffers = [one for one in model.buffers() if one.numel()] if self.by_lane else []
        self._step = 0
        self._before: list[Tensor] = []
        self._after: Tensor | None = None
        self._sums: Tensor | None = None

    def begin_run(self, step: int) -> None:
        """Before the first step of this process: ranks that draw together draw apart."""
        if self.group.size > 1 and not self.by_lane:
            torch.manual_seed(self._drawn(step, "rank", self.group.rank))

    def parts(self, batch: Batch) -> list[Part]:
        """Of what this rank has of a batch, those that have samples."""
        if not self.by_lane:
            return [Part(self.group.rank, slice(0, batch.batch_size))] if batch.batch_size else []
        found, first = [], 0
        for lane in range(self.group.rank, self.lanes, self.group.size):
            size = batch.lane_sizes[lane]
            if size:
                found.append(Part(lane, slice(first, first + size)))
            first += size
        return found

    def totals(self, objective: Objective, batches: Sequence[Batch]) -> Tensor | None:
        """[batches, L] float32 on their device: each one's `Objective.total_weights`, of all ranks.

        None: of the one batch there is, which is whole.
        """
        if self._is_whole:
            if len(batches) == 1:
                return None
            return torch.stack([objective.total_weights(batch) for batch in batches])
        device = batches[0].labels.device
        weights = torch.zeros(self.slots, len(batches), len(objective.tasks))
        for number, batch in enumerate(batches):
            for part in self.parts(batch):
                weights[part.slot, number] = objective.total_weights(some(batch, part.rows)).cpu()
        return _in_order(self._of_all(weights)).to(device)

    def event_times(self, batch: Batch) -> Tensor | None:
        """[B] int64 of the whole batch, in any order; None: it has none."""
        if batch.event_time is None or self.group.size == 1:
            return batch.event_time
        told = self.group.gathered_bytes(batch.event_time.numpy().tobytes())
        return torch.from_numpy(np.frombuffer(b"".join(told), dtype=np.int64).copy())

    def begin_part(self, part: Part, number: int) -> None:
        """Before the forward pass of a part of batch `number` of the step.

        Where lanes are computed one by one, each draws numbers of its own, whoever computes it, and
        finds the model's buffers as the step before left them.
        """
        if not self.by_lane:
            return
        torch.manual_seed(self._drawn(self._step, number, part.slot))
        if self._buffers:
            self._remember_buffers()
            _set(self._buffers, self._before)

    def end_part(self, part: Part) -> None:
        """After the backward pass of a part: its gradients are put aside."""
        if self._is_whole:
            return
        sums = self._room_for_sums()[part.slot if self.by_lane else 0]
        size = sums.numel() - len(self._parameters) - 1
        first = 0
        for place, one in enumerate(self._parameters):
            if one.grad is not None:
                sums[first : first + one.numel()] += one.grad.flatten()
                sums[size + place] += 1
                one.grad = None
            first += one.numel()
        if self._after is not None:
            values = [one.detach().flatten().double().cpu() for one in self._buffers]
            self._after[part.slot] = torch.cat([torch.ones(1, dtype=torch.float64), *values])

    def end_batch(self, error: Exception | None = None) -> None:
        """After the backward passes of a batch.

        Args:
          error: what ended the batch here.

        Raises:
          Exception: `error`; all ranks have heard of it.
          FailedElsewhere: another rank's batch ended in an error; it says why.
        """
        if self.group.size > 1:
            told = self.group.gathered(torch.tensor(float(_state_of(error)), dtype=torch.float64))
            _refuse_failed(error, told.tolist())
        elif error is not None:
            raise error
        if self._buffers:
            self._average_buffers()
        if self.by_lane:
            # Whichever lane was the last here.
            torch.manual_seed(self._drawn(self._step, "end"))

    def loss(self, losses: Tensor) -> float:
        """The loss of the whole batch: the sum of the parts', given those of this rank.

        Args:
          losses: [slots] float64 on the CPU; 0 for parts of others.
        """
        return float(_in_order(self._of_all(losses)))

    def sum_gradients(self, flag: Flag) -> None:
        """Gives each parameter the sum of its gradients over all parts of all batches of a step.

        Effects: a flag that is up on one rank is up on all of them afterwards.
        """
        if self._is_whole:
            return
        sums, self._sums = self._room_for_sums(), None
        sums[0, -1] = flag.sum
        self.group.add(sums)
        total = _in_order(sums)
        flag.note(total[-1])
        size = total.numel() - len(self._parameters) - 1
        is_given = total[size:-1].tolist()
        grads = torch.split(total[:size], [one.numel() for one in self._parameters])
        for one, grad, given in zip(self._parameters, grads, is_given, strict=True):
            one.grad = grad.view_as(one).to(one.dtype) if given else None

    def begin_step(self, step: int) -> None:
        """Forgets what a step that failed has left."""
        self._step = step
        self._sums = self._after = None
        self._before = []

    def whole(self, batch: Batch, outputs: Tensor) -> tuple[Batch, Tensor]:
        """The labels, weights, teacher and groups of all ranks, and the outputs: what is measured.

        Args:
          batch: this rank's.
          outputs: [B] or [B, L] float32 on the CPU.

        Returns:
          They of the whole batch, in the order of lanes; the rest of it is this rank's.
        """
        if self.group.size == 1:
            return batch, outputs
        told = self.group.gathered_bytes(_packed(batch, outputs))
        table = pa.concat_tables([pa.ipc.open_stream(one).read_all() for one in told])
        table = table.take(_by_lane(batch.lane_sizes, self.group.size)).combine_chunks()
        return _unpacked(table, batch), _columns(table, "output", outputs)

    def _drawn(self, *place: int | str) -> int:
        """A seed for what is drawn at a place."""
        words = "/".join(map(str, (self._seed, *place))).encode()
        drawn = hashlib.blake2b(words, digest_size=8).digest()
        return int.from_bytes(drawn, "little") >> 1

    def _of_all(self, mine: Tensor) -> Tensor:
        """[slots, ...] the parts of all ranks, given [slots, ...] with 0 for those of others."""
        return self.group.gathered(mine).sum(0)

    def _room_for_sums(self) -> Tensor:
        """[slots or 1, P + parameters + 1]: gradients, and how many parts have given one to each.

        The last of the first row is the flag's.
        """
        if self._sums is None:
            device = self._parameters[0].device if self._parameters else torch.device("cpu")
            size = sum(map(Tensor.numel, self._parameters)) + len(self._parameters) + 1
            self._sums = torch.zeros(self.slots if self.by_lane else 1, size, device=device)
        return self._sums

    def _remember_buffers(self) -> None:
        if not self._before:
            self._before = [one.clone() for one in self._buffers]
            size = 1 + sum(map(Tensor.numel, self._buffers))
            self._after = torch.zeros(self.slots, size, dtype=torch.float64)

    @torch.no_grad()
    def _average_buffers(self) -> None:
        """Makes the model's buffers the mean of what the lanes that have samples made of them."""
        self._remember_buffers()
        assert self._after is not None
        # Of each lane one rank has something, so the sum over ranks is exact.
        lanes = self.group.gathered(self._after).sum(0)
        trained = lanes[lanes[:, 0] > 0, 1:]
        mean = _in_order(trained) / len(trained)
        sizes = [one.numel() for one in self._buffers]
        for one, values in zip(self._buffers, torch.split(mean, sizes), strict=True):
            one.copy_(values.view_as(one))
        self._before, self._after = [], None


def _state_of(error: Exception | None) -> int:
    if error is None:
        return 0
    return 2 if isinstance(error, NonFiniteError) else 1


def _refuse_failed(error: Exception | None, states: Sequence[float]) -> None:
    """Raises on all ranks where one of them failed: as something not finite, if it is that.

    Then what was trained diverges, and no rank saves it.
    """
    if not any(states):
        return
    if 2 in states and not isinstance(error, NonFiniteError):
        error = DivergedElsewhere(
            f"the loss or a gradient of rank {states.index(2)} is not finite, which says why"
        )
    if error is None:
        first = next(rank for rank, state in enumerate(states) if state)
        raise FailedElsewhere(f"rank {first} could not train on its part of a batch, and says why")
    if isinstance(error, PenstockError):
        error.is_known_to_all = True
    raise error


def some(batch: Batch, rows: slice) -> Batch:
    """What a loss reads of some samples of a batch: numbers, labels, weights."""
    if rows == slice(0, batch.batch_size):
        return batch
    return replace(
        batch,
        dense=batch.dense[rows],
        labels=batch.labels[rows],
        weights=None if batch.weights is None else batch.weights[rows],
    )


def _in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, one after the other: the same bits wherever it is done."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


@torch.no_grad()
def _set(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for one, value in zip(buffers, values, strict=True):
        one.copy_(value)


def _by_lane(sizes: Sequence[int], ranks: int) -> np.ndarray:
    """[B] which of the samples of rank 0, then rank 1, ... comes where, by lanes."""
    lanes = np.arange(len(sizes))
    as_told = np.argsort(lanes % ranks, kind="stable")
    lane_of = np.repeat(as_told, np.asarray(sizes, dtype=np.int64)[as_told])
    return np.argsort(lane_of, kind="stable")


def _packed(batch: Batch, outputs: Tensor) -> bytes:
    columns: dict[str, pa.Array] = {}
    for name, values in (("output", outputs), ("label", batch.labels)):
        for number, column in enumerate(values.unbind(1) if values.dim() > 1 else [values]):
            columns[f"{name} {number}"] = pa.array(column.numpy())
    for name, one in (("weight", batch.weights), ("teacher", batch.teacher)):
        if one is not None:
            columns[name] = pa.array(one.numpy())
    columns |= {f"group {name}": group for name, group in batch.groups.items()}
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _unpacked(table: pa.Table, batch: Batch) -> Batch:
    def column(name: str) -> Tensor | None:
        if name not in table.column_names:
            return None
        return torch.from_numpy(table.column(name).to_numpy().copy())

    return replace(
        batch,
        dense=batch.dense.new_zeros(table.num_rows, 0),
        labels=_columns(table, "label", batch.labels),
        weights=column("weight"),
        teacher=column("teacher"),
        groups={name: table.column(f"group {name}").combine_chunks() for name in batch.groups},
    )


def _columns(table: pa.Table, name: str, like: Tensor) -> Tensor:
    """The columns of a name side by side, of as many dimensions as `like`."""
    found = [one for one in table.column_names if one.startswith(f"{name} ")]
    columns = [torch.from_numpy(table.column(one).to_numpy().copy()) for one in found]
    return columns[0] if like.dim() == 1 else torch.stack(columns, dim=1)
