"""Runs that something stops, for tests of what comes after."""

import pytest

from penstock import run as story
from penstock.config import AdmitFrequent, Eviction


def crash(job, out, step, monkeypatch, console):
    """Trains a job up to a step at which the power goes."""
    real = story.train_step

    def train_step(*arguments):
        if arguments[2] == step:
            raise RuntimeError("the power went")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(story, "train_step", train_step)
        with pytest.raises(RuntimeError, match="the power went"):
            story.train(job, out, console=console)


def with_rules(job):
    """The job with keys that are refused and rows that leave."""
    rules = {
        "admission": AdmitFrequent(min_count=2, half_life_steps=8),
        "max_bytes": 200 * (24 + 4 * 26),
        "eviction": Eviction(order="lfu", half_life=10, ttl=20),
    }
    defaults = job.table_defaults.model_copy(update=rules)
    return job.model_copy(update={"table_defaults": defaults})
