# make demo      the demonstration on the shipped model (a few minutes)
# make test      the Python tests
# make cpp-test  the C++ tests of csrc/core, of the emulation and of the PTX wrappers
# make lint      ruff, clang-format, mypy
# make clean     removes what was built
#
# Each sets up what it needs: Python 3.10+ and a C++17 compiler are enough. Packages go into the
# active virtual environment, or into .venv where none is active. An installed torch is kept;
# otherwise TORCH says what pip installs, its options included:
#   make demo TORCH="torch --index-url <address of an index with CPU builds>"

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Each test runs on one thread; some gigabytes of memory for each of these processes.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
BUILD := build/cmake
EMULATION := build/emulation

cpp_files := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | sort)
build_inputs := $(cpp_files) setup.py pyproject.toml tools/build_backend.py

# Stamps: the package is installed, and so are the tools for working on it.
installed := $(VENV)/.lminf-installed
installed_dev := $(VENV)/.lminf-installed-dev

.PHONY: demo test cpp-test lint clean

demo: $(installed)
	$(BIN)/lminf demo

test: $(installed_dev)
	$(BIN)/python -m pytest $(PARALLEL)

cpp-test: $(BIN)/cmake
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(BUILD) -G Ninja
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	PATH="$(abspath $(BIN)):$$PATH" cmake -S csrc/emulation -B $(EMULATION) -G Ninja \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python"
	$(BIN)/cmake --build $(EMULATION)
	$(BIN)/ctest --test-dir $(EMULATION) --output-on-failure

lint: $(installed_dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(cpp_files)
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info lminf_cuda/*.so .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/cmake: | $(BIN)/python
	$(BIN)/python -m pip install cmake ninja nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl

$(installed): $(build_inputs) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e .
	touch $@

$(installed_dev): $(build_inputs) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[dev]"
	touch $(installed) $@
