"""A pytest plugin: tests run on the core in the file PENSTOCK_CORE, not on the installed one."""

import importlib.util
import os
import sys

FILE = os.environ["PENSTOCK_CORE"]
_spec = importlib.util.spec_from_file_location("penstock._core", FILE)
sys.modules["penstock._core"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["penstock._core"])


def pytest_sessionfinish():
    import penstock.embedding.host_store as host_store

    assert host_store._core.__file__ == FILE
