"""Every kind of event and every quantity of one, with its unit and meaning: named here alone.

docs/events.md is this as a page. A part that tells something new adds its kind, or its quantities,
here; what is not here is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class Unit(Enum):
    """Units, and what a value of each is in Python: a number unless types follow."""

    RATIO = "1"
    NATS = "nats"
    LOSS = "loss"
    LABEL = "unit of the label"
    AGE = "unit of the eviction"
    SECONDS = "s"
    BYTES = "bytes"
    STEPS = "steps"
    SAMPLES = "samples"
    SAMPLES_PER_S = "samples/s"
    ROWS = "rows"
    KEYS = "keys"
    GRADIENTS = "gradients"
    GROUPS = "groups"
    ITEMS = "items"
    CORES = "cores"
    TEXT = "text", str
    FLAG = "yes or no", bool
    BUCKETS = "list of (prediction, label, weight)", list

    def __init__(self, symbol: str, *types: type) -> None:
        self.symbol = symbol
        self.is_number = not types
        """A number that is undefined is NaN."""
        self.types = types or (int, float)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value of an event."""

    unit: Unit
    meaning: str


@dataclass(frozen=True, slots=True)
class Group:
    """Quantities that have a name of their own, and may stand in several places."""

    name: str
    meaning: str
    fields: Fields


Fields: TypeAlias = Mapping[str, Quantity | Group]
"""By name. `<word>` in a name stands for any text: the label that tells values apart."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What an event of a kind says, and what it holds."""

    meaning: str
    fields: Fields
    is_computed: bool = False
    """Whether it follows from the job and the step: a run that goes on from an earlier step tells
    it again, and what was told of later steps is taken back. Others happened, and stay.
    """


_SAMPLES = Quantity(Unit.SAMPLES, "trained on since the beginning of the run")
_TEXT = Quantity(Unit.TEXT, "in words")

_MEASURED: Fields = {
    "auc": Quantity(Unit.RATIO, "probability that a positive scores above a negative"),
    "log_loss": Quantity(Unit.NATS, "mean, weighted"),
    "normalized_entropy": Quantity(Unit.RATIO, "log loss over that of the mean label"),
    "calibration": Quantity(Unit.RATIO, "mean prediction over mean label"),
    "rmse": Quantity(Unit.LABEL, "root mean squared error"),
    "mae": Quantity(Unit.LABEL, "mean absolute error"),
    "bias": Quantity(Unit.LABEL, "mean prediction minus mean label"),
}
_COUNTED: Fields = {
    "samples": Quantity(Unit.SAMPLES, "measured"),
    "positives": Quantity(Unit.SAMPLES, "measured whose label is 1"),
}
_OF_SAMPLES = Group("metrics of samples", "Those of one slice.", {**_MEASURED, **_COUNTED})
_GROUPED = Group(
    "AUC by group",
    "The AUC within each value of a column, averaged.",
    {
        "auc": Quantity(Unit.RATIO, "mean over the groups, by weight"),
        "groups": Quantity(Unit.GROUPS, "that have both classes"),
        "share": Quantity(Unit.RATIO, "of all samples by weight, in those groups"),
    },
)
_SLICES = Group(
    "metrics by slice",
    "One column by which samples are told apart.",
    {
        "values": Group(
            "values of the column", "The most frequent ones.", {"<value>": _OF_SAMPLES}
        ),
        "rest": _OF_SAMPLES,
    },
)
_EVALUATED: Fields = {
    **_MEASURED,
    "grouped_auc": Group("columns of groups", "As the job asks.", {"<column>": _GROUPED}),
    "slices": Group("columns of slices", "As the job asks.", {"<column>": _SLICES}),
}
_BUCKETS: Fields = {
    "calibration_buckets": Quantity(Unit.BUCKETS, "about equal weight each, by score")
}
_OF_LABEL = Group(
    "metrics of a label",
    "Those of one label of a job of several.",
    {**_EVALUATED, **_COUNTED, **_BUCKETS},
)
METRICS: Fields = {
    "loss": Quantity(Unit.LOSS, "that training minimises; where it is not the log loss"),
    **_EVALUATED,
    "teacher_auc": Quantity(Unit.RATIO, "AUC of the true probabilities, the best reachable"),
    "share_of_teacher": Quantity(Unit.RATIO, "(auc - 0.5) / (teacher_auc - 0.5)"),
    "recall_at_<k>": Quantity(Unit.RATIO, "of the positives, whose item is among the k best"),
    "recall_candidates": Quantity(Unit.ITEMS, "among which the item is sought"),
    "tasks": Group("labels", "Of a job of several labels.", {"<label>": _OF_LABEL}),
}
"""What is measured of a model, and goes into the summary."""

_SECONDS = Group(
    "seconds",
    "Where the time went.",
    {
        "data": Quantity(Unit.SECONDS, "waiting for the next batch, but not for files to appear"),
        "embedding": Quantity(Unit.SECONDS, "look-up, gradients and update of rows"),
        "dense": Quantity(Unit.SECONDS, "model forward, backward and update"),
        "evaluation": Quantity(Unit.SECONDS, "evaluations"),
        "checkpoint": Quantity(Unit.SECONDS, "writing checkpoints"),
    },
)
_COUNTS = Group(
    "counts",
    "What became of the rows since the beginning, in all epochs: "
    "read = applied + filtered + quarantined.",
    {
        "read": Quantity(Unit.ROWS, "of the files"),
        "filtered": Quantity(
            Unit.ROWS,
            "of another part of the split, by their time, or with no other to draw negatives from",
        ),
        "quarantined": Quantity(Unit.ROWS, "malformed, each once an epoch"),
        "applied": Quantity(Unit.ROWS, "given to the model"),
    },
)
_TABLE = Group(
    "a table",
    "Size of an embedding table; from `admitted` on of tables with admission, eviction or a "
    "budget, since the beginning.",
    {
        "rows": Quantity(Unit.ROWS, "in the table"),
        "bytes": Quantity(Unit.BYTES, "values, optimizer state and marks of use"),
        "admitted": Quantity(Unit.ROWS, "that training made"),
        "refused": Quantity(Unit.KEYS, "read as the default row in training, each time"),
        "evicted": Quantity(Unit.ROWS, "that left"),
        "evicted_age": Quantity(Unit.AGE, "mean time that they had not been used for; 0: none"),
        "dropped": Quantity(Unit.GRADIENTS, "of rows that left between look-up and update"),
        "candidates": Quantity(Unit.KEYS, "counted that have no row yet"),
        "budget_used": Quantity(Unit.RATIO, "of `max_bytes`; undefined: there is none"),
    },
)
_STATE: Fields = {
    "tables": Group("tables", "Of the job.", {"<table>": _TABLE}),
    "counts": _COUNTS,
    "rows_ahead_of_time": Quantity(Unit.ROWS, "whose time lay too far ahead to be taken"),
}

_STAGE = Group(
    "a stage",
    "Part of a step.",
    {
        "host_s": Quantity(Unit.SECONDS, "a step, of the thread that trains"),
        "device_s": Quantity(Unit.SECONDS, "a step, of a GPU's kernels and copies"),
    },
)

KINDS: Mapping[str, Kind] = {
    "start": Kind(
        "A process begins to train, at step 0 or where a checkpoint ends.", {"samples": _SAMPLES}
    ),
    "pretrained": Kind(
        "A table begins with vectors by key from files.",
        {
            "table": Quantity(Unit.TEXT, "its name"),
            "rows": Quantity(Unit.ROWS, "read, one a key"),
            "kept": Quantity(Unit.ROWS, "that the table holds, within its `max_bytes`"),
        },
    ),
    "train": Kind(
        "The steps since the last event of this kind; metrics are of each batch before its update.",
        {
            "samples": _SAMPLES,
            "window_samples": Quantity(Unit.SAMPLES, "of these steps, which were measured"),
            "positives": Quantity(Unit.SAMPLES, "of these steps whose label is 1"),
            "loss": METRICS["loss"],
            **_MEASURED,
            "tasks": METRICS["tasks"],
            "learning_rate": Quantity(Unit.RATIO, "of the dense part, at the last of the steps"),
            "samples_per_s": Quantity(
                Unit.SAMPLES_PER_S, "of training, without evaluations and checkpoints"
            ),
            "seconds": _SECONDS,
            **_STATE,
        },
        is_computed=True,
    ),
    "evaluation": Kind(
        "The held-out part, measured after a step.",
        {
            **METRICS,
            **_COUNTED,
            **_BUCKETS,
        },
        is_computed=True,
    ),
    "checkpoint": Kind(
        "A checkpoint is complete on the disk.",
        {"path": Quantity(Unit.TEXT, "its folder")},
    ),
    "warning": Kind("Something that does not end the run.", {"text": _TEXT}),
    "failed": Kind(
        "What ends the run: an error, or a signal.",
        {"text": Quantity(Unit.TEXT, "in words, with the place where a model raised")},
    ),
    "stopped": Kind(
        "The run ends early, and can go on.",
        {
            "is_whole": Quantity(Unit.FLAG, "whether the newest checkpoint is of this very step"),
            "command": Quantity(Unit.TEXT, "which goes on"),
        },
    ),
    "profile": Kind(
        "Some steps were traced (`penstock train --profile`).",
        {
            "path": Quantity(Unit.TEXT, "the trace, which Perfetto opens"),
            "steps": Quantity(Unit.STEPS, "traced"),
            "step_s": Quantity(Unit.SECONDS, "from one step to the next"),
            "device_busy": Quantity(Unit.RATIO, "of the time in which a GPU was at work"),
            "stages": Group("stages", "What a step is made of.", {"<stage>": _STAGE}),
            "text": Quantity(Unit.TEXT, "the stage that holds the run back"),
        },
    ),
    "waiting": Kind("All that is complete was read; the run waits for data.", {"text": _TEXT}),
    "stopped_early": Kind("Evaluations get no better: the run ends.", {"text": _TEXT}),
    "nothing_new": Kind("A finished run was resumed and found nothing to do.", {"text": _TEXT}),
    "summary": Kind(
        "The run has come to its end; summary.json holds the same.",
        {
            "name": Quantity(Unit.TEXT, "of the job"),
            "steps": Quantity(Unit.STEPS, "trained"),
            "samples": _SAMPLES,
            "measured_on": Quantity(Unit.TEXT, "what the metrics are of"),
            "evaluation_samples": Quantity(Unit.SAMPLES, "of the last evaluation"),
            **METRICS,
            "samples_per_s": Quantity(
                Unit.SAMPLES_PER_S, "of this process, without evaluations and checkpoints"
            ),
            "seconds": _SECONDS,
            "wall_s": Quantity(Unit.SECONDS, "of this process"),
            **_STATE,
            "quarantined_rows": Quantity(Unit.ROWS, "malformed, each once in all"),
            "checkpoint": Quantity(Unit.TEXT, "the newest one"),
            "best": Group(
                "best evaluation",
                "Where one is kept, or ends the run.",
                {
                    "metric": Quantity(Unit.TEXT, "by which it is the best"),
                    "value": Quantity(Unit.RATIO, "of that metric, in its unit"),
                    "step": Quantity(Unit.STEPS, "trained by then"),
                },
            ),
            "peak_memory_bytes": Quantity(Unit.BYTES, "resident, the sum over ranks"),
            "versions": Group(
                "versions",
                "Of what decides a run's numbers.",
                {"<package>": Quantity(Unit.TEXT, "its version")},
            ),
            "hardware": Group(
                "hardware",
                "What the process ran on.",
                {
                    "cpu": Quantity(Unit.TEXT, "its model"),
                    "cores": Quantity(Unit.CORES, "that the process may use"),
                    "memory_bytes": Quantity(Unit.BYTES, "of the machine"),
                    "gpu": Quantity(Unit.TEXT, "its model, where one is in use"),
                },
            ),
        },
    ),
}
"""By name."""

ROLES: Mapping[str, str] = {"trainer": "trains: reads batches and steps"}
"""Kinds of process that tell something."""


def field_named(fields: Fields, name: str) -> tuple[str, Quantity | Group] | None:
    """The field that a name in an event stands for, as (name with `<label>`, field)."""
    if name in fields:
        return name, fields[name]
    for pattern, field in fields.items():
        start, is_label, _ = pattern.partition("<")
        if is_label and name.startswith(start):
            return pattern, field
    return None
