"""How long a run will be, as far as its data tells before it is read."""

from __future__ import annotations

from penstock.config import Job
from penstock.data.dataset import Dataset
from penstock.data.plan.counting import Stages
from penstock.data.source import RowCount


def planned_steps(job: Job, dataset: Dataset, stages: Stages) -> int:
    """Steps of the whole run, if no row is quarantined. Reads text once to count its rows."""
    training = job.training
    if dataset.grows and training.max_steps is not None:
        return training.max_steps
    samples = dataset.num_samples("train", stages)
    batches = -(-samples // training.batch_size)
    steps = training.epochs * -(-batches // training.accumulate_batches)
    return steps if training.max_steps is None else min(steps, training.max_steps)


def planned_samples(job: Job, dataset: Dataset) -> RowCount | None:
    """Samples that the whole run will see, if no row is quarantined, as far as they are known."""
    expected, steps = dataset.expected_samples("train"), job.training.max_steps
    per_step = job.training.batch_size * job.training.accumulate_batches
    most = None if steps is None else steps * per_step
    if expected is None:
        return None if most is None else RowCount(most, is_exact=False)
    samples = expected.rows * job.training.epochs
    return expected._replace(rows=samples if most is None else min(samples, most))
