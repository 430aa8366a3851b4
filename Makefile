# Each target makes the virtual environment it needs, and is instant when there is one.
PYTHON ?= python3
BUDGET ?= 2h
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test check bench train clean

serve: $(VENV)/.runtime
	$(BIN)/shoal serve $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(ARGS)

$(VENV)/.runtime: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.runtime

# BUDGET is wall time or tokens: 45min, 2h, 20Mtok. A larger one goes on from the last checkpoint in .train/.
train: $(VENV)/.train
	OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		nice -n 19 $(BIN)/python -m model.training run --budget $(BUDGET)

$(VENV)/.train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist
