# On a fresh machine `make demo` and `make test` are all there is to type: each first builds what it needs in .venv.
# PYTHON= chooses the interpreter that .venv is made with; pip's own variables (PIP_FIND_LINKS, ...) choose where
# packages come from.
#
# The releases are those of constraints.txt. WITH=floor takes the oldest that setup.py allows, WITH=newest what a plain
# `pip install` brings today (TORCH=torch==2.13.0 but for PyTorch); each has an environment of its own.

PYTHON ?= python3
TESTS ?= tests
WITH ?= pins
VENV := .venv$(if $(filter-out pins,$(WITH)),-$(WITH))
CONSTRAINTS := $(if $(filter pins,$(WITH)),constraints.txt,$(if $(filter floor,$(WITH)),constraints-floor.txt))
VENV_PYTHON := $(VENV)/bin/python
# Other people's tools bring much, and may hold back what the tests want newer.
TOOLS_VENV := .venv-integrations

.PHONY: help demo test quick docs contract integrations lint format clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Huge pages where glibc can give them: a step spends a fifth of its time in page faults otherwise.
demo: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
demo: $(VENV)/train.stamp ## train, evaluate, save, reload and generate with a small model on two CPU cores
	$(VENV_PYTHON) scripts/demo.py

test: $(VENV)/test.stamp ## run all tests, or those named in TESTS=
	$(VENV_PYTHON) -m pytest --numprocesses=logical --maxprocesses=8 --max-worker-restart=0 --durations=15 $(TESTS)

quick: $(VENV)/test.stamp ## run the tests that need neither long nor several processes, a compiler or a GPU
	$(VENV_PYTHON) -m pytest --numprocesses=logical --maxprocesses=8 --max-worker-restart=0 \
		-m 'not slow and not distributed and not compile and not gpu' $(TESTS)

# Material for MkDocs would say each time that it is maintained until May 2027, and what comes after it.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/docs.stamp ## build the documentation site, build/site/index.html
	rm -rf build/typed
	$(VENV_PYTHON) setup.py --quiet build_py --build-lib build/typed
	$(VENV_PYTHON) -m mkdocs build --strict --quiet

contract: $(VENV)/contract.stamp ## run transformers' own common suites on the models; writes docs/contract.md
	$(VENV_PYTHON) -m scripts.maintain.contract $(CONTRACT)

integrations: $(TOOLS_VENV)/integrations.stamp ## run other people's tools on the models; writes docs/integrations.md
	$(TOOLS_VENV)/bin/python -m scripts.maintain.check_integrations $(INTEGRATIONS)

lint: $(VENV)/test.stamp ## check style (ruff), spelling (codespell), types (mypy), conventions of Transformers' model files (mlinter)
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV)/bin/codespell
	$(VENV_PYTHON) scripts/maintain/lint.py

format: $(VENV)/test.stamp ## rewrite the sources as ruff wants them
	$(VENV_PYTHON) -m ruff check --fix
	$(VENV_PYTHON) -m ruff format

clean: ## remove build products and caches, but neither .venv nor what was trained in runs/
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each set of extras in setup.py, so that the demo does not install the test tools. An environment that is
# already there is kept: pip then finds every requirement satisfied.
%.stamp: setup.py $(CONSTRAINTS)
	test -x $(@D)/bin/pip || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(addprefix --constraint ,$(CONSTRAINTS)) $(TORCH) --editable '.[$(*F)]'
	touch $@
