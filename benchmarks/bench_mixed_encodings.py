"""What FBGEMM's row-wise Adagrad pays for mixing encodings of vector instructions, on this machine.

    python benchmarks/bench_mixed_encodings.py

Nanoseconds a row of its loop (mixed_encodings.cc), in turns with the same loop in AVX encodings
alone: why FBGEMM's figures of bench_host_store.py differ from machine to machine. Prints one JSON
object. Needs a C++ compiler (`c++`) and AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import json

import numpy as np
from circumstances import commit, hardware
from native import compile_library

ROWS = 1_000_000
TURNS = 7


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    library = compile_library("mixed_encodings.cc")
    times: dict[str, list[float]] = {"mixed": [], "avx_alone": []}
    for _ in range(TURNS):
        for name, each in times.items():
            function = library[name]
            function.restype = ctypes.c_double
            each.append(function(ctypes.c_int64(ROWS)))
    result: dict = {"case": "row-wise Adagrad of FBGEMM, D16, one row again and again"}
    for name, each in times.items():
        result[f"{name}_ns_a_row"] = round(float(np.median(each)), 1)
        result[f"{name}_ns_a_row_range"] = [round(min(each), 1), round(max(each), 1)]
    print(json.dumps({**result, "commit": commit(), "hardware": hardware("the loop on one")}))


if __name__ == "__main__":
    main()
