# The commands of the README. PYTHON picks the interpreter that makes the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test parity lint bench clean

$(BIN)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"rspo_jax needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable .
	@touch $@

$(BIN)/.test: $(BIN)/.installed
	$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@

$(BIN)/.parity: $(BIN)/.test
	$(BIN)/python -m pip install -qq --editable '.[test,parity]'
	$(BIN)/python -m pip install -qq --no-deps trl==1.16.0  # read for its real chat templates, never imported
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m experiments.train --config=experiments/configs/countdown_tiny.py --workdir=runs/countdown_tiny

test: $(BIN)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

parity: $(BIN)/.parity
	$(BIN)/python -m pytest -m parity -n 2

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(BIN)/.parity
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist *.egg-info
