# Everything a fresh machine needs: `make demo` trains and compares, `make test` checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,deepspeed,bench,examples,test]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -q

# About 25 minutes on 2 cores; nothing else should run meanwhile.
bench: install
	$(BIN)/python -m benchmarks.ratios --json benchmarks/results/ratios.json
	$(BIN)/python -m benchmarks.memory --json benchmarks/results/memory.json
	$(BIN)/python -m pytest benchmarks -o timeout=3600 --benchmark-columns=median,min,max,rounds \
		--benchmark-json=benchmarks/results/speed.json

clean:
	rm -rf $(VENV) runs
