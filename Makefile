SHELL := bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# What vLLM's CPU backend asks for: Intel's OpenMP, which the CPU set-up installs, loaded first.
# Asked when a recipe runs, not when this file is read: in a bare clone the set-up comes in between.
OPENMP := $(CURDIR)/$(VENV)/lib/libiomp5.so
RUN := env HF_HUB_OFFLINE=1 $$(test -e $(OPENMP) && echo LD_PRELOAD=$(OPENMP))

.PHONY: help setup demo test test-gpu views soak ray lint format bench bench-gpu benchmarks-page pairs drafters clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: ## Make .venv with vLLM for CPUs, or for NVIDIA GPUs where there is one
	@bash deploy/setup.sh $(PYTHON) $(VENV)

demo: setup ## Serve a bundled pair and let it describe a video
	$(RUN) $(BIN)/lvspec demo

# Two processes share the tests, a core each; engines of two ranks have both cores for themselves afterwards.
PYTEST = $(RUN) $(BIN)/python -m pytest -m 'not two_ranks' --numprocesses 2 --dist loadfile $(1) && \
	$(RUN) $(BIN)/python -m pytest -m two_ranks $(1)

test: setup ## Run the tests
	$(call PYTEST)

test-gpu: setup ## Run the tests of what only a GPU can show
	$(RUN) $(BIN)/python -m pytest tests/kernels tests/engine/test_gpu.py

# Each strategy, and the target as its own drafter in both ways; the default view's turn comes with `make test`.
VIEWS := '{"pruning": "none"}' '{"pruning": "random"}' '{"pruning": "redundancy"}' '{"pruning": "attention"}' \
	'{"pruning": "similarity"}' '{"model": "self"}' '{"model": "self", "self_cache": "compute"}'
LOSSLESS := $(addprefix tests/engine/test_,lossless.py sampling.py families.py tensor_parallel.py)
views: setup ## Run the tests of lossless outputs with every view that a drafter may have (an hour on two cores)
	for view in $(VIEWS); do \
		echo "$$view"; export LVSPEC_TEST_VIEW="$$view"; $(call PYTEST,$(LOSSLESS)) || exit; \
	done

soak: setup ## Load a server for ten minutes with videos, texts, aborts and wrong requests, on one rank and on two
	for ranks in 1 2; do $(RUN) $(BIN)/python tests/serve/soak.py --seconds 600 --tensor-parallel-size $$ranks || exit; done

ray: setup ## Serve two replicas with Ray and kill one under load, then describe a folder of videos with Ray Data
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[ray]'
	$(RUN) $(BIN)/python tests/serve/ray_failover.py
	$(RUN) $(BIN)/python tests/serve/ray_batch.py

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Compare ways to decode on the bundled pair (under 20 minutes on two cores)
	$(RUN) $(BIN)/lvspec bench --suite videofacts --samples 60 --seed 1 --policies ar,ngram,strict,lvspec --json build/bench.json

# For one GPU of 141 GB. Engines that matter most come first: those not begun after eight minutes are left out.
bench-gpu: setup ## Measure what large targets cost with drafters of several sizes on a GPU (about ten minutes)
	$(RUN) $(BIN)/lvspec bench-growth --targets 32b,72b:fp8_per_channel --drafters 7b:mxfp4,3b:mxfp4,1.5b:mxfp4,0.5b:mxfp4,7b,3b:fp8_per_channel,7b:fp8_per_channel,3b \
		--spec-tokens 4,10,16 --dtype bfloat16 --videos 64x448x672,128x448x672 --vocabulary 152064 --samples 5 --minutes 8 --traces build/traces --json build/gpu.json

benchmarks-page: setup ## Make docs/benchmarks.md from the runs in docs/benchmarks
	mkdir -p build
	$(BIN)/python -m vllm_lvspec.bench.page docs/benchmarks > build/benchmarks.md
	mv build/benchmarks.md docs/benchmarks.md

PAIRS := build/pairs
TRAIN := $(RUN) $(BIN)/python -m vllm_lvspec.reference.train
pairs: setup ## Train the bundled pairs again (about five hours on two cores)
	$(TRAIN) qwen2_5_vl target --out $(PAIRS)/qwen2_5_vl/target --steps 5000
	$(TRAIN) qwen2_5_vl draft --out $(PAIRS)/qwen2_5_vl/draft --steps 4000
	$(TRAIN) llava_onevision target --out $(PAIRS)/llava_onevision/target --steps 1200 --short-share 0 \
		--start-from $(PAIRS)/qwen2_5_vl/target
	$(TRAIN) llava_onevision draft --out $(PAIRS)/llava_onevision/draft --steps 1400 --learning-rate 0.0025 --short-share 0 \
		--start-from $(PAIRS)/qwen2_5_vl/draft

drafters: setup ## Train smaller drafters than the bundled one, of the Qwen2.5-VL pair (an hour on two cores)
	for shape in draft-2x64 draft-1x64; do $(TRAIN) qwen2_5_vl $$shape --out build/drafters/$$shape --steps 4500 || exit 1; done

clean: ## Remove what was built
	rm -rf $(VENV) build *.egg-info
