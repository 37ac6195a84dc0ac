"""Learning rates over the steps of a run."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, Field, model_validator

from penstock.config.base import Config, PositiveInt
from penstock.errors import ConfigError


class Schedule(Config):
    """Learning-rate factor as a function of the step.

    Linear warm-up from 0, then decay to `end_factor`.
    """

    warmup_steps: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Step s of the warm-up uses (s + 1) / warmup_steps of the rate."""
    decay: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    decay_steps: PositiveInt | Literal["end"] | None = None
    """Steps of the decay, counted from the end of the warm-up; required unless `decay` is
    constant. `end`: those that are left to the end of the run.
    """
    end_factor: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.01
    """Factor reached after `decay_steps`, and kept."""

    def factor(self, step: int) -> float:
        """Factor of the learning rate at `step`, counted from 0.

        Raises:
          ConfigError: nobody has said when the run ends, see `with_end`.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant" or self.decay_steps is None:
            return 1.0
        if self.decay_steps == "end":
            raise ConfigError(
                "schedule: decay_steps is `end`, which only `penstock train` can know; in a loop "
                "of your own give the number of steps"
            )
        done = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        if self.decay == "linear":
            return 1.0 - (1.0 - self.end_factor) * done
        if self.decay == "cosine":
            return self.end_factor + (1.0 - self.end_factor) * 0.5 * (
                1.0 + math.cos(math.pi * done)
            )
        return float(self.end_factor**done)

    @model_validator(mode="after")
    def _decay_needs_steps(self) -> Schedule:
        if self.decay != "constant" and self.decay_steps is None:
            raise ValueError(f"decay {self.decay!r} needs decay_steps: a number, or `end`")
        return self


Part = TypeVar("Part")


def lasts_to_the_end(config: BaseModel) -> bool:
    """Whether a schedule in a configuration decays to the end of the run."""
    return with_end(config, 1) is not config


def with_end(config: Part, steps: int) -> Part:
    """A configuration with the numbers of steps of schedules that decay to the end of the run.

    Args:
      config: a job, or what is in one; returned as it is where no schedule does.
      steps: of the whole run.
    """
    found: Any = config
    if isinstance(config, Schedule):
        if config.decay_steps == "end":
            left = max(1, steps - config.warmup_steps)
            found = config.model_copy(update={"decay_steps": left})
    elif isinstance(config, BaseModel):
        old = {name: getattr(config, name) for name in type(config).model_fields}
        new = {name: with_end(value, steps) for name, value in old.items()}
        changed = {name: value for name, value in new.items() if value is not old[name]}
        found = config.model_copy(update=changed) if changed else config
    elif isinstance(config, tuple):
        items = tuple(with_end(item, steps) for item in config)
        if any(item is not before for item, before in zip(items, config, strict=True)):
            found = items
    return cast("Part", found)
