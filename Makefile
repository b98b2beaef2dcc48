# make reproduce   the study from text to report           make test   the tests
# make env         just .venv                               make lint   style of code and workflow
# make test-exhaustive   the tests that make test leaves out
# make cluster-test   the study on a simulated Slurm cluster, with failures (docs/cluster.md)
# make browser-test   the pages of a study in a headless Chromium (docs/report.md)
# make paper PAPER=folder   the paper's fits, figures and claims from its published logs (DOWNLOAD=true fetches them)
# Each sets up what it needs. PYTHON=python3.12 picks the interpreter, CORES=8 the cores, STUDY=smoke the study,
# PIP_ARGS="--index-url …" another package index (for example PyTorch's index of CPU builds on Linux without a GPU).
PYTHON ?= python3
CORES ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
STUDY ?= laptop
CONFIG ?=
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PAPER ?= $(XLSTM_SCALING_PAPER)
DOWNLOAD ?=

CLUSTER_READY := $(VENV)/.ready-cluster
BROWSER_READY := $(VENV)/.ready-browser

.PHONY: env reproduce paper test lint format clean-env
.DELETE_ON_ERROR:

env: $(READY)

$(READY): requirements.lock requirements-triton.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed; set PYTHON=python3.12 or the like"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the locked versions (about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --editable .
	@# a CUDA build of torch has brought the Triton it needs
	@$(BIN)/python -c "import triton" 2> /dev/null || test "$$(uname -s)" != Linux \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -r requirements-triton.lock \
	  || echo "Triton could not be installed: its kernels are left out, everything else works"
	@touch $@

# for studies on a Slurm cluster (docs/cluster.md)
.PHONY: env-cluster cluster-test
env-cluster: $(CLUSTER_READY)

$(CLUSTER_READY): $(READY) requirements-cluster.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -r requirements-cluster.lock
	@touch $@

# on a Slurm of three nodes that is started for it, as root, from Debian's packages; a quarter of an hour on two cores
cluster-test: $(CLUSTER_READY)
	@$(BIN)/python -m pytest -m cluster -rs tests/cluster

$(BROWSER_READY): $(READY) requirements-browser.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps -r requirements-browser.lock
	@touch $@

# in the Chromium on PATH, or the one that CHROMIUM names
.PHONY: browser-test
browser-test: $(BROWSER_READY)
	@$(BIN)/python -m pytest -m browser -rs tests/browser

reproduce: $(READY)
	@$(BIN)/snakemake --cores $(CORES) --quiet host reason --config study=$(STUDY) $(CONFIG)
	@echo
	@cat results/$(STUDY)/findings.md
	@echo
	@echo "The report: results/$(STUDY)/report.html (the workflow's own: workflow-report.html)"
	@echo "Figures:    results/$(STUDY)/figures/"
	@echo "Tables:     results/$(STUDY)/runs.csv, results/$(STUDY)/fits/, results/$(STUDY)/inference/"

.PHONY: paper-folder
paper-folder:
	@test -n "$(PAPER)$(DOWNLOAD)" || { echo "name the folder of the paper's published files: make paper PAPER=/path/to/folder" >&2; \
	  echo "(or set XLSTM_SCALING_PAPER; make paper DOWNLOAD=true fetches the authors' logs; see docs/published.md)" >&2; exit 2; }

paper: paper-folder $(READY)
	@$(BIN)/snakemake --cores $(CORES) --quiet host reason --config runs=published \
	  $(if $(PAPER),"paper=$(PAPER)") $(if $(DOWNLOAD),download=$(DOWNLOAD)) $(CONFIG)
	@echo
	@cat results/paper-published/findings.md
	@echo
	@echo "The claims: results/paper-published/claims/claims.md"
	@echo "The report: results/paper-published/report.html"
	@echo "Figures:    results/paper-published/figures/"
	@echo "Tables:     results/paper-published/runs.csv, results/paper-published/fits/, results/paper-published/inference/"

test: $(READY)
	@$(BIN)/python -m pytest -n $(CORES) --dist loadfile

# rare and long cases, each beside a cheaper one that make test runs
.PHONY: test-exhaustive
test-exhaustive: $(READY)
	@$(BIN)/python -m pytest -n $(CORES) --dist loadfile -m exhaustive

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

clean-env:
	rm -rf $(VENV)

# the pages that are written by commands; the figures and findings that the README shows, from the laptop study's results
.PHONY: docs
docs: $(READY)
	$(BIN)/xlstm-scaling config-reference --out docs/configuration.md
	$(BIN)/python benchmarks/page.py
	@test -s results/laptop/findings.md || { echo "run make reproduce first"; exit 1; }
	@mkdir -p docs/figures
	cp results/laptop/figures/loss_vs_flops.png results/laptop/figures/isoflop_curves.png results/laptop/figures/context.png docs/figures/
	cp results/laptop/findings.md docs/laptop-findings.md
