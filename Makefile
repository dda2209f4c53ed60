# PYTHON, TORCH_INDEX and VENV are explained in tools/bootstrap.sh; pip's own variables (PIP_INDEX_URL, ...) work as usual.
.DEFAULT_GOAL := help
.PHONY: help venv corpus quickstart finetune test test-slow test-slurm test-parallel-full test-newest test-gpu bench-gpu
.PHONY: bench-gpu-dry-run container-test lint format lock clean

VENV ?= .venv
BIN := $(VENV)/bin
SHELL_SCRIPTS = .ci/run $(wildcard tools/*.sh examples/*.sh examples/*/*.sh examples/*/*.env tests/container/*.sh)
DOCKERFILES = Dockerfile tests/container/standin.Dockerfile
export VENV
export OMP_NUM_THREADS ?= 1

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

venv:  ## .venv with the locked dependencies and this package; instant when up to date
	@tools/bootstrap.sh

corpus: venv  ## the demo corpus (built once, then reused)
	@$(BIN)/mm1 data demo

quickstart: venv  ## corpus, training of mm1-tiny on 2 processes, captions of held-out images: 10 minutes on 2 cores
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart.sh

finetune: quickstart  ## its model fine-tuned on conversations at two resolutions, asked before and after: 15 minutes more
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/finetune_quickstart.sh

test: corpus  ## every test that needs no GPU and is not slow
	$(BIN)/pytest -q -m "not slow and not gpu and not slurm"

test-slow: corpus  ## the tests that take minutes
	$(BIN)/pytest -q -m "slow and not gpu and not slurm and not parity_full" --timeout 1800

test-slurm: corpus  ## the scripts of examples/slurm/ on a Slurm cluster, started here; as root, installs Slurm
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest -q -m slurm --timeout 1800 tests/slurm

test-parallel-full: venv  ## every legal parallel layout of at most 8 processes, not only those that cover every pair
	$(BIN)/pytest -q -m parity_full --timeout 3600 tests/parallel/test_parity.py

test-newest:  ## the same tests with the newest torch, in .venv-newest
	@VENV=.venv-newest tools/bootstrap.sh --newest-torch
	.venv-newest/bin/mm1 data demo
	.venv-newest/bin/pytest -q -m "not slow and not gpu and not slurm"

test-gpu: venv  ## what only a GPU can show; there a skipped test fails the run
	$(BIN)/pytest -q -m gpu tests/gpu

bench-gpu: venv  ## speed on one H100: slices of the presets, at most 16 minutes; writes benchmarks/cards/
	$(BIN)/python benchmarks/gpu.py

bench-gpu-dry-run: venv  ## the same without a GPU: every slice and variant on torch's meta device
	$(BIN)/python benchmarks/gpu.py --dry-run

container-test: venv  ## the Dockerfile, built on a stand-in for its base image, and tests inside; Debian, as root
	PYTHON=$(BIN)/python tests/container/test.sh

lint: venv  ## ruff, mypy, shellcheck, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_mm1
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	$(BIN)/hadolint $(DOCKERFILES)

format: venv  ## ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: venv  ## resolve requirements.lock anew (PIP_CONSTRAINT=requirements.lock keeps what is locked)
	$(BIN)/python tools/lock.py

clean:  ## remove the environments, caches and build outputs; the demo corpus and runs/ stay
	rm -rf .venv .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
