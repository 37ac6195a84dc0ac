"""A job clips tables with the dense part only where it says so."""

import torch
from run_contents import contents

from penstock import run as story
from penstock.config import parse_job


def moved(fields, out, console, **training):
    """How far the rows are from where they began, in all."""
    fields["training"] |= {"max_steps": 4, **training}
    fields["table_defaults"] = {"optimizer": {"kind": "sgd", "learning_rate": 1.0}}
    story.train(parse_job(fields), out, console=console)
    return contents(out)["tables"]


def test_only_where_it_says_so(small_fields, tmp_path, quiet):
    plain = moved(small_fields, tmp_path / "plain", quiet)
    dense = moved(small_fields, tmp_path / "dense", quiet, clip_gradient_norm=1e-6)
    both = moved(
        small_fields, tmp_path / "both", quiet, clip_gradient_norm=1e-6, clip_with_tables=True
    )
    frozen = moved(
        {**small_fields, "table_defaults": {}},
        tmp_path / "frozen",
        quiet,
        clip_gradient_norm=1e-9,
        clip_with_tables=True,
    )
    for name in plain:
        first = frozen[name]["values"]  # moved by less than their bits show
        far = [(part[name]["values"] - first).norm() for part in (plain, dense, both)]
        assert far[0] > 1e-3
        assert far[1] > 1e-3
        assert far[2] < 1e-5
        assert torch.equal(both[name]["keys"], plain[name]["keys"])
