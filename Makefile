SHELL := bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# What vLLM's CPU backend asks for: Intel's OpenMP, which the CPU set-up installs, loaded first.
# Asked when a recipe runs, not when this file is read: in a bare clone the set-up comes in between.
OPENMP := $(CURDIR)/$(VENV)/lib/libiomp5.so
RUN := env HF_HUB_OFFLINE=1 $$(test -e $(OPENMP) && echo LD_PRELOAD=$(OPENMP))

.PHONY: help setup demo test lint format pair evaluate-pair clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: ## Make .venv with vLLM for CPUs, or for NVIDIA GPUs where there is one
	@bash deploy/setup.sh $(PYTHON) $(VENV)

demo: setup ## Serve the bundled pair and let it describe a video
	$(RUN) $(BIN)/lvspec demo

test: setup ## Run the tests
	$(RUN) $(BIN)/python -m pytest

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pair: setup ## Train the bundled pair again (about 40 minutes on two cores)
	$(RUN) $(BIN)/python -m vllm_lvspec.reference.train target --out build/pair/target
	$(RUN) $(BIN)/python -m vllm_lvspec.reference.train draft --out build/pair/draft --learning-rate 0.002

evaluate-pair: setup ## Facts right and accepted lengths of the bundled pair
	$(RUN) $(BIN)/python -m vllm_lvspec.reference.evaluate

clean: ## Remove what was built
	rm -rf $(VENV) build *.egg-info
