# Every target works from a fresh clone: what it needs is set up first, once.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.installed
S3_DATA ?=
BENCH_READY := .venv/.bench-installed

# One thread per rank: many ranks share the cores, and results repeat.
demo test bench bench-full test-crash: export OMP_NUM_THREADS := 1

.PHONY: help setup demo test test-crash docs lint bench bench-full s3 clean

help: ## show this list
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(READY) ## make .venv and install everything into it

$(READY): pyproject.toml constraints.txt constraints-s3-server.txt
	@for python in python3.11 python3; do \
	  if $$python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then break; fi; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then echo "Python 3.11 or newer is needed: install it and repeat" >&2; exit 1; fi; \
	$$python -m venv .venv
	@echo "installing into .venv (torch is large: this takes minutes, once)"
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[s3,dev]"
	@$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement constraints-s3-server.txt
	@touch $@

demo: $(READY) ## train, kill, resume on another number of ranks
	$(BIN)/python launch/demo.py

# Two at a time: most tests wait for processes and disks. Those of one file share their ranks and servers.
test: lint ## lint, types and all tests but the long ones
	$(BIN)/python -m pytest -m "not slow and not crash" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-crash: $(READY) ## every crash point, real kills and bad networks (about an hour)
	$(BIN)/python -m pytest -m crash

docs: $(READY) ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) $(BENCH_READY) ## measure everything quickly, beside stock DCP, and hold it to what is needed
	$(BIN)/python benchmarks/suite.py --quick

bench-full: $(READY) $(BENCH_READY) ## the same at full size (an hour), with the table and the plot of the README
	$(BIN)/python benchmarks/suite.py --readme

$(BENCH_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[s3,dev,bench]"
	@touch $@

s3: $(READY) ## an S3 server on this machine until Ctrl-C; prints how to use it (S3_DATA keeps its data)
	$(BIN)/python -m dcp_ckpt.testing.s3_server $(if $(S3_DATA),--data $(S3_DATA))

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist ./*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
