# Needs make and Python 3.11 or newer, nothing else: everything is installed into .venv.
#     make quickstart PYTHON=python3.12        another Python, for a new .venv
#     make gpu PY=python3                      the Python that is given; nothing is installed
#     make quickstart CONFIG=config/refshapes/cris_small.yaml
#     make test MARK='not parity'             the tests that hold for a changed model too

PYTHON ?= python3
CONFIG ?= config/refshapes/cris_tiny.yaml
BIN := .venv/bin
INSTALLED := .venv/installed-requirements.txt
DEMO_INSTALLED := .venv/installed-requirements-demo.txt
# Two files of tests at a time, each computing in one thread. In their own order: xdist's would
# leave files of few, long tests to the end, where one process waits for the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
MARK ?= slow or not slow

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo gpu test test-full test-demo lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## Make .venv with all that requirements.txt names

quickstart: install ## Draw RefShapes, train on it, evaluate, and show the result: minutes on a CPU
	@$(BIN)/python tools/quickstart.py --config $(CONFIG)

demo: $(DEMO_INSTALLED) ## Try the model of the quickstart on a page in the browser
	@$(BIN)/python tools/demo.py --config $(CONFIG)

gpu: $(if $(PY),,install) ## Prove it on a GPU, in minutes: tests, speed, memory, a training
	@$(or $(PY),$(BIN)/python) tools/gpu.py

test: install ## Run the tests, without the slow ones
	@$(PYTEST) -m "not slow and ($(MARK))"

test-full: install ## Run all the tests
	@$(PYTEST) -m "$(MARK)"

# gradio brings Pillow 12 in place of 13, so what reads or writes pictures is tested again.
test-demo: $(DEMO_INSTALLED) ## Install the demo's requirements and run its tests
	@$(BIN)/python -m pytest tests/tools/test_demo.py tests/tools/test_demo_browser.py tests/utils/test_photos.py \
	    tests/tools/test_predict.py tests/engine/test_predictor.py tests/utils/test_visualize.py

lint: install ## Check style, and that the files are formatted
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: install ## Format the files, repair what can be repaired, write config/base.yaml
	@$(BIN)/python -m utils.config
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove caches; data, runs and .venv stay
	@rm -rf .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

# The copy is made last, so an interrupted installation is continued; and it is compared, because
# a checkout gives an unchanged requirements.txt a new date.
$(INSTALLED): requirements.txt
	@if cmp -s requirements.txt $@; then touch $@; else $(MAKE) --no-print-directory .install; fi

$(DEMO_INSTALLED): $(INSTALLED) requirements-demo.txt
	@$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -r requirements-demo.txt
	@cp requirements-demo.txt $@

.PHONY: .install .venv
.install: .venv
	@echo "installing requirements.txt into .venv (the first time, torch is a large download)"
	@$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@cp requirements.txt $(INSTALLED)

RECENT := import sys; sys.exit(sys.version_info < (3, 11))
.venv:
	@$(BIN)/python -c 'import pip; $(RECENT)' 2>/dev/null \
	    || $(PYTHON) -c '$(RECENT)' 2>/dev/null \
	    || { echo "error: this needs Python 3.11 or newer, and $(PYTHON) is none;" \
	        "name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -c 'import pip; $(RECENT)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
