"""What the command line asks of the C library's allocator."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from penstock import _core

if sys.argv[1] == "keep":
    _core.keep_freed_memory()
for _ in range(3):
    np.ones(5_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(5_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep freed memory")
def test_large_arrays_made_again_fault_no_pages():
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", PROGRAM, how]))
        for how in ("keep", "default")
    }
    # 40 MB each: above the 32 MB up to which glibc learns by itself.
    assert faults["keep"] < 200 < faults["default"]
