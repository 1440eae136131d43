# make train: from nothing to a scored artifact (about two minutes of training on two CPU cores). make test: all tests
# but the slow ones; make test-slow: those. make bench: where the time of a run goes; BENCH has its arguments, as in
#   make bench BENCH="--against HEAD"
PYTHON ?= python3
# A plain `pip install torch` on Linux fetches the CUDA build. CPU only, smaller:
#   make train PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" TORCH=torch==2.13.0+cpu
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
BIN := .venv/bin
# Python compiles a module when it is imported; pip would compile each of torch's, for 13 s.
INSTALL = $(BIN)/pip install -q --no-compile $(PIP_FLAGS)
DEMO_DATA := data/datasets/offline

.PHONY: train test test-slow bench lint clean
.DELETE_ON_ERROR:

train: $(DEMO_DATA)/manifest.json
	env $$(grep -v '^#' records/recipes/cpu_demo.env) DATA_PATH=$(DEMO_DATA) $(BIN)/python train_gpt.py

# Test processes share the cores: a thread that waits for another leaves them at once.
test test-slow: export OMP_WAIT_POLICY ?= PASSIVE

test: .venv/dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

bench: .venv/run
	$(BIN)/python tests/bench.py $(BENCH)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(DEMO_DATA)/manifest.json: | .venv/run
	$(BIN)/python data/prepare.py offline --out $(DEMO_DATA)

# A Python that has torch already (a competition pod, with its own attention kernels) lends it to the environment.
.venv/run: requirements.txt
	@if $(PYTHON) -c "import torch" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages .venv && $(INSTALL) -r requirements.txt; \
	else $(PYTHON) -m venv .venv && $(INSTALL) $(TORCH) -r requirements.txt; fi
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv $(DEMO_DATA)
