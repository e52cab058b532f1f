# make quickstart   trains a small NAT detector and a DiNAT segmentor on generated data and shows what they see
# make test         the tests
# Both set up .venv first, and do nothing twice.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
HF4 := .venv-hf4
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
# Two processes of one thread: the tests are many and small, and each process imports the mm packages once.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# The GPU kernels on a CPU. Triton reads the variable when torch first imports it, so these tests have processes of their own.
KERNEL_TESTS := tests/ops/test_triton.py tests/models/test_gelu.py tests/models/test_add_norm.py
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) $(KERNEL_TESTS)
SOURCES := setup.py setup.cfg pyproject.toml $(wildcard nat_dense/ops/csrc/*)

.PHONY: quickstart test test-slow test-hf4 test-gpu test-gpu-memcheck lint format clean setup

quickstart: $(VENV)/.installed
	$(BIN)/python tools/quickstart.py

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"
	$(INTERPRETED) -m "not slow"

test-slow: $(VENV)/.installed
	$(PYTEST) -m slow
	$(INTERPRETED) -m slow

# On a machine with a GPU, in any environment that has torch, triton and pytest. With pytest-xdist,
# `PYTEST_ADDOPTS="-n 10" make test-gpu` compiles the kernels side by side: 83 s on an H200 and 16 cores.
test-gpu:
	@$(PYTHON) -c "import sys; from nat_dense.ops.triton_launch import why_no_kernels; sys.exit(why_no_kernels('cuda'))"
	$(PYTHON) -m pytest $(KERNEL_TESTS) tests/ops/test_gpu.py tests/ops/test_natten.py tests/models/test_mlp.py

# Reads and writes outside of tensors; slow. Without torch's own pool of memory they would go unseen.
test-gpu-memcheck:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	    $(PYTHON) -m pytest $(KERNEL_TESTS) -k "float32 and not shared and not full_size"

# transformers 4.57.6 is the last release with a NAT of its own. The native kernels are those of .venv: one torch.
test-hf4: $(VENV)/.installed $(HF4)/.installed
	$(HF4)/bin/python -m pytest tests/hf

$(HF4)/.installed:
	$(PYTHON) -m venv $(HF4)
	$(HF4)/bin/python -m pip install "$(TORCH)" transformers==4.57.6 accelerate pillow pytest scipy
	@touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed

$(VENV)/.torch:
	@PYTHON="$(PYTHON)" sh tools/check_prerequisites.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install setuptools wheel ninja psutil
	@touch $@

# onedl-mmcv compiles here the first time, for about ten minutes on two cores; pip keeps its wheel.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	MAX_JOBS=$(JOBS) $(BIN)/python -m pip install --no-build-isolation --editable ".[mm,dev,hf,onnx]"
	@touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
