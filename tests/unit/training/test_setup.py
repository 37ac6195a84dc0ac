"""What is built from a job, and what is said where it does not fit."""

import pytest
import torch

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.errors import CapacityError, ConfigError
from penstock.training import setup

FIELDS = {
    "data": {
        "source": {"format": "synthetic", "rows": 100, "num_categorical": 1},
        "label": {"column": "click"},
    },
    "features": [{"columns": ["c[0-9]*"]}],
}


def test_a_model_too_large_for_memory(monkeypatch):
    def build_model(*args, **options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 17179869184 bytes."
        )

    monkeypatch.setattr(setup, "build_model", build_model)
    job = parse_job(FIELDS)
    with pytest.raises(CapacityError) as caught:
        setup.build(job, Dataset.open(job))
    assert str(caught.value) == (
        "no memory for the parameters of the model; give it narrower layers (model)"
    )


def test_a_job_is_float32_whatever_the_program_around_it_has_set():
    torch.set_default_dtype(torch.float64)
    try:
        model = setup.build((job := parse_job(FIELDS)), Dataset.open(job)).state.model
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("model", "top"), [1 << 17], "model.top.0: input should be less than or equal to 65536"),
        (("run", "threads"), 9999, "run.threads: input should be less than or equal to"),
        (("training", "epochs"), 2**63, "training.epochs: input should be less than or equal to"),
    ],
)
def test_numbers_that_nothing_can_hold(field, value, message):
    """Found by the fuzz tests: torch, threads and 64-bit integers gave up on them."""
    with pytest.raises(ConfigError, match=message):
        parse_job({
            **FIELDS,
            field[0]: {"kind": "dlrm"} | {field[1]: value}
            if field[0] == "model"
            else {field[1]: value},
        })
