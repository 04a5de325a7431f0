# One verb per chore. Each target installs what it needs into .venv first, and does nothing twice.
#
#   make demo        a private model, end to end, in about a minute and a half    (make demo ARGS=--fresh)
#   make federated-demo   three sites and a coordinator, each in processes of its own  (ARGS=--in-process)
#   make test        the tests                                                    (make test ARGS="-k ledger")
#   make test-slow   the statistical and kill tests, which take minutes
#   make test-vllm   the tests that need vLLM: TG_TINKER_VLLM_PYTHON=/path/to/venv/bin/python
#   make check       format, lint, types, import map, freshness of generated code
#   make bench       step time and memory against peers, service overhead         (make bench ARGS=--quick)
#   make docs        run every snippet of the documents, check every link
#   make proto       generate the protobuf code again
#   make serve       a server on this machine                                     (make serve ARGS="--help")
#   make clean       remove .venv and caches; never a ledger
#
# PYTHON chooses the interpreter that makes .venv (3.11 or newer). On Linux, PyPI's torch brings CUDA with it;
# TORCH_INDEX=https://download.pytorch.org/whl/cpu fetches the small CPU build instead.

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
SETUP := $(PYTHON) scripts/make_venv.py
INPUTS := pyproject.toml constraints.txt scripts/make_venv.py
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

export TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help demo federated-demo test test-slow test-vllm check bench docs proto serve clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -15

.venv/.installed-demo: $(INPUTS)
	@$(SETUP) demo
	@touch $@

.venv/.installed-dev: $(INPUTS)
	@$(SETUP) dev
	@touch $@ .venv/.installed-demo

demo: .venv/.installed-demo
	@$(BIN)/tg-tinker demo $(ARGS)

federated-demo: .venv/.installed-demo
	@$(BIN)/tg-tinker federated demo $(ARGS)

serve: .venv/.installed-demo
	@$(BIN)/tg-tinker serve $(ARGS)

test: .venv/.installed-dev
	$(PYTEST) -n 2 -m "not slow" $(ARGS)

test-slow: .venv/.installed-dev
	$(PYTEST) -n 2 -m slow $(ARGS)

test-vllm: .venv/.installed-dev
	$(PYTEST) tests/vllm $(ARGS)

docs: .venv/.installed-dev
	$(PYTEST) tests/docs $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check

bench: .venv/.installed-dev
	$(BIN)/python -m benchmarks.engine $(ARGS)
	@test ! -f benchmarks/service.py || $(BIN)/python -m benchmarks.service $(ARGS)
	@test ! -f benchmarks/gateway.py || $(BIN)/python -m benchmarks.gateway $(ARGS)

proto: .venv/.installed-dev
	$(BIN)/python proto/generate.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
