# Two commands matter: `make serve` and `make test`. Both create .venv on first use.
PYTHON ?= python3
PORT ?= 8000
MODEL ?=
EXTRA ?=
VENV := .venv
BIN := $(VENV)/bin
SERVE_STAMP := $(VENV)/.installed-serve-$(EXTRA)
TEST_STAMP := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: serve test lint unit clean

serve: $(SERVE_STAMP)
	@echo "== Serving on http://127.0.0.1:$(PORT) (the first start compiles for half a minute or so; later ones take seconds)"
	@exec $(BIN)/paddock serve $(MODEL) --port $(PORT)

test: lint unit

lint: $(TEST_STAMP)
	@echo "== ruff: style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy: types"
	@mkdir -p build/typing/paddock
	@for package in model sharding pallas_kernels checkpoints serving; do \
		ln -sfn "$(CURDIR)/$$package" build/typing/paddock/$$package; done
	@cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p paddock
	@echo "== import-linter: who may import whom"
	@$(BIN)/lint-imports

unit: $(TEST_STAMP)
	@echo "== pytest (a few minutes the first time: JAX compiles are then cached in build/)"
	@$(BIN)/python -m pytest -n 2 --dist loadfile

$(VENV)/bin/python:
	@echo "== Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(SERVE_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "== Installing Paddock$(if $(EXTRA), with $(EXTRA)) into $(VENV) (JAX is large: this takes a minute or two)"
	@$(PIP) --editable ".$(if $(EXTRA),[$(EXTRA)])"
	@touch $@

$(TEST_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "== Installing Paddock with its test tools into $(VENV) (this takes a minute or two)"
	@$(PIP) --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
