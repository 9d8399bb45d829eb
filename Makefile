# Every target works from a fresh clone: it creates .venv and installs the project into it.
# VENV=/path uses an existing environment instead: nothing is installed into it, and missing packages are listed.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.moe-megatron
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)

.PHONY: venv demo test test-slow test-latest test-gpu bench-gpu lint

venv: $(STAMP)

ifneq ($(filter command environment,$(firstword $(origin VENV))),)
# An environment of the user: check it and change nothing.
$(STAMP): FORCE
	@$(BIN)/python tools/check_environment.py
.PHONY: FORCE
FORCE:
else
$(STAMP): pyproject.toml constraints.txt setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(BIN)/python tools/check_environment.py
	@touch $(STAMP)
endif

demo: venv
	PYTHON=$(BIN)/python bash examples_deepspeed/MoE/demo.sh

# Tests start up to four ranks, with one thread each.
test test-slow test-latest test-gpu: export OMP_NUM_THREADS := 1

# Most tests use one core, so two processes share the test files, in the order set by tests/conftest.py. A file is not
# split, because each process has pools of ranks of its own.
test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The long tests, and the property tests again on random examples: `make test` repeats the same examples every time.
test-slow: export HYPOTHESIS_PROFILE ?= random
test-slow: venv
	$(BIN)/python -m pytest -m "slow or hypothesis"

# The tests with the newest torch, in .venv-latest. TORCH=torch==2.14.0, or the path of a wheel, selects another one.
test-latest: export TORCH := $(TORCH)
test-latest: venv
	$(BIN)/python tools/test_latest.py

# The tests that need a GPU, and the MoE layer against other systems' on one. Without a GPU they say what is missing and
# fail with exit code 2.
test-gpu bench-gpu: venv
	$(BIN)/python tools/gpu.py $(@:-gpu=)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
