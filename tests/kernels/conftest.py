"""Kernels run on a GPU where there is one, else in Triton's interpreter; new memory is poisoned."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported, or it has no effect.
    os.environ.setdefault("TRITON_INTERPRET", "1")

POISON = {torch.float32: float("nan"), torch.int32: 2**31 - 5, torch.int64: 2**62}


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fills what torch.empty returns: memory that a kernel forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned_empty(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(POISON[made.dtype]) if made.dtype in POISON else made

    def poisoned_empty_like(*args, **kwargs):
        made = empty_like(*args, **kwargs)
        return made.fill_(POISON[made.dtype]) if made.dtype in POISON else made

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", poisoned_empty_like)
