# `make demo` and `make test` are all that a newcomer needs: either makes .venv first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
HALF_MADE := $(VENV)/half-made
INSTALL := $(BIN)/python -m pip install --constraint constraints/newest.txt --editable '.[all]'

.PHONY: demo reader test test-more test-all bench probe lint types docs ci eval clean

# One of the two files says that make made the environment. Without them it is somebody else's: used, never changed.
$(STAMP): pyproject.toml constraints/newest.txt
	@set -e; \
	if [ -e $(VENV) ] && [ ! -e $(STAMP) ] && [ ! -e $(HALF_MADE) ]; then \
		$(BIN)/python -P -c "import dualview, pytest" 2>/dev/null && exit 0; \
		echo "$(VENV) was not made by make, and dualview or pytest is missing there: remove it, or run" \
			"$(INSTALL)" >&2; \
		exit 1; \
	fi; \
	if [ ! -e $(STAMP) ]; then \
		echo "Making $(VENV) with pinned versions: torch and its libraries are some gigabytes, this takes minutes."; \
		rm -rf $(VENV); mkdir $(VENV); touch $(HALF_MADE); \
		$(PYTHON) -m venv $(VENV); \
	fi; \
	$(INSTALL) -qq; \
	rm -f $(HALF_MADE); touch $(STAMP)

demo: $(STAMP)
	$(BIN)/dualview demo

reader: $(STAMP) # the small vision tower and the embedded model, trained from nothing
	$(BIN)/python -m dualview.reader out/reader

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-more: $(STAMP) # what takes longer: run with the newest versions alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m more tests

test-all: $(STAMP) # every case, and ten times as many examples of what is drawn at random
	TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "more or not more"

bench: $(STAMP)
	$(BIN)/python -m benchmarks

probe: $(STAMP) # a reduced table of docs/probe.md, in under 20 minutes on 2 cores
	OMP_NUM_THREADS=2 $(BIN)/dualview probe -o probe.json

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

ci:
	.ci/run

# lmms-eval pins much: it gets an environment of its own, beside .venv, and is no part of ci. It imports a module that
# filelock 4 has no more, and does not say so to pip.
eval:
	$(PYTHON) -m venv --system-site-packages .venv-eval
	.venv-eval/bin/pip install -qq --editable '.[hf]' 'lmms-eval>=0.7.3' 'filelock<4'
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv-eval/bin/python tests/evaluation/run.py

clean:
	rm -rf build dist site
	if [ -e $(STAMP) ] || [ -e $(HALF_MADE) ]; then rm -rf $(VENV); fi
