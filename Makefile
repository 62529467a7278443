# make demo | test | slow | lint | env | clean. The environment is made once, outside the clone: see .ci/env.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test slow lint env ready clean

# Read when a recipe runs, that is after `ready` made sure that it is there.
ENV = $(shell bash .ci/env)
export PYTHONPATH := $(CURDIR)
export IMAGE ?= accessory/tiny/example.png
export PROMPT ?= What is in this picture?
ARGS ?=

help:
	@echo "make demo    ask the tiny model about a picture, on two ranks (IMAGE=any.png PROMPT='...')"
	@echo "make test    the tests; make slow: the long ones; ARGS='-k name' is handed to pytest"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make env     only make the environment, and print its folder"
	@echo "make clean   remove what tests and builds left in this clone"

demo: ready
	@[ -f "$$IMAGE" ] || { echo "make demo: IMAGE=$$IMAGE: no such file in $(CURDIR); give its full path" >&2; exit 1; }
	@echo "picture:  $$IMAGE"
	@echo "question: $$PROMPT"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 ))} \
		$(ENV)/bin/torchrun --standalone --nproc-per-node=2 demos/single_turn_mm.py --image "$$IMAGE" --prompt "$$PROMPT"

test: ready
	@OMP_NUM_THREADS=1 $(ENV)/bin/python -m pytest -q -m "not gpu and not slow" $(ARGS)

slow: ready
	@OMP_NUM_THREADS=1 $(ENV)/bin/python -m pytest -q -m "slow and not gpu" $(ARGS) || [ $$? -eq 5 ]  # 5: there is none

lint: ready
	@$(ENV)/bin/ruff check .
	@$(ENV)/bin/ruff format --check .

env:
	@bash .ci/env

ready:
	@bash .ci/env >/dev/null

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
