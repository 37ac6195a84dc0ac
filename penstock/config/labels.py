"""What a model learns to predict: one label or several, each from a column."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from penstock.config.base import Config, FiniteFloat, PositiveFloat


class Label(Config):
    """One thing that the model predicts.

    `binary`: whether it happens: 0 or 1, or a number beside a threshold; learnt by cross-entropy.
    `regression`: a number; learnt by squared error.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")] | None = None
    """What metrics and scores of a job of several labels are named by; null: like the column."""
    column: str
    """A list column reads as its value where it holds one and as missing where it is empty."""
    task: Literal["binary", "regression"] = "binary"
    at_least: FiniteFloat | None = None
    """Binary alone: the label is 1 where the column is at least this; null: the column must hold
    0 and 1 alone.
    """
    offset: FiniteFloat = 0.0
    """Regression alone: what the model learns is (value - offset) / scale, best near 0 and of size
    1. Metrics and scores are in the column's unit all the same.
    """
    scale: PositiveFloat = 1.0
    """Regression alone: see `offset`."""
    missing: Literal["fail", "ignore"] = "fail"
    """A null or NaN: `fail` stops the run with the file, row and column; `ignore` leaves the row
    out of this label's loss and metrics alone.
    """

    @property
    def title(self) -> str:
        """The name that metrics and scores go by."""
        return self.column if self.name is None else self.name

    @model_validator(mode="after")
    def _fields_fit_the_task(self) -> Label:
        if self.task == "regression" and self.at_least is not None:
            raise ValueError("at_least makes 0 and 1 of numbers; remove it or use task binary")
        if self.task == "binary" and (self.offset, self.scale) != (0.0, 1.0):
            raise ValueError("offset and scale are of task regression; remove them")
        return self


def _one_or_several(given: Any) -> str:
    return "several" if isinstance(given, list | tuple) else "one"


LabelOrLabels: TypeAlias = Annotated[
    Annotated[Label, Tag("one")] | Annotated[tuple[Label, ...], Tag("several")],
    Discriminator(_one_or_several),
]


def check_labels(labels: tuple[Label, ...]) -> None:
    """Raises ValueError if there is none, or two go by one name."""
    if not labels:
        raise ValueError("label is an empty list; name a column")
    titles = [label.title for label in labels]
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"two labels are named {title!r}; give one of them a `name`")
