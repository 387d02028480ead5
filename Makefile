# Every target sets up .venv by itself; only Python 3.11 or 3.12, pip and make are needed.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do "$$p" -c '$(SUPPORTED)' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
TWO := -n 2 --no-loadscope-reorder

.PHONY: install serve test test-full check format bench gpu chaos clean

install: $(STAMP)

# pip is asked again whenever pyproject.toml changes.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "PYTHON: no Python 3.11 or 3.12 found, give PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c '$(SUPPORTED)' || { echo "PYTHON: must be Python 3.11 or 3.12, $(PYTHON) is not" >&2; exit 2; }
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv || { \
		echo "no ensurepip here: the environment gets pip from $(PYTHON)" >&2; \
		"$(PYTHON)" -m venv --clear --without-pip .venv && "$(PYTHON)" -m pip --python $(BIN)/python install --disable-pip-version-check pip; }
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[dev]"
	@touch $(STAMP)

serve: $(STAMP)
	@exec $(BIN)/afd-ray serve

test: $(STAMP)
	$(BIN)/python -m pytest $(TWO)

test-full: $(STAMP)
	$(BIN)/python -m pytest $(TWO) -m "full or not full"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for name in $$(basename -s .py benchmarks/[a-z]*.py | grep -v '^gpu') chaos; do \
		echo "== $$name" >&2; $(BIN)/python -m "benchmarks.$$name" --quick || exit 1; \
	done

# Where there is a GPU: probes, the kernels' tests, every GPU benchmark, results under benchmarks/results. MINUTES is for all of it.
MINUTES ?= 60
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --minutes $(MINUTES)

chaos: $(STAMP)
	$(BIN)/python -m benchmarks.chaos --kills 100 --pauses 20

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
