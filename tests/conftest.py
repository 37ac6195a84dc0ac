"""Shared by all tests: where a GPU is missing, tests that need one are skipped with a reason.

Kernels are tested all the same, on small sizes, in Triton's interpreter.
"""

import importlib.util
import os

# As the command line does: idle threads sleep instead of spinning. Must precede torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

if not torch.cuda.is_available():
    # Triton's kernels run on the CPU then, in its interpreter. Must precede their import.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from tests import fast_interpreter

        fast_interpreter.install()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
