# Quorate: set-up, demo, tests. `make` lists what there is.
#
# Needs Python 3.11 or later and make, nothing else; everything is installed into $(VENV).

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# Seconds for each fuzz test in `make fuzz`; without it, in `make test`, each looks for some seconds only.
FUZZ_SECONDS ?= 60

# Seconds that `make simulate` looks for bugs, in fleets that nobody has simulated before.
SIMULATE_SECONDS ?= 300

# Seconds that `make kill` lasts; `make test` takes twelve of them.
KILL_SECONDS ?= 60

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help

# pip asks the network for news of itself and explains itself at length; neither belongs in a set-up.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# A dot for each package, so that a slow network does not look like a hang; what pip says is shown when it fails.
DOTS := awk '/^ *(Collecting|Requirement already)/ { printf "."; fflush() }'

# Debian's python3 comes without what makes virtual environments. Root's own machine may be given it; nobody else's.
GET_VENV := test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo 'Installing python3-venv with apt-get' && \
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; } >/dev/null && \
    $(PYTHON) -c 'import ensurepip, venv'

.PHONY: help
help: ## list the targets
	@printf 'Quorate. Targets:\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: PYTHON=%s VENV=%s ARGS="..." (for demo, test, fuzz, kill, simulate and bench) FUZZ_SECONDS=%s KILL_SECONDS=%s SIMULATE_SECONDS=%s\n' \
	    '$(PYTHON)' '$(VENV)' '$(FUZZ_SECONDS)' '$(KILL_SECONDS)' '$(SIMULATE_SECONDS)'

.PHONY: demo
demo: $(STAMP) ## one coordinator and six agents on a real data set (ARGS="--dataset phishing")
	@$(BIN)/quorate demo $(ARGS)

.PHONY: test
test: lint ## lint, then all tests (ARGS="-k settings")
	@$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 --durations-min=1 $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP) ## look for trouble in the wire and the transport (FUZZ_SECONDS=600 for most tests; 60)
	@[[ '$(FUZZ_SECONDS)' =~ ^[0-9]+([.][0-9]+)?$$ ]] || { echo 'FUZZ_SECONDS is a number of seconds, and not $(FUZZ_SECONDS)' >&2; exit 2; }
	@QUORATE_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz --timeout=0 $(ARGS)

.PHONY: simulate
simulate: $(STAMP) ## look for bugs under virtual time, in fresh seeds (SIMULATE_SECONDS=300, ARGS="--agents 1000")
	@$(BIN)/quorate simulate --budget $(SIMULATE_SECONDS)s $(ARGS)

.PHONY: kill
kill: $(STAMP) ## kill -9 coordinator and agents under load, then audit the journal (KILL_SECONDS=600 for longer; 60)
	@[[ '$(KILL_SECONDS)' =~ ^[0-9]+([.][0-9]+)?$$ ]] || { echo 'KILL_SECONDS is a number of seconds, and not $(KILL_SECONDS)' >&2; exit 2; }
	@QUORATE_KILL_SECONDS=$(KILL_SECONDS) $(BIN)/python -m pytest tests/faults/test_kill.py -s $(ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff, the formatter's check, mypy
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { $(BIN)/ruff format --check; exit 1; }
	@$(BIN)/mypy

.PHONY: format
format: $(STAMP) ## let ruff mend what it can
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

.PHONY: bench
bench: $(STAMP) ## measure on this machine (ARGS="--help" lists what)
	@$(BIN)/quorate bench $(or $(ARGS),coordination)

.PHONY: venv
venv: $(STAMP) ## the virtual environment, made once and again when its inputs change

# Made afresh and not updated: what a pin no longer names must not linger and be imported.
# The build backend goes first and is used without isolation, so that it is the pinned one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'Quorate needs Python 3.11 or later; $(PYTHON) is' \
	        "$$($(PYTHON) --version 2>&1 || echo 'not there'). Say which to use: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(GET_VENV); } || { \
	    echo '$(PYTHON) cannot make virtual environments. On Debian, as root: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Making $(VENV) with '"$$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@printf 'Installing Quorate and what it needs, once: a minute or two '
	@log=$(VENV)/install.log; { \
	    $(PIP) install -c constraints.txt hatchling && \
	    $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'; } 2>"$$log" | tee -a "$$log" | $(DOTS) || { \
	    printf '\n'; tail -n 30 "$$log" >&2; echo 'The installation failed; all of it is in '"$$log" >&2; exit 1; }
	@printf ' done\n'
	@touch $@

.PHONY: constraints
constraints: ## renew constraints.txt: the newest versions that resolve together
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch/venv"; \
	pip="$$scratch/venv/bin/python -m pip --disable-pip-version-check --no-input"; \
	printf 'Resolving '; \
	{ $$pip install hatchling && $$pip install --no-build-isolation -e '.[dev]'; } | $(DOTS); printf ' done\n'; \
	{ sed '/^$$/q' constraints.txt; \
	  $$pip freeze --exclude-editable --exclude pip --exclude setuptools; } > "$$scratch/constraints.txt"; \
	cp "$$scratch/constraints.txt" constraints.txt; \
	echo "constraints.txt: $$(grep -c == constraints.txt) packages"

.PHONY: clean
clean: ## remove the virtual environment, caches and builds
	@rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find protocol agent coordinator tests -name __pycache__ -type d -prune -exec rm -rf {} +
