# make demo: train, attack and report on real images. make test: lint and tests. Both create .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: demo test lint results clean install
.DEFAULT_GOAL := help

help:
	@echo "make demo   train, attack and report on scikit-learn's digits (about 4 minutes on 2 cores once installed)"
	@echo "make test   ruff and the test suite"
	@echo "make lint   ruff alone"
	@echo "make results  benchmarks/RESULTS.md from the JSON files in benchmarks/results"
	@echo "make clean  remove .venv, caches and runs/demo"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip check
	@touch $@

demo: $(READY)
	$(BIN)/at-extensions demo --out runs/demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

results: $(READY)
	$(BIN)/python benchmarks/results.py

clean:
	rm -rf $(VENV) runs/demo .pytest_cache .ruff_cache .hypothesis *.egg-info
	find at_extensions benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
