# One .venv serves every target; it is rebuilt when the project's requirements change. Benchmarks that
# compare with other libraries have another: botocore signs and checks differently where awscrt is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV := .cache/bench
BENCH_STAMP := $(BENCH_VENV)/.installed
BENCH_ALONE := read_path

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvstore needs Python 3.11 or newer, $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint types clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; about a minute, torch included)..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[transformers,dev]'
	@touch $@

demo: $(STAMP) ## A model's KV cache goes through S3 and comes back (TEXT=file, MODEL=folder)
	@$(BIN)/python -m examples.demo $(if $(TEXT),--text "$$TEXT") $(if $(MODEL),--model "$$MODEL")

test: $(STAMP) ## Run the test suite
	@$(BIN)/python -m pytest $(ARGS)

$(BENCH_STAMP): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	@echo "Installing into $(BENCH_VENV) (once)..."
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

bench: $(if $(filter $(BENCH_ALONE),$(NAME)),$(BENCH_STAMP),$(STAMP)) ## Run one benchmark: NAME=roundtrip; without NAME, lists them
	@test -n '$(NAME)' || { echo "usage: make bench NAME=x [ARGS=--help], x one of:"; \
		for file in $$(grep -l 'prog="make bench' benchmarks/*.py); do \
			printf '  %-14s %s\n' "$$(basename $$file .py)" "$$(sed -n '1s/^"""//p' $$file)"; done; exit 2; }
	@$(if $(filter $(BENCH_ALONE),$(NAME)),$(BENCH_VENV)/bin,$(BIN))/python -m benchmarks.$(NAME) $(ARGS)

lint: $(STAMP) ## Check style (ruff)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## Check types (mypy strict)
	@$(BIN)/mypy

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
