"""`trainable: false` in a job: rows stay, through checkpoints, and the field changes at resume."""

import torch
from run_contents import contents

from penstock import run as story
from penstock.config import parse_job


def train_to(fields, out, step, console, *, trainable, resume=True):
    fields["table_defaults"] = {**fields.get("table_defaults", {}), "trainable": trainable}
    fields["training"]["max_steps"] = step
    story.train(parse_job(fields), out, resume=resume, console=console)
    return contents(out)


def same(left, right):
    return all(
        torch.equal(left[table][column], right[table][column])
        for table in left
        for column in left[table]
    )


def test_tables_are_frozen_and_thawed_at_resume(small_fields, tmp_path, quiet):
    out = tmp_path / "run"
    first = train_to(small_fields, out, 8, quiet, trainable=True, resume=False)
    frozen = train_to(small_fields, out, 16, quiet, trainable=False)
    assert same(frozen["tables"], first["tables"])
    assert not same({"": frozen["dense"]}, {"": first["dense"]})
    thawed = train_to(small_fields, out, 24, quiet, trainable=True)
    assert thawed["step"] == 24
    assert all(
        len(thawed["tables"][name]["keys"]) > len(table["keys"])
        for name, table in frozen["tables"].items()
    )
    evaluated = story.evaluate(out, None)
    assert evaluated
