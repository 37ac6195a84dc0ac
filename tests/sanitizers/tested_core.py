"""A pytest plugin: tests run on the core in the file PENSTOCK_CORE, not on the installed one."""

import importlib.util
import os
import sys

import pytest

FILE = os.environ["PENSTOCK_CORE"]
_spec = importlib.util.spec_from_file_location("penstock._core", FILE)
sys.modules["penstock._core"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["penstock._core"])

IN_PYTHON = pytest.mark.skip(reason="a store in Python: nothing of the core")
ON_GPU = pytest.mark.skip(reason="a store on a GPU: nothing of the core")
# "starting new threads after multi-threaded fork is not supported", it says, and ends the child;
# told to go on all the same, it takes the child's threads for those of the parent.
IN_CHILDREN = pytest.mark.skip(reason="the thread sanitizer takes no threads of a forked child")
WITH_CHILDREN = {
    "test_a_child_goes_on_with_what_the_parent_had",
    "test_a_fork_waits_for_a_call_of_another_thread",
    "test_workers_of_a_data_loader_may_look_up",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("open_store") == "dict":
            item.add_marker(IN_PYTHON)
        if "gpu" in item.nodeid:
            item.add_marker(ON_GPU)
        if "TSAN_OPTIONS" in os.environ and item.originalname in WITH_CHILDREN:
            item.add_marker(IN_CHILDREN)


def pytest_sessionfinish():
    import penstock.embedding.host_store as host_store

    assert host_store._core.__file__ == FILE
