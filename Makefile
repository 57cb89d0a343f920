# Everything happens in .venv, which the first target that needs it makes. `make help` lists the targets.
# Extra arguments: make test ARGS="-m 'not ray' -x"

PYTHON ?= python3
VENV := .venv
VENV_LOWEST := .venv-lowest
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
ARGS ?=
JOBS ?= 2
MINUTES ?= 5
SEED ?=
SEEDS ?= 10000
FROM ?= 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test soak simulate lint types coverage bench build test-lowest system-packages clean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP) ## make .venv with the package (editable) and all tools

$(STAMP): pyproject.toml
	@$(call check_python)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "pip>=22.3"
	$(RUN) -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(STAMP) ## train on a cluster of this machine while workers are killed; see the work go on
	$(RUN) examples/train_digits.py --demo $(ARGS)

test: $(STAMP) system-packages ## run all tests, in JOBS processes: a file of tests stays in one
	$(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

soak: $(STAMP) ## all faults at random, on three nodes of this machine: make soak MINUTES=30 [SEED=7]
	$(RUN) -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

simulate: $(STAMP) ## the library in simulated schedules, 5000 a minute: make simulate SEEDS=100000 [FROM=0]
	$(RUN) -m tests.simulate --seeds $(SEEDS) --from $(FROM) $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

types: $(STAMP) ## mypy, strict; and what pyright says of the public types: complete, and wrong calls are errors
	$(RUN) -m mypy
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pyright --verifytypes faultguard --ignoreexternal
	$(RUN) -m pyright --pythonpath $(RUN) tests/typing_api.py

coverage: $(STAMP) system-packages ## run all tests, count the lines they reach in every process
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest $(ARGS)
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report

bench: $(STAMP) ## measure the performance budget
	$(RUN) benchmarks/run.py $(ARGS)

build: $(STAMP) ## make the sdist and the wheel in dist/
	$(RUN) -m build

# The lower bounds are read from pyproject.toml, from `dependencies` to the last extra before `test`.
test-lowest: ## run the tests without a cluster, then the demo, with the oldest dependencies we promise
	@$(call check_python)
	$(PYTHON) -m venv --clear $(VENV_LOWEST)
	sed -n '/^dependencies = \[/,/^test = \[/s/^ *"\([a-z0-9-]*\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml > $(VENV_LOWEST)/constraints.txt
	grep '^ray==' $(VENV_LOWEST)/constraints.txt
	$(VENV_LOWEST)/bin/python -m pip install --quiet "pip>=22.3"
	$(VENV_LOWEST)/bin/python -m pip install --quiet --constraint $(VENV_LOWEST)/constraints.txt --editable ".[cli,cloud,dashboard,test]"
	$(VENV_LOWEST)/bin/python -m pytest -m "not ray" $(ARGS)
	$(VENV_LOWEST)/bin/python examples/train_digits.py --demo

system-packages:
	@sh tests/install_system_packages.sh

clean: ## remove what these targets made (never checkpoints)
	rm -rf $(VENV) $(VENV_LOWEST) build dist .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find faultguard tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
|| { echo "error: faultguard needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
|| { echo "error: $(PYTHON) cannot make virtual environments (no venv or ensurepip module); on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
endef
