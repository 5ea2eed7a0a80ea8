# Needs Python >= 3.11 with venv and pip, and a C++17 compiler for the extension, which is optional.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST_ARGS ?=
COMFYUI ?=
DIFFUSERS ?=

.PHONY: demo test test-integrations test-physicsnemo lint format docs bench clean

demo: $(VENV)/.installed  ## samples of the bundled model, and all solvers side by side
	$(BIN)/amed sample --model digits --seeds 0-63 --nfe 5 --out samples.png
	$(BIN)/amed compare --model digits --nfe 5 --out compare.png

# A worker per core (tests/conftest.py), a file's tests all on one: what they share is made once. PYTEST_ARGS="-n 0": none.
# One thread for programs that tests start, too.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

# COMFYUI=/path[:/path]: checkouts of ComfyUI to start as servers; COMFYUI_PYTHON, a Python that has what they need.
# DIFFUSERS=/path: a checkout of diffusers, whose own scheduler tests are run too.
test-integrations: $(VENV)-integrations/.installed  ## against the real stacks, in an environment of its own
	COMFYUI='$(COMFYUI)' DIFFUSERS='$(abspath $(DIFFUSERS))' $(VENV)-integrations/bin/pytest tests/integrations tests/test_docs.py::test_a_program_of_an_integration_runs $(PYTEST_ARGS)

test-physicsnemo: $(VENV)-physicsnemo/.installed  ## against PhysicsNeMo, in an environment of 7 GB
	$(VENV)-physicsnemo/bin/pytest tests/integrations/test_physicsnemo.py $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run -Werror $(CSRC) </dev/null

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) </dev/null

docs: $(VENV)/.lint  ## the reference of every module, in build/docs
	rm -rf build/docs
	TRANSFORMERS_VERBOSITY=error $(BIN)/python docs/build_reference.py build/docs

bench: $(VENV)/.installed
	$(BIN)/pytest benchmarks -m "not gpu" --benchmark-only $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-integrations $(VENV)-physicsnemo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks samples.png compare.png
	find amed_engine kernels csrc tests -name __pycache__ -prune -exec rm -rf {} + -o -name '*.so' -exec rm -f {} +

# Stamps, so that a second `make demo` installs nothing. --no-deps and --no-build-isolation: the lock file has it all.
$(VENV)/.locked: requirements.lock
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python >= 3.11, got " + sys.version + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml setup.py $(CSRC)
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.lint: $(VENV)/.installed requirements-dev.lock
	$(PIP) -r requirements-dev.lock
	touch $@

# --no-deps: requirements-integrations.lock has what their tests import, and pins of some contradict each other.
$(VENV)-integrations/.installed: requirements.lock requirements-integrations.lock pyproject.toml setup.py $(CSRC)
	$(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/python -m pip install --quiet -r requirements.lock
	$(VENV)-integrations/bin/python -m pip install --quiet --no-deps -r requirements-integrations.lock
	$(VENV)-integrations/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)-physicsnemo/.installed: requirements.lock requirements-physicsnemo.lock pyproject.toml setup.py $(CSRC)
	$(PYTHON) -m venv $(VENV)-physicsnemo
	grep -v '^torch==\|^triton==' requirements.lock > $(VENV)-physicsnemo/others.txt
	$(VENV)-physicsnemo/bin/python -m pip install --quiet --no-deps -r $(VENV)-physicsnemo/others.txt -r requirements-physicsnemo.lock
	$(VENV)-physicsnemo/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
