# make demo, make test and make lint each work alone from an empty clone: they create .venv and install into it.
# VENV=/path uses an environment you already have: nothing is installed into it, what is missing is named.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.moe-megatron
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)

.PHONY: venv demo test test-slow lint

venv: $(STAMP)

ifneq ($(filter command environment,$(firstword $(origin VENV))),)
# An environment of the user's: check it, leave it as it is.
$(STAMP): FORCE
	@$(BIN)/python tools/check_environment.py
.PHONY: FORCE
FORCE:
else
$(STAMP): pyproject.toml constraints.txt setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@echo "compiling DeepSpeed's CPU communication operator (once, about a minute)"
	@$(BIN)/python tools/check_environment.py --build
	@touch $(STAMP)
endif

demo: venv
	PYTHON=$(BIN)/python bash examples_deepspeed/MoE/demo.sh

# Tests start up to four ranks: one thread each.
test test-slow: export OMP_NUM_THREADS := 1

# Two processes share the files, in the order of tests/conftest.py: most tests use one core. Pools of ranks are per process.
test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: venv
	$(BIN)/python -m pytest -m slow

lint: venv
	$(BIN)/ruff check .
