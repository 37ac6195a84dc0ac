"""Which fields a resumed run may change: found by their marks, wherever they lie."""

from typing import Annotated, Literal

import pytest

from penstock.config import TableConfig
from penstock.config.base import MAY_CHANGE, Config, changeable_fields
from penstock.config.job import Job


class Leaf(Config):
    stays: int = 0
    changes: Annotated[int, MAY_CHANGE] = 0


class OneKind(Config):
    kind: Literal["one"] = "one"
    rate: Annotated[int, MAY_CHANGE] = 1
    leaf: Leaf = Leaf()


class OtherKind(Config):
    kind: Literal["other"] = "other"
    rate: int = 1
    pace: Annotated[int | None, MAY_CHANGE] = None


class Root(Config):
    leaf: Leaf = Leaf()
    some: tuple[Leaf, ...] = ()
    some_or_none: tuple[Leaf | None, ...] | None = None
    kinds: OneKind | OtherKind | None = None
    listed: tuple[OneKind | OtherKind, ...] = ()
    whole: Annotated[Leaf, MAY_CHANGE] = Leaf()


def test_marks_are_found_in_groups_lists_and_kinds():
    marked = [
        "leaf.changes",
        "some.*.changes",
        "some_or_none.*.changes",
        "kinds.rate",
        "kinds.leaf.changes",
        "kinds.pace",
        "listed.*.rate",
        "listed.*.leaf.changes",
        "listed.*.pace",
        "whole",
    ]
    both = [glob for path in marked for glob in (f"x.{path}", f"x.{path}.*")]
    assert changeable_fields(Root, "x.") == both


@pytest.mark.parametrize(
    ("kind", "marked"),
    [
        (
            Job,
            """
            name data.source.path data.source.arguments data.source.quoted_line_breaks
            data.source.on_malformed_row
            data.source.poll data.source.streams.*.end data.source.streams.*.sources.*.marker
            data.source.streams.*.sources.*.lateness
            data.source.streams.*.sources.*.closes_after
            data.source.streams.*.sources.*.files.path
            data.source.streams.*.sources.*.files.quoted_line_breaks
            data.source.streams.*.sources.*.files.on_malformed_row
            data.evaluation_source data.most_malformed data.shuffle.block_bytes
            tables table_defaults
            training.batch_size training.accumulate_batches training.epochs training.max_steps
            training.optimizer.learning_rate training.optimizer.weight_decay
            training.optimizer.schedule training.clip_gradient_norm training.clip_with_tables
            training.early_stopping training.autocast run evaluation checkpoint report
            """,
        ),
        (
            TableConfig,
            """
            optimizer.learning_rate optimizer.weight_decay optimizer.clip_norm
            optimizer.weight_bound optimizer.schedule trainable placement
            """,
        ),
    ],
)
def test_what_may_change_is_what_the_page_of_checkpoints_says(kind, marked):
    # Another mark changes what a checkpoint is: docs/checkpoint_format.md lists them, too.
    found = [path for path in changeable_fields(kind) if not path.endswith(".*")]
    assert sorted(found) == sorted(marked.split())
