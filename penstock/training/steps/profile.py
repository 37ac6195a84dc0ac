"""A trace of some steps of a run, and which stage of them holds the run back."""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from penstock.errors import ConfigError
from penstock.training.checkpoint.checkpoint import TrainState
from penstock.training.steps.step import STAGES, Clock

Item = TypeVar("Item")
_FIRST = 20
"""Steps that are not traced: they make rows, compile kernels and fill caches."""
_BUSY = 0.8
"""Share of the time from which on a GPU that has work is what a step waits for."""


class Profile:
    """Of one process that trains: traces steps between the first ones and the end."""

    def __init__(
        self,
        steps: int,
        folder: Path,
        clock: Clock,
        warn: Callable[[str], None],
    ) -> None:
        """Traces nothing yet.

        Args:
          steps: how many are traced.
          folder: of the run; gets `profile-STEP.json`, STEP the first of them.
          clock: of the run, whose stages are named in the trace.
          warn: gets words, where the run has no such steps.
        """
        self._steps, self._folder, self._clock = steps, folder, clock
        self._warn = warn

    def of(
        self,
        items: Iterable[Item],
        state: TrainState,
        tell: Callable[[int, Mapping[str, Any]], None],
    ) -> Iterator[Item]:
        """Yields the items, one a step of a run.

        Args:
          items: of the steps.
          state: of the run.
          tell: gets the step and what an event `profile` says, once they are traced.

        Raises:
          ConfigError: the trace cannot be written.
        """
        begin, source = state.step + _FIRST, iter(items)
        for _ in range(_FIRST):
            item = next(source, None)
            if item is None:
                self._warn(f"the run ended before step {begin:,}: there is no profile of it")
                return
            yield item
        number = 0
        with _Trace(self._clock) as trace:
            while number < self._steps and (item := next(source, None)) is not None:
                yield item
                number += 1
        if number:
            tell(state.step, self._kept(trace, begin, number))
        yield from source

    def _kept(self, trace: _Trace, begin: int, number: int) -> dict[str, Any]:
        path = self._folder / f"profile-{begin:09d}.json"
        part = path.with_suffix(".part")
        try:
            trace.write(part)
            os.replace(part, path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
        stages = trace.stages(number)
        values = {"path": str(path), "steps": number, "step_s": trace.wall_s / number}
        busy = {} if trace.busy_s is None else {"device_busy": trace.busy_s / trace.wall_s}
        return {**values, **busy, "stages": stages, "text": held_back_by(stages, values, busy)}


def held_back_by(
    stages: Mapping[str, Mapping[str, float]],
    values: Mapping[str, Any],
    busy: Mapping[str, float],
) -> str:
    """Which stage holds a run back, in words: of the GPU, where that is busy, else of the host."""
    step_s: float = values["step_s"]
    place = "device_s" if busy.get("device_busy", 0.0) >= _BUSY else "host_s"
    name = max(stages, key=lambda one: stages[one].get(place, 0.0))
    share = stages[name][place] / step_s
    where = {"device_s": "the GPU, which is busy", "host_s": "the host"}[place]
    if not busy:
        return f"{name}: {share:.0%} of the time of a step"
    rest = "" if place == "device_s" else f"; the GPU is busy {busy['device_busy']:.0%} of it"
    return f"{name}, on {where}: {share:.0%} of the time of a step{rest}"


class _Trace:
    """What torch records of a block."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Or it writes to the standard error that it begins and ends.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = torch.profiler.profile(acc_events=True)
        self._begin_s = 0.0
        self.wall_s = 0.0
        self.busy_s: float | None = None
        """In which a GPU was at work; None: there is none."""
        self._events: list[FunctionEvent] = []

    def __enter__(self) -> _Trace:
        self._profile.start()
        self._clock.is_traced = True
        self._begin_s = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        has_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if has_gpu:
            torch.cuda.synchronize()
        self.wall_s = time.perf_counter() - self._begin_s
        self._clock.is_traced = False
        self._profile.stop()
        self._events = list(self._profile.events() or ())  # type: ignore[no-untyped-call]
        if has_gpu:
            self.busy_s = _covered_us(self._events) / 1e6

    def write(self, path: Path) -> None:
        """As a file of Chrome's trace events, which Perfetto opens."""
        self._profile.export_chrome_trace(str(path))

    def stages(self, steps: int) -> dict[str, dict[str, float]]:
        """Seconds a step of each stage, and of what is none; of a GPU too, if there is one."""
        spans = sorted(
            (event.time_range.start, event.time_range.end, event.name.removeprefix(STAGES))
            for event in self._events
            if event.name.startswith(STAGES) and not _is_on_device(event)
        )
        found: dict[str, dict[str, float]] = {}
        for start, end, name in spans:
            stage = found.setdefault(name, {"host_s": 0.0})
            stage["host_s"] += (end - start) / 1e6 / steps
        other_s = self.wall_s / steps - sum(one["host_s"] for one in found.values())
        found["other"] = {"host_s": max(0.0, other_s)}
        if self.busy_s is not None:
            for name, spent_us in self._on_device_us(spans).items():
                found.setdefault(name, {"host_s": 0.0})["device_s"] = spent_us / 1e6 / steps
        return dict(sorted(found.items(), key=lambda one: -one[1]["host_s"]))

    def _on_device_us(self, spans: Sequence[tuple[float, float, str]]) -> dict[str, float]:
        """Time of kernels and copies by the stage in which the host, any thread of it, began them.

        Copies to the device are a stage of their own: a thread makes them beside the steps.
        """
        begun = {
            event.id: event.time_range.start for event in self._events if not _is_on_device(event)
        }
        starts = [start for start, _, _ in spans]
        found: dict[str, float] = {}
        for event in filter(_is_work, self._events):
            place = bisect_right(starts, begun.get(event.id, -1.0)) - 1
            name = "other"
            if event.name.startswith("Memcpy HtoD"):
                name = "copies to the device"
            elif place >= 0 and begun[event.id] <= spans[place][1]:
                name = spans[place][2]
            span = event.time_range
            found[name] = found.get(name, 0.0) + span.end - span.start
        return found


def _is_on_device(event: FunctionEvent) -> bool:
    return bool(event.device_type != DeviceType.CPU)


def _is_work(event: FunctionEvent) -> bool:
    """Whether it is a kernel or a copy."""
    return _is_on_device(event) and not event.is_user_annotation


def _covered_us(events: Iterable[FunctionEvent]) -> float:
    """Time in which at least one kernel or copy ran."""
    spans = sorted((one.time_range.start, one.time_range.end) for one in filter(_is_work, events))
    covered, end = 0.0, -math.inf
    for start, stop in spans:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
