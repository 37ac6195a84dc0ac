"""One training step, with its time split between waiting for data, embeddings and dense model."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

import penstock
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.errors import BatchError, FailedElsewhere, GroupError, NonFiniteError
from penstock.interruption import Interruption
from penstock.training.objective import Objective
from penstock.training.steps.dense import DenseTrainer
from penstock.training.steps.division import Division, some
from penstock.training.steps.finite import Flag
from penstock.types import Batch

Item = TypeVar("Item")
STAGES = "penstock: "
"""Names of stages in a trace begin so."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Clock:
    """Seconds spent on each part of a run."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("data", "embedding", "dense", "evaluation", "checkpoint"), 0.0
        )
    )
    """data: waiting for the next batch, but not for files to appear; embedding: look-up, gradients
    and update of rows; dense: model forward, backward and update.
    """
    is_traced: bool = False
    """Whether stages are named in a trace that torch makes meanwhile."""

    @contextmanager
    def measure(self, part: str, stage: str | None = None) -> Iterator[None]:
        """Adds the time of the `with` block to `part`; in a trace it is a stage, if it is named."""
        begin = time.perf_counter()
        try:
            if stage is None:
                yield
            else:
                with self.stage(stage):
                    yield
        finally:
            self.seconds[part] += time.perf_counter() - begin

    def stage(self, name: str) -> AbstractContextManager[object]:
        """A block that is a stage of the step in a trace; no stage is within another."""
        if not self.is_traced:
            return nullcontext()
        return torch.profiler.record_function(STAGES + name)

    def waiting_for(
        self, items: Iterable[Item], stop: Interruption, idle_s: Callable[[], float]
    ) -> Iterator[Item]:
        """Yields the items; the time until each arrives counts as `data`.

        Args:
          items: whatever a step takes.
          stop: ends it.
          idle_s: seconds so far in which there was nothing to wait for yet; they do not count.

        Raises:
          Interrupted: a signal came meanwhile. Nothing is lost but an item that nobody had yet.
        """
        source = iter(items)
        while True:
            before_s, idle_before_s = self.seconds["data"], idle_s()
            with self.measure("data", "wait for data"), stop.at_once():
                item = next(source, None)
            spent_s = self.seconds["data"] - (idle_s() - idle_before_s)
            self.seconds["data"] = max(spent_s, before_s)
            if item is None:
                return
            yield item


def steps_s(seconds: Mapping[str, float]) -> float:
    """Seconds of training itself, without evaluation and checkpoints."""
    return seconds["data"] + seconds["embedding"] + seconds["dense"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step saw before its update, on the run's device."""

    is_raised: Tensor
    """[] float32: 1 if a number of this step, or of one before, is not finite; then the step has
    changed no weight and no row.
    """
    losses: list[Tensor]
    """Of each batch [slots + 1] float64: what `Division.loss` takes, and by what that is to be
    multiplied; see `loss_of`.
    """
    outputs: list[Tensor]
    """Of each batch [B] or [B, L] float32 of the model, detached."""


class _Doing:
    """What a step is at, for the error that ends it."""

    def __init__(self, batch: Batch) -> None:
        self.what = "the look-up of its keys"
        self.batch = batch
        self.is_whole = True
        """Whether nothing was updated yet."""
        self.is_known_to_all = False
        """Whether all ranks hear of an error."""
        self.looks = False
        """Whether each number is looked at, to say which is not finite, rather than noted."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a step trains, and with what."""

    model: nn.Module
    """See `model_inputs`."""
    objective: Objective
    """From the model and a batch to the loss."""
    collection: EmbeddingCollection
    """The embedding tables; in training mode."""
    trainer: DenseTrainer
    """Updates the model's parameters."""
    division: Division
    """How a batch is divided."""
    clock: Clock
    """Gets the time spent."""
    flag: Flag
    """Raised by what is not finite."""


def train_step(training: Training, batches: Sequence[Batch], step: int) -> StepResult:
    """Trains on one batch: forward, backward, one update of dense weights and touched rows.

    Several batches are trained on as if they were one: the gradients are summed, and the loss is
    the mean over all of their samples, those of other ranks among them.

    The embeddings enter the model as a leaf, so that the backward pass of the dense model and that
    of the embeddings run, and are timed, one after the other; the gradients are the same.

    A step with a number that is not finite changes nothing, nor does any step after it, until
    `not_finite` was asked; its result says so. On a GPU nobody waits for that.

    Args:
      training: what is trained.
      batches: the samples, on the collection's device (`feed.on_device`).
      step: number of this step, from 0.

    Raises:
      BatchError: something was raised, by the model or for lack of memory. Says whether anything
        was updated.
      FailedElsewhere: that happened on another rank. Nothing was updated.
    """
    doing = _Doing(batches[0])
    clock = training.clock
    with _errors_of(training, step, doing):
        result, norm = _gradients(training, batches, step, doing)
        with clock.measure("dense", "update of the dense model"):
            doing.what, doing.is_whole = "the update of the dense weights", False
            raised = result.is_raised
            # On the CPU nobody waits for it, and a step that is applied need not look at it.
            skip = raised if raised.is_cuda or raised.item() else None
            training.trainer.step(step, norm, skip)
        with clock.measure("embedding", "update of the tables"):
            doing.what = "the update of the embeddings"
            training.collection.apply_gradients(result.is_raised)
    return result


def not_finite(training: Training, batches: Sequence[Batch], step: int) -> NonFiniteError:
    """What was not finite in a step that has changed nothing; takes the flag down.

    Loss and gradients are computed once more, and each is looked at.

    Args:
      training: as it was before the step.
      batches: of the step.
      step: its number.

    Returns:
      What to raise; of another rank's part of the batches a `DivergedElsewhere`.

    Raises:
      GroupError: a rank is gone.
    """
    doing = _Doing(batches[0])
    doing.looks = True
    try:
        with _errors_of(training, step, doing):
            _gradients(training, batches, step, doing)
    except NonFiniteError as error:
        return error
    except (BatchError, FailedElsewhere) as error:
        why = str(error)
    else:
        why = "computed once more, with other random numbers, all of it is"
    finally:
        training.flag.clear()
        training.model.zero_grad(set_to_none=True)
    what = f"step {step}: the loss or a gradient was NaN or infinite ({why})"
    return NonFiniteError(f"{what}; {_place(batches[0])}")


def loss_of(losses: Tensor, division: Division) -> float:
    """The loss of a batch over all ranks, as its objective gave it.

    Where a step has several batches, of several tasks it is their share of the step's.

    Args:
      losses: of a `StepResult`, on the CPU.
      division: of the step.
    """
    return division.loss(losses[:-1]) * float(losses[-1])


@contextmanager
def _errors_of(training: Training, step: int, doing: _Doing) -> Iterator[None]:
    """Gives errors of a step their place; afterwards there are no gradients of tables."""
    try:
        yield
    except GroupError:
        raise
    except NonFiniteError as error:
        told = NonFiniteError(f"{error}; {_place(doing.batch)}")
        told.is_known_to_all = error.is_known_to_all
        raise told from None
    # A user's model may raise anything.
    except Exception as error:
        what = f"step {step}: {doing.what}"
        failed = batch_error(what, doing.batch, error, is_whole=doing.is_whole)
        failed.is_known_to_all = doing.is_known_to_all
        raise failed from error
    finally:
        # Of a step that failed: they are not the next one's.
        training.collection.discard_gradients()


def _gradients(
    training: Training, batches: Sequence[Batch], step: int, doing: _Doing
) -> tuple[StepResult, Tensor]:
    """Forward and backward of the batches of a step; and the norm of the gradients, []."""
    collection, division, flag = training.collection, training.division, training.flag
    losses, outputs = [], []
    division.begin_step(step)
    totals = division.totals(training.objective, batches)
    whole = None if totals is None else totals.sum(0)
    for number, batch in enumerate(batches):
        doing.batch = batch
        of_parts, of_batch = _add_gradients(training, batch, whole, (step, number), doing)
        if totals is not None and whole is not None and len(whole) == 1:
            # The share as the batch's own mean.
            of_parts[-1].copy_(whole[0] / totals[number, 0].clamp_min(_TINY))
        losses.append(of_parts)
        outputs.append(of_batch)
    with training.clock.measure("dense", "sum and norm of the gradients"):
        doing.what = "the sum of the gradients"
        for evidence in collection.pending.evidence():
            flag.note(evidence)
        division.sum_gradients(flag)
        norm = training.trainer.norm()
        flag.note(norm)
        if doing.looks and not math.isfinite(norm):
            raise NonFiniteError(training.trainer.describe_non_finite(step))
        return StepResult(flag.raised(), losses, outputs), norm


def _add_gradients(
    training: Training,
    batch: Batch,
    totals: Tensor | None,
    number: tuple[int, int],
    doing: _Doing,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one batch; returns losses and outputs as of `StepResult`.

    `number`: of the step, and of the batch within it.
    """
    collection, division = training.collection, training.division
    doing.what = "the look-up of its keys"
    with training.clock.measure("embedding", "look-up"):
        times = division.event_times(batch)
        if times is not None:
            collection.observe_times(times)
        pooled = look_up(collection, batch)
    losses = torch.zeros(division.slots + 1, dtype=torch.float64, device=pooled.device)
    # To assign a number waits for a GPU.
    losses[-1].fill_(1.0)
    try:
        with training.clock.measure("dense"):
            outputs, grad = _of_parts(
                training, batch, pooled.detach(), totals, number, losses, doing
            )
        with training.clock.measure("embedding", "gradients of the tables"):
            if pooled.requires_grad and grad is not None:
                pooled.backward(grad)  # type: ignore[no-untyped-call]
            if doing.looks:
                try:
                    collection.check_gradients()
                except NonFiniteError as error:
                    raise NonFiniteError(f"step {number[0]}: {error}") from None
    # All ranks hear of it.
    except Exception as error:
        doing.is_known_to_all = True
        division.end_batch(error)
        raise
    division.end_batch()
    return losses, outputs


def _of_parts(
    training: Training,
    batch: Batch,
    pooled: Tensor,
    totals: Tensor | None,
    number: tuple[int, int],
    losses: Tensor,
    doing: _Doing,
) -> tuple[Tensor, Tensor | None]:
    """Forward and backward of each part of a batch; fills in its loss.

    Returns:
      The outputs, and the gradient [B, W] of the embeddings; None: the model does not look at them.
    """
    division, objective = training.division, training.objective
    inputs = model_inputs(training.collection, batch, pooled)
    parts = division.parts(batch)
    outputs = [torch.zeros(0, *batch.labels.shape[1:], device=pooled.device)]
    grads = []
    for part in parts:
        doing.what = "the model's forward pass"
        division.begin_part(part, number[1])
        dense, embeddings, *lengths = (one[part.rows] for one in inputs)
        leaf = embeddings.detach().requires_grad_()
        with training.clock.stage("forward"):
            loss, of_part = objective(
                training.model, (dense, leaf, *lengths), some(batch, part.rows), totals
            )
        training.flag.note(loss)
        if doing.looks and not math.isfinite(loss.item()):
            raise NonFiniteError(f"step {number[0]}: the loss is {loss.item()}")
        doing.what = "the backward pass"
        with training.clock.stage("backward"):
            torch.autograd.backward(loss)
        division.end_part(part)
        losses[part.slot].add_(loss.detach())
        outputs.append(of_part.detach())
        grads.append(leaf.grad)
    if len(parts) == 1 and division.group.size == 1:
        return outputs[-1], grads[0]
    # A rank without a look takes part in the update, too.
    some_grad = [
        torch.zeros_like(pooled[part.rows]) if grad is None else grad
        for part, grad in zip(parts, grads, strict=True)
    ]
    return torch.cat(outputs), torch.cat([pooled[:0], *some_grad])


def batch_error(doing: str, batch: Batch, error: Exception, *, is_whole: bool = True) -> BatchError:
    """What to raise where `error` came up: names it, its place in the user's code, the batch."""
    size = batch.batch_size
    samples = f"a batch of {size:,} samples" if size > 1 else "a batch of a single sample"
    words = [
        f"{doing} failed: {type(error).__name__}: {error}{_users_place(error)}",
        f"at {samples}, {batch.origin} (epoch {batch.start.epoch}, "
        f"samples {batch.start.samples} to {batch.end.samples - 1} of the run)",
    ]
    if not is_whole:
        words.append("this update may be half done; the last checkpoint stays good")
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        words.append(
            "several batches may make a step (training.accumulate_batches), and a smaller batch "
            "needs less memory (training.batch_size)"
        )
    elif size == 1:
        words.append(
            "batch normalisation cannot train on one sample: choose a training.batch_size that "
            "leaves none over, or another normalisation"
        )
    return BatchError("; ".join(words), is_whole=is_whole)


def _users_place(error: Exception) -> str:
    """Where in code that is neither ours nor torch's an error came up; empty: nowhere."""
    not_theirs = tuple(str(Path(str(module.__file__)).parent) for module in (penstock, torch))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(not_theirs)]
    if not theirs:
        return ""
    last = theirs[-1]
    return f" ({last.filename}:{last.lineno} in {last.name})"


def look_up(collection: EmbeddingCollection, batch: Batch) -> Tensor:
    """Embeddings of a batch, [B, W] float32; [B, 0] for a job without features."""
    if not collection.features:
        return batch.dense.new_zeros((batch.batch_size, 0))
    pooled: Tensor = collection(batch.sparse)
    return pooled


def model_inputs(
    collection: EmbeddingCollection, batch: Batch, embeddings: Tensor
) -> tuple[Tensor, ...]:
    """What a model's `forward` is called with.

    Returns:
      dense [B, n] and embeddings [B, W]; of a job with sequences also lengths [B, S] int64, the
      keys that each sequence of a sample has.
    """
    lengths = collection.sequence_lengths(batch.sparse)
    return (batch.dense, embeddings, lengths) if lengths.shape[1] else (batch.dense, embeddings)


def _place(batch: Batch) -> str:
    first, last = batch.start.samples, batch.end.samples - 1
    return (
        f"stopped before any update, at the batch {batch.origin} (epoch {batch.start.epoch}, "
        f"samples {first} to {last} of the run). Look at these rows, lower the learning rate or "
        "set training.clip_gradient_norm; the last checkpoint stays good"
    )
