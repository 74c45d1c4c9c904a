# `make demo` and `make test` are all that a newcomer needs: either makes .venv first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test lint types docs ci clean

# The stamp is written last, so an environment left half-made by an interruption is made anew.
$(STAMP): pyproject.toml constraints/newest.txt
	@echo "Making $(VENV) with pinned versions: torch and its libraries are some gigabytes, this takes minutes."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --constraint constraints/newest.txt --editable ".[all]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/dualview demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

ci:
	.ci/run

clean:
	rm -rf $(VENV) build dist site
