"""How far a run is, and what its steps saw: metrics since the last log line, samples, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.training.checkpoint.checkpoint import TrainState
from penstock.training.metrics.sample_metrics import CPU
from penstock.training.objective import RunningMetrics
from penstock.training.steps.feed import Fed
from penstock.training.steps.in_flight import InFlight, Place, Seen
from penstock.training.steps.step import StepResult, Training, loss_of, not_finite, steps_s


class Progress:
    """Of one process. The state moves on when a step begins; its metrics count when it is seen."""

    def __init__(self, state: TrainState, training: Training) -> None:
        """At the state of a run, which it moves on.

        Effects: gives the state metrics of the steps since the last log line.
        """
        self._state, self._training = state, training
        # Alone, metrics are summed where the outputs are; over ranks they come by way of the CPU.
        self._is_alone = training.division.group.size == 1
        self._device = training.collection.device if self._is_alone else CPU
        self._metrics: RunningMetrics = training.objective.metrics(self._device)
        state.metrics = self._metrics
        device = training.collection.device
        self._in_flight = InFlight(device, copies_outputs=not self._is_alone)
        self.samples = 0
        """Of all ranks, trained on by this process and seen."""
        # What clock and counter showed when the current window of steps began.
        self._window_seconds = dict(training.clock.seconds)
        self._window_samples = 0

    @property
    def window_is_open(self) -> bool:
        """Whether there are steps that no log line has told of."""
        return bool(self._metrics.compute()["samples"])

    def place(self) -> Place:
        """Where the run is."""
        return Place(self._state.step, self._state.position, self._state.collection.step)

    def begun(self, before: Place, fed: Sequence[Fed], result: StepResult) -> None:
        """Moves on by a step that was begun at a place; it may still be in flight."""
        self._in_flight.add(before, fed, result)
        self._state.step += 1
        self._state.position = fed[-1].batch.end

    def settle(self, *, all_steps: bool = True) -> None:
        """Waits for the steps in flight, and counts what they saw.

        Args:
          all_steps: after it the state is that of steps that were applied: before anything reads
            it. False: some may stay in flight, that a GPU has work.

        Raises:
          NonFiniteError: a loss or gradient of a step is not finite. That step and those after it
            were not applied, and the state is where it was before them.
        """
        steps = self._in_flight.seen(0 if all_steps else self._in_flight.most)
        while True:
            with self._training.clock.measure("dense", "wait for the device"):
                seen = next(steps, None)
            if seen is None:
                return
            if not seen.is_finite:
                raise self._taken_back(seen)
            with self._training.clock.stage("metrics"):
                self._count(seen)

    def window(self) -> dict[str, Any] | None:
        """Metrics of the steps since the last log line, and their speed; then begins anew.

        Returns:
          None: there was no step.
        """
        metrics, seconds = self._metrics.compute(), self._training.clock.seconds
        if not metrics["samples"]:
            return None
        self._state.metrics = self._metrics = self._training.objective.metrics(self._device)
        spent = {part: s - self._window_seconds[part] for part, s in seconds.items()}
        trained = self.samples - self._window_samples
        self._window_seconds, self._window_samples = dict(seconds), self.samples
        return {
            **metrics,
            "window_samples": metrics["samples"],
            "samples_per_s": trained / max(steps_s(spent), 1e-9),
            "seconds": spent,
        }

    def _count(self, seen: Seen) -> None:
        division = self._training.division
        for fed, losses, of_batch in zip(seen.fed, seen.losses, seen.outputs, strict=True):
            batch, outputs = fed.there, of_batch
            if not self._is_alone:
                batch, outputs = division.whole(fed.batch, of_batch)
            self._metrics.add(batch, outputs, loss_of(losses, division))
            self.samples += batch.batch_size

    def _taken_back(self, seen: Seen) -> BaseException:
        state = self._state
        state.step, state.position, state.collection.step = seen.before
        self._in_flight.clear()
        return not_finite(self._training, [fed.there for fed in seen.fed], state.step)
