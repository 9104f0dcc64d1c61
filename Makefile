# One .venv serves every target; it is rebuilt when the project's requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint types clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvstore needs Python 3.11 or newer, $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; about a minute, torch included)..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[transformers,dev]'
	@touch $@

demo: $(STAMP) ## A model's KV cache goes through S3 and comes back (TEXT=file, MODEL=folder)
	@$(BIN)/python -m examples.demo $(if $(TEXT),--text "$$TEXT") $(if $(MODEL),--model "$$MODEL")

test: $(STAMP) ## Run the test suite
	@$(BIN)/python -m pytest $(ARGS)

bench: $(STAMP) ## Run one benchmark: NAME=roundtrip
	@test -n '$(NAME)' || { echo "usage: make bench NAME=x, x one of: $$(ls benchmarks | sed -n 's/^\([a-z].*\)\.py$$/\1/p' | tr '\n' ' ')"; exit 2; }
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

lint: $(STAMP) ## Check style (ruff)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## Check types (mypy strict)
	@$(BIN)/mypy

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
